// pool_chunks: keys, values and router keys of tokens to the means of chunks, in one pass over the tokens.
//
// One block per (chunk, tensor). Its threads stand side by side along a row of G * D numbers, 16 bytes each; where a row
// is shorter than the block, several rows are read at a time and their sums joined in shared memory. Every thread has
// UNROLL loads in flight. The means then lie in shared memory, where router keys are normalised and quantised.
//
// Bytes per token in 16 bit: 6 * G * D read; per chunk 6 * G * D written (less where router keys are quantised).

#include <algorithm>
#include <cfloat>
#include <initializer_list>
#include <string>

#include "device.cuh"

namespace msa_hf {
namespace {

constexpr int kParts = 3;  // keys, values, router keys
constexpr int kContent = 2;
constexpr int kOutside = 16;
constexpr float kNormEpsilon = 1e-12f;  // inside the root: the gradient at zero is finite
constexpr size_t kMostShared = 96 * 1024;  // every device from sm_80 on has it

// Blocks resident per multiprocessor at least: leaves each thread registers for its loads in flight.
constexpr int resident(int threads, int unroll) { return (unroll <= 8 ? 768 : 384) / threads; }

struct ChunkPlace {
  int64_t document;  // -1 behind the last chunk
  int64_t first;  // token of the document it starts with
  int rows;  // tokens in it
};

__device__ __forceinline__ int64_t chunks_of(const Chunking& chunking, int64_t document) {
  const int64_t tokens = chunking.token_offsets[document + 1] - chunking.token_offsets[document];
  return tokens > 0 ? (tokens + chunking.chunk_size - 1) / chunking.chunk_size : 0;
}

// The whole warp searches.
__device__ __forceinline__ ChunkPlace find_chunk(const Chunking& chunking, int64_t chunk) {
  int64_t document = -1, within = 0;  // the chunk of its document
  if (chunking.chunk_offsets != nullptr) {
    const int64_t passed = warp_count_at_most(chunking.chunk_offsets, chunking.documents + 1, chunk);
    if (passed > 0 && passed <= chunking.documents) {
      document = passed - 1;
      within = chunk - chunking.chunk_offsets[document];
    }
  } else {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int64_t before = 0;
    for (int64_t base = 0; base < chunking.documents; base += 32) {
      const int64_t count = base + lane < chunking.documents ? chunks_of(chunking, base + lane) : 0;
      int64_t sum = count;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(kWholeWarp, sum, step);
        if (lane >= step) sum += other;
      }
      const unsigned behind = __ballot_sync(kWholeWarp, chunk < before + sum);
      if (behind != 0) {
        const int first = __ffs(static_cast<int>(behind)) - 1;
        document = base + first;
        within = chunk - before - __shfl_sync(kWholeWarp, sum - count, first);
        break;
      }
      before += __shfl_sync(kWholeWarp, sum, 31);
    }
  }
  if (document < 0) return {-1, 0, 0};
  const int64_t first = within * chunking.chunk_size;
  const int64_t rows = chunking.token_offsets[document + 1] - chunking.token_offsets[document] - first;
  return {document, first, static_cast<int>(rows < chunking.chunk_size ? rows : chunking.chunk_size)};
}

__device__ __forceinline__ int64_t first_element(
    const TokenStates& states, const Chunking& chunking, const ChunkPlace& place) {
  if (states.packed) return (chunking.token_offsets[place.document] + place.first) * states.token_stride;
  return place.document * states.document_stride + place.first * states.token_stride;
}

__device__ __forceinline__ const TokenStates& part_of(
    const TokenStates& keys, const TokenStates& values, const TokenStates& router_keys, int part) {
  return part == 0 ? keys : part == 1 ? values : router_keys;
}

// Sums of the rows of a chunk, one line of G * D floats per lane group of threads, to sums[lines][G * D].
template <typename T, int VEC, int THREADS, int UNROLL>
__device__ __forceinline__ void sum_rows(
    const TokenStates& states, const Chunking& chunking, const ChunkPlace& place, int vectors, int lines, float* sums) {
  using Word = typename Raw<sizeof(T) * VEC>::type;
  const int thread = static_cast<int>(threadIdx.x);
  const int line = vectors >= THREADS ? 0 : thread / vectors;
  if (line >= lines) return;
  const int width = vectors * VEC;
  const T* chunk = static_cast<const T*>(states.data) + first_element(states, chunking, place);
  for (int vector = vectors >= THREADS ? thread : thread % vectors; vector < vectors; vector += THREADS) {
    const int head = vector * VEC / chunking.dim;
    const T* column = chunk + head * states.head_stride + (vector * VEC - head * chunking.dim);
    float sum[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] = 0.0f;
    for (int base = line; base < place.rows; base += lines * UNROLL) {
      Numbers<T, VEC> numbers[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        // Behind the chunk its last row is read again, from the cache, and not counted.
        const int row = min(base + u * lines, place.rows - 1);
        numbers[u].word = load_once(reinterpret_cast<const Word*>(column + row * states.token_stride));
      }
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        if (base + u * lines < place.rows) {
#pragma unroll
          for (int i = 0; i < VEC; ++i) sum[i] += to_float(numbers[u].values[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums[line * width + vector * VEC + i] = sum[i];
  }
}

template <typename T, int VEC, int THREADS, int UNROLL>
__global__ void __launch_bounds__(THREADS, resident(THREADS, UNROLL))
    pool_forward_kernel(const PoolForward call, int vectors, int lines) {
  MSA_HF_DYNAMIC_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [lines][width]; the means end up in line 0
  const Chunking& chunking = call.chunking;
  const int width = vectors * VEC, thread = static_cast<int>(threadIdx.x);
  float* factors = sums + lines * width;  // [G]
  float* largest = factors + chunking.groups;  // [THREADS / 32]
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) / kParts;
  const int part = static_cast<int>(blockIdx.x) % kParts;

  const ChunkPlace place = find_chunk(chunking, chunk);
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
      store_float(call.content, (chunk * kContent + part) * width + i, call.content_format, mean);
    } else {
      sums[i] = mean;
    }
  }
  if (part < kContent) return;

  const int lane = thread % 32, warp = thread / 32;
  __syncthreads();
  for (int head = warp; head < chunking.groups; head += THREADS / 32) {
    float factor = 1.0f;
    if (call.normalise) {
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
    // A scale below the normal numbers would overflow the division.
    scale = most > 0.0f ? fmaxf(most / (call.routing_format == Format::int8 ? 127.0f : 448.0f), FLT_MIN) : 1.0f;
    if (thread == 0) call.scales[chunk] = scale;
  }
  for (int i = thread; i < width; i += THREADS) {
    const float x = sums[i] * factors[i / chunking.dim];
    store_float(call.routing, chunk * width + i, call.routing_format, call.scales == nullptr ? x : x / scale);
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
// normalised, the mean of the router keys is taken again.
template <typename T, int VEC, int THREADS, int UNROLL>
__global__ void __launch_bounds__(THREADS, resident(THREADS, UNROLL))
    pool_backward_kernel(const PoolBackward call, int vectors, int lines) {
  using Word = typename Raw<sizeof(T) * VEC>::type;
  MSA_HF_DYNAMIC_SHARED(shared);
  const Chunking& chunking = call.chunking;
  const int width = vectors * VEC, thread = static_cast<int>(threadIdx.x);
  float* gradient = reinterpret_cast<float*>(shared);  // [width]
  float* sums = gradient + width;  // [lines][width]; line 0 becomes the mean
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) / kParts;
  const int part = static_cast<int>(blockIdx.x) % kParts;
  const TokenStates& states = part_of(call.grad_keys, call.grad_values, call.grad_router_keys, part);
  if (chunk >= chunking.chunks) {
    zero_outside<T, VEC, THREADS>(states, chunking, vectors, static_cast<int>(chunk - chunking.chunks));
    return;
  }
  const ChunkPlace place = find_chunk(chunking, chunk);
  if (place.rows <= 0) return;  // the same for all threads of the block

  const float rows = static_cast<float>(place.rows);
  const bool content = part < kContent;
  const void* source = content ? call.grad_content : call.grad_routing;
  const Format format = content ? call.grad_content_format : call.grad_routing_format;
  const int64_t start = (content ? chunk * kContent + part : chunk) * width;
  for (int i = thread; i < width; i += THREADS) gradient[i] = load_as_float(source, start + i, format);
  if (!content && call.normalise) {
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
  T* out = static_cast<T*>(const_cast<void*>(states.data)) + first_element(states, chunking, place);
  for (int vector = vectors >= THREADS ? thread : thread % vectors; vector < vectors; vector += THREADS) {
    const int head = vector * VEC / chunking.dim;
    T* column = out + head * states.head_stride + (vector * VEC - head * chunking.dim);
    Numbers<T, VEC> numbers;
#pragma unroll
    for (int i = 0; i < VEC; ++i) numbers.values[i] = from_float<T>(gradient[vector * VEC + i] / rows);
    for (int row = line; row < place.rows; row += lines) {
      *reinterpret_cast<Word*>(column + row * states.token_stride) = numbers.word;
    }
  }
}

// Chunks of THREADS documents at a time: a scan within the block, carried on from one round to the next.
template <int THREADS>
__global__ void __launch_bounds__(THREADS) chunk_offsets_kernel(const Chunking chunking, int64_t* chunk_offsets) {
  MSA_HF_DYNAMIC_SHARED(shared);
  const int64_t documents = chunking.documents;
  int64_t* totals = reinterpret_cast<int64_t*>(shared);  // [THREADS / 32]
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int64_t before = 0;
  if (thread == 0) chunk_offsets[0] = 0;
  for (int64_t base = 0; base < documents; base += THREADS) {
    const int64_t document = base + thread;
    int64_t sum = document < documents ? chunks_of(chunking, document) : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(kWholeWarp, sum, step);
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
  return launch_kernel("pool_forward_kernel", pool_forward_kernel<T, VEC, THREADS, UNROLL>, blocks, THREADS, shape.shared,
                       stream, call, shape.vectors, shape.lines);
}

template <typename T, int VEC, int THREADS, int UNROLL>
static cudaError_t launch_pool_backward(const PoolBackward& call, cudaStream_t stream) {
  const Shape shape = shape_of(call.chunking, VEC, THREADS);
  const size_t shared = shape.shared + sizeof(float) * call.chunking.groups * call.chunking.dim;
  if (shared > kMostShared) return too_wide(call.chunking);
  const unsigned blocks = static_cast<unsigned>((call.chunking.chunks + kOutside) * kParts);
  return launch_kernel("pool_backward_kernel", pool_backward_kernel<T, VEC, THREADS, UNROLL>, blocks, THREADS, shared,
                       stream, call, shape.vectors, shape.lines);
}

template <typename T>
static bool are_wide(std::initializer_list<const TokenStates*> all, const Chunking& chunking) {
  return std::all_of(all.begin(), all.end(), [&](auto* states) { return is_wide(*states, sizeof(T), chunking); });
}

template <typename T>
static cudaError_t forward_of(const PoolForward& call, cudaStream_t stream) {
  return are_wide<T>({&call.keys, &call.values, &call.router_keys}, call.chunking)
             ? launch_pool_forward<T, 16 / sizeof(T), 128, 8>(call, stream)
             : launch_pool_forward<T, 1, 128, 8>(call, stream);
}

template <typename T>
static cudaError_t backward_of(const PoolBackward& call, cudaStream_t stream) {
  const TokenStates& read = call.normalise ? call.router_keys : call.grad_router_keys;
  return are_wide<T>({&read, &call.grad_keys, &call.grad_values, &call.grad_router_keys}, call.chunking)
             ? launch_pool_backward<T, 16 / sizeof(T), 128, 8>(call, stream)
             : launch_pool_backward<T, 1, 128, 8>(call, stream);
}

cudaError_t pool_chunks_forward(const PoolForward& call, cudaStream_t stream) {
  if (const char* why = refusal(call.chunking)) return refuse(cudaErrorInvalidValue, why);
  if (call.chunking.chunks == 0) return cudaSuccess;  // before any pointer is looked at: memory of no bytes has none
  if ((bytes_of(call.routing_format) == 1) != (call.scales != nullptr)) {
    return refuse(cudaErrorInvalidValue, "scales belong to router keys of 8 bits, and only to them");
  }
  if (bytes_of(call.content_format) == 1) return refuse(cudaErrorInvalidValue, "content of 8 bits");
  switch (call.input) {
    case Format::float32:
      return forward_of<float>(call, stream);
    case Format::bfloat16:
      return forward_of<__nv_bfloat16>(call, stream);
    case Format::float16:
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
    case Format::float32:
      return backward_of<float>(call, stream);
    case Format::bfloat16:
      return backward_of<__nv_bfloat16>(call, stream);
    case Format::float16:
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
  return launch_kernel("chunk_offsets_kernel", chunk_offsets_kernel<kThreads>, 1, kThreads,
                       sizeof(int64_t) * kThreads / 32, stream, chunking, chunk_offsets);
}

// Other shapes of the block, for the benchmark: threads * 100 + loads in flight.
cudaError_t pool_chunks_variant(const PoolForward& call, int variant, cudaStream_t stream) {
  switch (variant) {
    case 12804:
      return launch_pool_forward<__nv_bfloat16, 8, 128, 4>(call, stream);
    case 12808:
      return launch_pool_forward<__nv_bfloat16, 8, 128, 8>(call, stream);
    case 12816:
      return launch_pool_forward<__nv_bfloat16, 8, 128, 16>(call, stream);
    case 25604:
      return launch_pool_forward<__nv_bfloat16, 8, 256, 4>(call, stream);
    case 25608:
      return launch_pool_forward<__nv_bfloat16, 8, 256, 8>(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace msa_hf
