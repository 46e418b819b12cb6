// pool_chunks: keys, values and router keys of tokens to the means of chunks, in one pass over the tokens.
//
// Threads stand side by side along a row of G * D numbers, 16 bytes each, every one with UNROLL loads in flight. Two
// kernels go forward, and where both can be taken they give the same bits:
//   pool_columns_kernel  where blocks cover a row exactly and no head lies in two warps: a thread keeps its columns in
//                        registers from the first load to the store; only the maximum of quantized router keys is taken
//                        across warps
//   pool_forward_kernel  any other shape, one block per (chunk, tensor): where a row is shorter than the block, several
//                        rows are read at a time; the sums are joined, normalized and quantized in shared memory
//
// Bytes per token in 16 bit: 6 * G * D read; per chunk 6 * G * D written (less where router keys are quantized).

#include <algorithm>
#include <cfloat>
#include <initializer_list>
#include <string>

#include "../common/launch.cuh"
#include "../common/numbers.cuh"
#include "pool_chunks.h"

namespace msa_hf {
namespace {

constexpr int kParts = 3;  // keys, values, router keys
constexpr int kContent = 2;
constexpr int kOutside = 16;
constexpr float kNormEpsilon = 1e-12f;  // inside the root: the gradient at zero is finite
constexpr size_t kMostShared = 96 * 1024;  // every device from sm_80 on has it

// Threads that run at once on a device of this size, as many as `resident` leaves registers for.
constexpr unsigned kStartTogether = 132 * 768;

// Blocks resident per multiprocessor at least: leaves each thread registers for its loads in flight.
constexpr int resident(int threads, int unroll) { return (unroll <= 8 ? 768 : 384) / threads; }

// How many of `count` ascending numbers are <= value. The whole warp searches: 32 probes a round.
__device__ __forceinline__ int64_t warp_count_at_most(const int64_t* ascending, int64_t count, int64_t value) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  int64_t low = 0, high = count;  // below `low` all are <= value, from `high` on none is
  while (low < high) {
    const int64_t step = (high - low + 31) / 32;
    const int64_t probe = low + lane * step;
    const bool at_most = probe < high && ascending[probe] <= value;
    const int passed = __popc(__ballot_sync(kWarp, at_most));
    if (passed == 0) break;
    const int64_t next = low + passed * step;
    low = low + (passed - 1) * step + 1;
    high = next < high ? next : high;
  }
  return low;
}

struct ChunkPlace {
  int64_t document;  // -1 behind the last chunk
  int64_t offset;  // of the document's tokens
  int64_t first;  // token of the document it starts with
  int rows;  // tokens in it
};

__device__ __forceinline__ int64_t chunks_of(int64_t tokens, int chunk_size) {
  if (tokens <= 0) return 0;
  // Division in 64 bits takes several times as long.
  if (tokens <= INT32_MAX) return static_cast<unsigned>(tokens - 1) / static_cast<unsigned>(chunk_size) + 1;
  return (tokens - 1) / chunk_size + 1;
}

// The whole warp searches. `which` gives the number of the chunk, and may do more: it is called while the first offsets
// are on their way.
template <typename Which>
__device__ __forceinline__ ChunkPlace find_chunk(const Chunking& chunking, Which&& which) {
  int64_t chunk = 0, document = -1, within = 0;  // within: the chunk of its document
  int64_t offset = 0, tokens = 0;  // of the document
  if (chunking.chunk_offsets != nullptr) {
    chunk = which();
    const int64_t passed = warp_count_at_most(chunking.chunk_offsets, chunking.documents + 1, chunk);
    if (passed > 0 && passed <= chunking.documents) {
      document = passed - 1;
      within = chunk - chunking.chunk_offsets[document];
      offset = chunking.token_offsets[document];
      tokens = chunking.token_offsets[document + 1] - offset;
    }
  } else {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int64_t before = 0;
    int64_t base = 0;
    do {  // once even without documents: `which` is called in any case
      int64_t begin = 0, end = 0;
      if (base + lane < chunking.documents) {
        begin = chunking.token_offsets[base + lane];
        end = chunking.token_offsets[base + lane + 1];
      }
      if (base == 0) chunk = which();
      const int64_t count = chunks_of(end - begin, chunking.chunk_size);
      int64_t sum = count;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(kWarp, sum, step);
        if (lane >= step) sum += other;
      }
      const unsigned behind = __ballot_sync(kWarp, chunk < before + sum);
      if (behind != 0) {
        const int first = __ffs(static_cast<int>(behind)) - 1;
        document = base + first;
        within = chunk - before - __shfl_sync(kWarp, sum - count, first);
        offset = __shfl_sync(kWarp, begin, first);
        tokens = __shfl_sync(kWarp, end - begin, first);
        break;
      }
      before += __shfl_sync(kWarp, sum, 31);
      base += 32;
    } while (base < chunking.documents);
  }
  if (document < 0) return {-1, 0, 0, 0};
  const int64_t first = within * chunking.chunk_size, rows = tokens - first;
  return {document, offset, first, static_cast<int>(rows < chunking.chunk_size ? rows : chunking.chunk_size)};
}

__device__ __forceinline__ int64_t first_element(const TokenStates& states, const ChunkPlace& place) {
  if (states.packed) return (place.offset + place.first) * states.token_stride;
  return place.document * states.document_stride + place.first * states.token_stride;
}

__device__ __forceinline__ const TokenStates& part_of(
    const TokenStates& keys, const TokenStates& values, const TokenStates& router_keys, int part) {
  return part == 0 ? keys : part == 1 ? values : router_keys;
}

// Of numbers up to `most`, in 8 bits.
__device__ __forceinline__ float scale_of(float most, Type type) {
  // A scale below the normal numbers would overflow the division.
  return most > 0.0f ? fmaxf(most / (type == Type::s8 ? largest_of(Type::s8) : largest_of(Type::e4m3)), FLT_MIN) : 1.0f;
}

// Into the second cache, by the copy engine. Both are multiples of 16.
__device__ __forceinline__ void fetch_ahead(const void* address, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(bytes));
#else
  (void)address, (void)bytes;
#endif
}

// Adds `rows` rows, every `step`-th from `line` on, of the VEC columns at `column`.
template <typename T, int VEC, int UNROLL>
__device__ __forceinline__ void add_rows(
    const T* column, int64_t token_stride, int rows, int line, int step, float (&sum)[VEC]) {
  using Word = typename Raw<sizeof(T) * VEC>::type;
  const int64_t stride = step * token_stride;
  int base = line;
  for (column += line * token_stride; base + step * (UNROLL - 1) < rows; base += step * UNROLL) {
    Numbers<T, VEC> numbers[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u, column += stride) {
      numbers[u].word = load_once(reinterpret_cast<const Word*>(column));
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum[i] += to_float(numbers[u].values[i]);
    }
  }
  if (base < rows) {
    Numbers<T, VEC> numbers[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      // Behind the chunk its last such row is read again, from the cache, and not counted.
      numbers[u].word = load_once(reinterpret_cast<const Word*>(column));
      if (base + (u + 1) * step < rows) column += stride;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (base + u * step < rows) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[i] += to_float(numbers[u].values[i]);
      }
    }
  }
}

// Sums of the rows of a chunk, one line of G * D floats per lane group of threads, to sums[lines][G * D].
template <typename T, int VEC, int THREADS, int UNROLL>
__device__ __forceinline__ void sum_rows(
    const TokenStates& states, const Chunking& chunking, const ChunkPlace& place, int vectors, int lines, float* sums) {
  const int thread = static_cast<int>(threadIdx.x);
  const int line = vectors >= THREADS ? 0 : thread / vectors;
  if (line >= lines) return;
  const int width = vectors * VEC;
  const T* chunk = static_cast<const T*>(states.data) + first_element(states, place);
  for (int vector = vectors >= THREADS ? thread : thread % vectors; vector < vectors; vector += THREADS) {
    const int head = vector * VEC / chunking.dim;
    const T* column = chunk + head * states.head_stride + (vector * VEC - head * chunking.dim);
    float sum[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] = 0.0f;
    add_rows<T, VEC, UNROLL>(column, states.token_stride, place.rows, line, lines, sum);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums[line * width + vector * VEC + i] = sum[i];
  }
}

// numbers / by, to the bits of a division each. Those have branches, one after the other. Where neither what goes in
// nor what comes out is near the ends of float32, the reciprocal, correctly rounded, and two corrections round as the
// division does.
template <int COUNT>
__device__ __forceinline__ void divide(float (&numbers)[COUNT], float by) {
  constexpr float kSmall = 0x1p-60f, kLarge = 0x1p60f;
  bool within = by >= kSmall && by <= kLarge;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float size = fabsf(numbers[i]);
    within = within && (size == 0.0f || (size >= kSmall && size <= kLarge));
  }
  if (within) {
    const float inverse = 1.0f / by;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float quotient = numbers[i] * inverse;
      quotient = fmaf(fmaf(-quotient, by, numbers[i]), inverse, quotient);
      quotient = fmaf(fmaf(-quotient, by, numbers[i]), inverse, quotient);
      if (numbers[i] != 0.0f) numbers[i] = quotient;  // a zero keeps its sign
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) numbers[i] /= by;
  }
}

template <typename T, int COUNT>
__device__ __forceinline__ void store_as(void* data, int64_t index, Type type, const float (&numbers)[COUNT]) {
  constexpr int kPerWord = 16 / sizeof(T) < COUNT ? 16 / sizeof(T) : COUNT;
#pragma unroll
  for (int first = 0; first < COUNT; first += kPerWord) {
    Numbers<T, kPerWord> out;
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) store_float(out.values, i, type, numbers[first + i]);
    *reinterpret_cast<typename Raw<sizeof(T) * kPerWord>::type*>(static_cast<T*>(data) + index + first) = out.word;
  }
}

// `index` is a multiple of COUNT, and `data` aligned to 16 bytes.
template <int COUNT>
__device__ __forceinline__ void store_numbers(void* data, int64_t index, Type type, const float (&numbers)[COUNT]) {
  switch (type) {
    case Type::f32:
      return store_as<float>(data, index, Type::f32, numbers);
    case Type::bf16:
      return store_as<__nv_bfloat16>(data, index, Type::bf16, numbers);
    case Type::f16:
      return store_as<__half>(data, index, Type::f16, numbers);
    case Type::s8:
      return store_as<int8_t>(data, index, Type::s8, numbers);
    default:
      return store_as<uint8_t>(data, index, Type::e4m3, numbers);
  }
}

// One block per (chunk, tensor, piece of THREADS * VEC columns), the router keys' before all others: what follows their
// sums takes longest. Quantized router keys are one piece.
//
// AHEAD: the blocks that start with the kernel do not wait for the offsets to ask memory for rows. They ask for those
// that are theirs if no document before ends with a part of a chunk, and otherwise soon another block's.
template <typename T, int VEC, int THREADS, int UNROLL, bool AHEAD>
__global__ void __launch_bounds__(THREADS, resident(THREADS, UNROLL))
    pool_columns_kernel(const PoolForward call, unsigned pieces) {
  MSA_HF_SHARED(shared, 16);
  float* row = reinterpret_cast<float*>(shared);  // [THREADS * VEC]
  float* largest = row + THREADS * VEC;  // [THREADS / 32]
  const Chunking& chunking = call.chunking;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int width = chunking.groups * chunking.dim;
  int part = 0, first = 0;  // column
  int64_t chunk = 0;
  TokenStates states;
  const T* column = nullptr;

  const ChunkPlace place = find_chunk(chunking, [&] {
    const unsigned number = pieces == 1 ? blockIdx.x : blockIdx.x / pieces, piece = blockIdx.x - number * pieces;
    const unsigned chunks = static_cast<unsigned>(chunking.chunks);
    part = number < chunks ? kContent : static_cast<int>((number - chunks) % kContent);
    chunk = number < chunks ? number : (number - chunks) / kContent;
    states = part_of(call.keys, call.values, call.router_keys, part);
    const T* data = static_cast<const T*>(states.data);
    const int start = static_cast<int>(piece) * THREADS * VEC;
    if (AHEAD && thread < min(UNROLL, chunking.chunk_size) && blockIdx.x < kStartTogether / THREADS) {
      const int64_t token = chunk * chunking.chunk_size + thread;
      if (states.packed && states.head_stride == chunking.dim && token < chunking.tokens) {
        fetch_ahead(data + token * states.token_stride + start, THREADS * VEC * sizeof(T));
      }
    }
    first = start + thread * VEC;
    const int head = first / chunking.dim;
    column = data + head * states.head_stride + (first - head * chunking.dim);
    return chunk;
  });
  float mean[VEC];
#pragma unroll
  for (int i = 0; i < VEC; ++i) mean[i] = 0.0f;
  if (place.rows > 0) {
    add_rows<T, VEC, UNROLL>(column + first_element(states, place), states.token_stride, place.rows, 0, 1, mean);
    divide(mean, static_cast<float>(place.rows));
  }
  if (part < kContent) {
    store_numbers(call.content, (chunk * kContent + part) * width + first, call.content_type, mean);
    return;
  }

  if (call.normalize) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) row[thread * VEC + i] = mean[i];
    __syncwarp();
    const float* mine = row + warp * 32 * VEC;
    const int heads = 32 * VEC / chunking.dim;  // of this warp
    float factor = 1.0f;
    for (int one = 0; one < heads; one += 2) {  // two at a time: each waits for its own steps
      const int other = min(one + 1, heads - 1);
      float squares[2] = {0.0f, 0.0f};
      for (int i = lane; i < chunking.dim; i += 32) {
        const float x = mine[one * chunking.dim + i], y = mine[other * chunking.dim + i];
        squares[0] += x * x;
        squares[1] += y * y;
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        squares[0] += __shfl_xor_sync(kWarp, squares[0], step);
        squares[1] += __shfl_xor_sync(kWarp, squares[1], step);
      }
      const int own = lane * VEC / chunking.dim;
      if (own == one || own == other) factor = rsqrtf((own == one ? squares[0] : squares[1]) + kNormEpsilon);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) mean[i] *= factor;
  }
  if (call.scales != nullptr) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < VEC; ++i) most = fmaxf(most, fabsf(mean[i]));
    most = warp_max(most);
    if (lane == 0) largest[warp] = most;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) most = fmaxf(most, largest[i]);
    const float scale = scale_of(most, call.routing_type);
    if (thread == 0) call.scales[chunk] = scale;
    divide(mean, scale);
  }
  store_numbers(call.routing, chunk * width + first, call.routing_type, mean);
}

template <typename T, int VEC, int THREADS, int UNROLL>
__global__ void __launch_bounds__(THREADS, resident(THREADS, UNROLL))
    pool_forward_kernel(const PoolForward call, int vectors, int lines) {
  MSA_HF_SHARED(shared, 16);
  float* sums = reinterpret_cast<float*>(shared);  // [lines][width]; the means end up in line 0
  const Chunking& chunking = call.chunking;
  const int width = vectors * VEC, thread = static_cast<int>(threadIdx.x);
  float* factors = sums + lines * width;  // [G]
  float* largest = factors + chunking.groups;  // [THREADS / 32]
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) / kParts;
  const int part = static_cast<int>(blockIdx.x) % kParts;

  const ChunkPlace place = find_chunk(chunking, [&] { return chunk; });
  if (place.rows > 0) {
    const TokenStates& states = part_of(call.keys, call.values, call.router_keys, part);
    sum_rows<T, VEC, THREADS, UNROLL>(states, chunking, place, vectors, lines, sums);
  }
  __syncthreads();
  for (int i = thread; i < width; i += THREADS) {
    float mean = 0.0f;
    if (place.rows > 0) {
      for (int line = 0; line < lines; ++line) mean += sums[line * width + i];
      mean /= static_cast<float>(place.rows);
    }
    if (part < kContent) {
      store_float(call.content, (chunk * kContent + part) * width + i, call.content_type, mean);
    } else {
      sums[i] = mean;
    }
  }
  if (part < kContent) return;

  const int lane = thread % 32, warp = thread / 32;
  __syncthreads();
  for (int head = warp; head < chunking.groups; head += THREADS / 32) {
    float factor = 1.0f;
    if (call.normalize) {
      float square = 0.0f;
      for (int i = lane; i < chunking.dim; i += 32) {
        const float x = sums[head * chunking.dim + i];
        square += x * x;
      }
      factor = rsqrtf(warp_sum(square) + kNormEpsilon);
    }
    if (lane == 0) factors[head] = factor;
  }
  __syncthreads();
  float scale = 1.0f;
  if (call.scales != nullptr) {
    float most = 0.0f;
    for (int i = thread; i < width; i += THREADS) most = fmaxf(most, fabsf(sums[i] * factors[i / chunking.dim]));
    most = warp_max(most);
    if (lane == 0) largest[warp] = most;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; ++i) most = fmaxf(most, largest[i]);
    scale = scale_of(most, call.routing_type);
    if (thread == 0) call.scales[chunk] = scale;
  }
  for (int i = thread; i < width; i += THREADS) {
    const float x = sums[i] * factors[i / chunking.dim];
    store_float(call.routing, chunk * width + i, call.routing_type, call.scales == nullptr ? x : x / scale);
  }
}

// Zeros for packed tokens before the first document and behind the last: `share` of `kOutside` blocks.
template <typename T, int VEC, int THREADS>
__device__ __forceinline__ void zero_outside(
    const TokenStates& states, const Chunking& chunking, int vectors, int share) {
  if (!states.packed) return;
  const int64_t before = chunking.token_offsets[0], end = chunking.token_offsets[chunking.documents];
  Numbers<T, VEC> zeros;
  zeros.word = {};
  for (int64_t i = share; i < before + chunking.tokens - end; i += kOutside) {
    T* row = static_cast<T*>(const_cast<void*>(states.data)) + (i < before ? i : end + i - before) * states.token_stride;
    for (int vector = static_cast<int>(threadIdx.x); vector < vectors; vector += THREADS) {
      const int head = vector * VEC / chunking.dim;
      T* column = row + head * states.head_stride + (vector * VEC - head * chunking.dim);
      *reinterpret_cast<typename Raw<sizeof(T) * VEC>::type*>(column) = zeros.word;
    }
  }
}

// One block per (chunk, tensor): the gradient of the chunk's mean, written to all its tokens. Where the forward
// normalized, the mean of the router keys is taken again; those blocks, which read before they write, start first.
template <typename T, int VEC, int THREADS, int UNROLL>
__global__ void __launch_bounds__(THREADS, resident(THREADS, UNROLL))
    pool_backward_kernel(const PoolBackward call, int vectors, int lines) {
  using Word = typename Raw<sizeof(T) * VEC>::type;
  MSA_HF_SHARED(shared, 16);
  const Chunking& chunking = call.chunking;
  const int width = vectors * VEC, thread = static_cast<int>(threadIdx.x);
  float* gradient = reinterpret_cast<float*>(shared);  // [width]
  float* sums = gradient + width;  // [lines][width]; line 0 becomes the mean
  const unsigned routing_blocks = static_cast<unsigned>(chunking.chunks) + kOutside;
  const bool content = blockIdx.x >= routing_blocks;
  const unsigned content_block = blockIdx.x - routing_blocks;
  const int64_t chunk = content ? content_block / kContent : blockIdx.x;
  const int part = content ? static_cast<int>(content_block % kContent) : kContent;
  const TokenStates& states = part_of(call.grad_keys, call.grad_values, call.grad_router_keys, part);
  if (chunk >= chunking.chunks) {
    zero_outside<T, VEC, THREADS>(states, chunking, vectors, static_cast<int>(chunk - chunking.chunks));
    return;
  }
  const ChunkPlace place = find_chunk(chunking, [&] { return chunk; });
  if (place.rows <= 0) return;  // the same for all threads of the block

  const float rows = static_cast<float>(place.rows);
  const void* source = content ? call.grad_content : call.grad_routing;
  const Type type = content ? call.grad_content_type : call.grad_routing_type;
  const int64_t start = (content ? chunk * kContent + part : chunk) * width;
  for (int i = thread; i < width; i += THREADS) gradient[i] = load_as_float(source, start + i, type);
  if (!content && call.normalize) {
    sum_rows<T, VEC, THREADS, UNROLL>(call.router_keys, chunking, place, vectors, lines, sums);
    __syncthreads();
    for (int i = thread; i < width; i += THREADS) {
      float mean = 0.0f;
      for (int line = 0; line < lines; ++line) mean += sums[line * width + i];
      sums[i] = mean / rows;
    }
    __syncthreads();
    // y = x r, r = (|x|^2 + epsilon)^(-1/2):  dx = r (dy - y <y, dy>).
    const int lane = thread % 32;
    for (int head = thread / 32; head < chunking.groups; head += THREADS / 32) {
      float* dy = gradient + head * chunking.dim;
      const float* x = sums + head * chunking.dim;
      float square = 0.0f, along = 0.0f;
      for (int i = lane; i < chunking.dim; i += 32) {
        square += x[i] * x[i];
        along += x[i] * dy[i];
      }
      const float r = rsqrtf(warp_sum(square) + kNormEpsilon);
      along = warp_sum(along) * r;
      for (int i = lane; i < chunking.dim; i += 32) dy[i] = r * (dy[i] - x[i] * r * along);
    }
  }
  __syncthreads();

  const int line = vectors >= THREADS ? 0 : thread / vectors;
  if (line >= lines) return;
  T* out = static_cast<T*>(const_cast<void*>(states.data)) + first_element(states, place);
  for (int vector = vectors >= THREADS ? thread : thread % vectors; vector < vectors; vector += THREADS) {
    const int head = vector * VEC / chunking.dim;
    T* column = out + head * states.head_stride + (vector * VEC - head * chunking.dim);
    float each[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) each[i] = gradient[vector * VEC + i];
    divide(each, rows);
    Numbers<T, VEC> numbers;
#pragma unroll
    for (int i = 0; i < VEC; ++i) numbers.values[i] = from_float<T>(each[i]);
    for (int row = line; row < place.rows; row += lines) {
      *reinterpret_cast<Word*>(column + row * states.token_stride) = numbers.word;
    }
  }
}

// Chunks of THREADS documents at a time: a scan within the block, carried on from one round to the next.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) chunk_offsets_kernel(const Chunking chunking, int64_t* chunk_offsets) {
  MSA_HF_SHARED(shared, 16);
  const int64_t documents = chunking.documents;
  int64_t* totals = reinterpret_cast<int64_t*>(shared);  // [THREADS / 32]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int64_t before = 0;
  if (thread == 0) chunk_offsets[0] = 0;
  for (int64_t base = 0; base < documents; base += THREADS) {
    const int64_t document = base + thread;
    int64_t sum = 0;
    if (document < documents) {
      sum = chunks_of(chunking.token_offsets[document + 1] - chunking.token_offsets[document], chunking.chunk_size);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kWarp, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    int64_t all = 0;
    for (int i = 0; i < THREADS / 32; ++i) {
      if (i < warp) sum += totals[i];
      all += totals[i];
    }
    if (document < documents) chunk_offsets[document + 1] = before + sum;
    before += all;
    __syncthreads();
  }
}

// 16 bytes at a time where every row of every head starts on such a border.
bool is_wide(const TokenStates& states, int bytes, const Chunking& chunking) {
  const int64_t numbers = 16 / bytes;
  const bool aligned = fits_words(states.data, 16) && chunking.dim % numbers == 0;
  const bool strided = states.token_stride % numbers == 0 && states.head_stride % numbers == 0;
  return aligned && strided && (states.packed || states.document_stride % numbers == 0);
}

struct Shape {
  int vectors, lines;
  size_t shared;
};

Shape shape_of(const Chunking& chunking, int vec, int threads) {
  const int width = chunking.groups * chunking.dim, vectors = width / vec;
  // More lines than rows of a chunk would only add zeros.
  const int lines = std::max(1, std::min(threads / std::max(vectors, 1), chunking.chunk_size));
  const size_t floats = static_cast<size_t>(lines) * width + chunking.groups + threads / 32;
  return {vectors, lines, floats * sizeof(float)};
}

// Why this cannot be launched, or null.
const char* refusal(const Chunking& chunking) {
  if (chunking.documents < 0 || chunking.chunks < 0) return "a negative number of documents or chunks";
  if (chunking.chunks >= (int64_t{1} << 31) / kParts - kOutside) return "too many chunks for one launch";
  if (chunking.chunk_size <= 0) return "chunks of no tokens";
  if (chunking.groups <= 0 || chunking.dim <= 0) return "states without heads or numbers";
  return nullptr;
}

// Whether pool_columns_kernel can be taken, of wide states.
bool are_columns(const PoolForward& call, int vec, int threads) {
  const Chunking& chunking = call.chunking;
  const int width = chunking.groups * chunking.dim, covered = threads * vec;
  const bool whole = width % covered == 0 && 32 * vec % chunking.dim == 0 && (!call.scales || width == covered);
  const bool counts = chunking.chunks * kParts < (int64_t{1} << 31) / (width / covered + 1);
  return whole && counts && fits_words(call.content, 16) && fits_words(call.routing, 16);
}

cudaError_t too_wide(const Chunking& chunking) {
  return refuse(cudaErrorInvalidValue, std::to_string(chunking.groups) + " heads of " + std::to_string(chunking.dim) +
                                           " numbers do not fit in shared memory");
}

}  // namespace

template <typename T, int VEC, int THREADS, int UNROLL>
static cudaError_t launch_pool_forward(const PoolForward& call, cudaStream_t stream) {
  const Shape shape = shape_of(call.chunking, VEC, THREADS);
  if (shape.shared > kMostShared) return too_wide(call.chunking);
  const unsigned blocks = static_cast<unsigned>(call.chunking.chunks * kParts);
  return launch_kernel("pool_forward_kernel", pool_forward_kernel<T, VEC, THREADS, UNROLL>,
                       {blocks, THREADS, shape.shared}, stream, call, shape.vectors, shape.lines);
}

template <typename T, int VEC, int THREADS, int UNROLL, bool AHEAD>
static cudaError_t launch_pool_columns(const PoolForward& call, cudaStream_t stream) {
  const unsigned pieces = static_cast<unsigned>(call.chunking.groups * call.chunking.dim / (THREADS * VEC));
  const unsigned blocks = static_cast<unsigned>(call.chunking.chunks * kParts) * pieces;
  return launch_kernel("pool_columns_kernel", pool_columns_kernel<T, VEC, THREADS, UNROLL, AHEAD>,
                       {blocks, THREADS, (THREADS * VEC + THREADS / 32) * sizeof(float)}, stream, call, pieces);
}

template <typename T, int VEC, int THREADS, int UNROLL>
static cudaError_t launch_pool_backward(const PoolBackward& call, cudaStream_t stream) {
  const Shape shape = shape_of(call.chunking, VEC, THREADS);
  const size_t shared = shape.shared + sizeof(float) * call.chunking.groups * call.chunking.dim;
  if (shared > kMostShared) return too_wide(call.chunking);
  const unsigned blocks = static_cast<unsigned>((call.chunking.chunks + kOutside) * kParts);
  return launch_kernel("pool_backward_kernel", pool_backward_kernel<T, VEC, THREADS, UNROLL>, {blocks, THREADS, shared},
                       stream, call, shape.vectors, shape.lines);
}

template <typename T>
static bool are_wide(std::initializer_list<const TokenStates*> all, const Chunking& chunking) {
  return std::all_of(all.begin(), all.end(), [&](auto* states) { return is_wide(*states, sizeof(T), chunking); });
}

template <typename T>
static cudaError_t forward_of(const PoolForward& call, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(T);
  if (!are_wide<T>({&call.keys, &call.values, &call.router_keys}, call.chunking)) {
    return launch_pool_forward<T, 1, 128, 8>(call, stream);
  }
  return are_columns(call, kVec, 128) ? launch_pool_columns<T, kVec, 128, 8, true>(call, stream)
                                      : launch_pool_forward<T, kVec, 128, 8>(call, stream);
}

template <typename T>
static cudaError_t backward_of(const PoolBackward& call, cudaStream_t stream) {
  const TokenStates& read = call.normalize ? call.router_keys : call.grad_router_keys;
  return are_wide<T>({&read, &call.grad_keys, &call.grad_values, &call.grad_router_keys}, call.chunking)
             ? launch_pool_backward<T, 16 / sizeof(T), 128, 8>(call, stream)
             : launch_pool_backward<T, 1, 128, 8>(call, stream);
}

cudaError_t pool_chunks_forward(const PoolForward& call, cudaStream_t stream) {
  if (const char* why = refusal(call.chunking)) return refuse(cudaErrorInvalidValue, why);
  if (call.chunking.chunks == 0) return cudaSuccess;  // before any pointer is looked at: memory of no bytes has none
  if ((bytes_of(call.routing_type) == 1) != (call.scales != nullptr)) {
    return refuse(cudaErrorInvalidValue, "scales belong to router keys of 8 bits, and only to them");
  }
  if (bytes_of(call.content_type) == 1) return refuse(cudaErrorInvalidValue, "content of 8 bits");
  switch (call.input) {
    case Type::f32:
      return forward_of<float>(call, stream);
    case Type::bf16:
      return forward_of<__nv_bfloat16>(call, stream);
    case Type::f16:
      return forward_of<__half>(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t pool_chunks_backward(const PoolBackward& call, cudaStream_t stream) {
  if (const char* why = refusal(call.chunking)) return refuse(cudaErrorInvalidValue, why);
  // Without chunks only packed tokens of no document get a gradient, zero.
  if (call.chunking.chunks == 0 && !(call.grad_keys.packed && call.chunking.tokens > 0)) return cudaSuccess;
  switch (call.input) {
    case Type::f32:
      return backward_of<float>(call, stream);
    case Type::bf16:
      return backward_of<__nv_bfloat16>(call, stream);
    case Type::f16:
      return backward_of<__half>(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t find_chunk_offsets(
    const int64_t* token_offsets, int64_t* chunk_offsets, int64_t documents, int chunk_size, cudaStream_t stream) {
  if (documents < 0 || chunk_size <= 0) return refuse(cudaErrorInvalidValue, "the sizes of documents and chunks");
  constexpr int kThreads = 1024;
  Chunking chunking;
  chunking.token_offsets = token_offsets;
  chunking.documents = documents;
  chunking.chunk_size = chunk_size;
  return launch_kernel("chunk_offsets_kernel", chunk_offsets_kernel<kThreads>,
                       {dim3(1), kThreads, sizeof(int64_t) * kThreads / 32}, stream, chunking, chunk_offsets);
}

}  // namespace msa_hf
