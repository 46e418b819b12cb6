// route_documents: what is done before and after the scores of chunks, and which kernel takes them.
//
//   scan      which tokens route: a list of columns, every sample's padded to a multiple of 8 by repeating its last token
//             (a maximum does not change), so that eight neighboring columns belong to one sample
//   largest   largest absolute value of every sample's queries, where they are quantized with the keys
//   pack      the columns' queries, in the keys' type: rounded to 8 bits for 8-bit keys (one scale per sample: a relative
//             error of at most 2^-4 per number for e4m3, 1/254 of the largest for int8); for 16-bit keys and queries that
//             hold more, as two terms, whose sum has a relative error of about 2^-17 (bf16) or 2^-22 (f16)
//   score     route_documents_wgmma_kernel.cuh, route_documents_mma.cu, or the plain kernel here -> [samples, chunks]
//   select    largest score of every document and the k best: route_documents_select.cu
// The workspace holds 4 bytes per (sample, chunk), the packed queries, and 4 bytes per sample and 32 documents.

#include "score.cuh"
#include "select.h"

namespace msa_hf::route {

constexpr int kScanThreads = 1024;
constexpr int kPackThreads = 256;

// Columns -------------------------------------------------------------------------------------------------------------

struct Lists {
  int* used;      // [1] columns in use
  int* counts;    // [samples] routing tokens
  int* starts;    // [samples] first column
  int* rows;      // [columns] sample * tokens + token, -1 behind the last
  int* groups;    // [columns / kGroup] sample, -1 behind the last
  float* largest;  // [samples], set to 0
};

// Bits of the eight tokens from `first` on.
__device__ __forceinline__ unsigned eight_tokens(const bool* mask, int first, int tokens) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) bits |= (first + i < tokens && mask[first + i] ? 1u : 0u) << i;
  return bits;
}

__device__ __forceinline__ int warp_prefix(int value, int lane) {  // inclusive
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kWarp, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// One block.
__global__ void __launch_bounds__(kScanThreads)
    scan_kernel(const bool* mask, int samples, int tokens, int columns, const Lists lists) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = kScanThreads / 32;
  for (int sample = warp; sample < samples; sample += warps) {
    int count = 0;
    for (int first = 0; first < tokens; first += 256)
      count += __popc(eight_tokens(mask + int64_t{sample} * tokens, first + lane * 8, tokens));
    count = warp_prefix(count, lane);
    if (lane == 31) lists.counts[sample] = count;
  }
  __syncthreads();
  if (warp == 0) {
    int total = 0;
    for (int first = 0; first < samples; first += 32) {
      const int sample = first + lane;
      const int padded = sample < samples ? (lists.counts[sample] + kGroup - 1) / kGroup * kGroup : 0;
      const int end = total + warp_prefix(padded, lane);
      if (sample < samples) lists.starts[sample] = end - padded;
      total = __shfl_sync(kWarp, end, 31);
    }
    if (lane == 0) *lists.used = total;
  }
  __syncthreads();
  for (int sample = warp; sample < samples; sample += warps) {
    const int start = lists.starts[sample], count = lists.counts[sample];
    int column = start, last = -1;
    for (int first = 0; first < tokens; first += 256) {
      const int token = first + lane * 8;
      const unsigned bits = eight_tokens(mask + int64_t{sample} * tokens, token, tokens);
      const int end = warp_prefix(__popc(bits), lane);
      int to = column + end - __popc(bits);
      for (unsigned rest = bits; rest != 0; rest &= rest - 1) {
        last = sample * tokens + token + __ffs(rest) - 1;
        lists.rows[to++] = last;
      }
      column += __shfl_sync(kWarp, end, 31);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const int other = __shfl_xor_sync(kWarp, last, step);
      last = other > last ? other : last;
    }
    const int padded = (count + kGroup - 1) / kGroup * kGroup;
    if (count + lane < padded) lists.rows[start + count + lane] = last;
    for (int group = lane; group < padded / kGroup; group += 32) lists.groups[start / kGroup + group] = sample;
  }
  const int used = *lists.used;
  for (int column = used + threadIdx.x; column < columns; column += kScanThreads) {
    lists.rows[column] = -1;
    if (column % kGroup == 0) lists.groups[column / kGroup] = -1;
  }
  for (int sample = threadIdx.x; sample < samples; sample += kScanThreads) lists.largest[sample] = 0.0f;
}

// A warp per token.
template <Type QUERY>
__global__ void __launch_bounds__(kPackThreads) largest_kernel(
    const void* queries, const bool* mask, int rows, int tokens, int width, float* largest) {
  const int row = blockIdx.x * (kPackThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows || !mask[row]) return;
  const auto* numbers = static_cast<const typename Number<QUERY>::storage*>(queries) + int64_t{row} * width;
  float most = 0.0f;
  for (int i = lane; i < width; i += 32) most = fmaxf(most, fabsf(Number<QUERY>::decode(numbers[i])));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kWarp, most, step));
  if (lane == 0) atomicMax(reinterpret_cast<unsigned*>(largest + row / tokens), __float_as_uint(most));
}

// A warp per column.
template <Type QUERY, Type PACKED>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const void* queries, const Lists lists, int columns, int width, int terms, void* packed) {
  using To = typename Number<PACKED>::storage;
  const int column = blockIdx.x * (kPackThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (column >= columns) return;
  const int row = lists.rows[column];
  float factor = 1.0f;
  if (is_quantized(PACKED) && row >= 0) {
    const float most = lists.largest[lists.groups[column / kGroup]];
    // As a scale below the smallest normal number would overflow, such queries count as zero.
    factor = most > 1e-30f ? largest_of(PACKED) / most : 0.0f;
  }
  const auto* from = static_cast<const typename Number<QUERY>::storage*>(queries) + int64_t{row} * width;
  To* to = static_cast<To*>(packed) + int64_t{column} * width;
  for (int i = lane; i < width; i += 32) {
    const float value = row >= 0 ? Number<QUERY>::decode(from[i]) * factor : 0.0f;
    const To high = Number<PACKED>::encode(value);
    to[i] = high;
    if (terms == 2) to[int64_t{columns} * width + i] = Number<PACKED>::encode(value - Number<PACKED>::decode(high));
  }
}

// Plain scores --------------------------------------------------------------------------------------------------------

// A warp per chunk, a group of columns at a time.
template <Type TYPE>
__global__ void __launch_bounds__(kPackThreads) score_plain_kernel(const Score p) {
  const int lane = threadIdx.x % 32, warps = kPackThreads / 32;
  const int groups = *p.used / kGroup;
  for (int64_t chunk = int64_t{blockIdx.x} * warps + threadIdx.x / 32; chunk < p.chunks; chunk += int64_t{gridDim.x} * warps) {
    const auto* key = static_cast<const typename Number<TYPE>::storage*>(p.keys) + chunk * p.width;
    const float factor = p.factors == nullptr ? 1.0f : p.factors[chunk];
    float best = lowest<float>();
    for (int group = 0; group < groups; group++) {
      const float* tokens = static_cast<const float*>(p.packed) + int64_t{group} * kGroup * p.width;
      float sums[kGroup] = {};
      for (int i = lane; i < p.width; i += 32) {
        const float number = Number<TYPE>::decode(key[i]);
#pragma unroll
        for (int j = 0; j < kGroup; j++) sums[j] += number * tokens[int64_t{j} * p.width + i];
      }
#pragma unroll
      for (int j = 0; j < kGroup; j++) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sums[j] += __shfl_xor_sync(kWarp, sums[j], step);
        best = max_of(best, sums[j]);
      }
      const int sample = p.groups[group];
      if (group + 1 == groups || p.groups[group + 1] != sample) {
        if (lane == 0) p.sink.scores[sample * p.sink.pitch + chunk] = best * factor;
        best = lowest<float>();
      }
    }
  }
}

template <Type TYPE>
cudaError_t score_plain(const Score& score, cudaStream_t stream) {
  const int64_t warps = kPackThreads / 32, blocks = (score.chunks + warps - 1) / warps;
  const dim3 grid(static_cast<unsigned>(blocks < 65536 ? blocks : 65536));
  return launch_kernel("score_plain_kernel", score_plain_kernel<TYPE>, {grid, kPackThreads}, stream, score);
}

// The whole call ------------------------------------------------------------------------------------------------------

int shape_count() { return kShapeCount; }
Shape shape_at(int index) { return kShapes[index]; }

struct Machine {
  int capability = 0;  // 90 for 9.0
  int64_t shared = 0;  // bytes that a block may have
};

static Machine machine() {
#ifdef MSA_HF_EMULATE
  return {90, emulated::shared_limit};
#else
  int device = 0, major = 0, minor = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return {major * 10 + minor, shared};
#endif
}

// What was compiled for this machine: {wgmma, mma}. Asked once per type.
struct Compiled {
  bool wgmma, mma;
};
template <Type TYPE>
static const Compiled& compiled() {
  static const Compiled answer{wgmma_compiled<TYPE>(), mma_compiled<TYPE>()};
  return answer;
}
static Compiled compiled(Type type) {
  switch (type) {
    case Type::bf16:
      return compiled<Type::bf16>();
    case Type::f16:
      return compiled<Type::f16>();
    case Type::e4m3:
      return compiled<Type::e4m3>();
    case Type::s8:
      return compiled<Type::s8>();
    default:
      return {false, false};
  }
}

static int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The shape for so many columns: resident where they fit beside enough stages, else the tiles that waste least. -1: none.
// `many_keys`: prefer tiles of many keys to those of many columns. As measured on an H200 for 1.56M keys of 1024 numbers,
// whole calls in ms:
//     columns          keys   128x256  256x128  128x192
//     1 x 256          bf16   1.31     1.53     2.06       e4m3  0.85  0.86  1.32       s8  0.70  0.75  1.07
//     1 x 1024         bf16   4.90     6.91     5.62       e4m3  2.65  3.04  3.18       s8  2.37  2.59  2.82
//     16 x 32          bf16   3.20     3.60     3.79       e4m3  2.20  1.99  2.42       s8  2.06  1.85  2.25
// Products of 8-bit keys take half the time, so that writing the scores of many samples counts: more keys a tile, then.
static int best_shape(int64_t columns, int64_t width_bytes, int terms, int64_t shared, bool many_keys) {
  for (int i = 0; i < kShapesBuilt; i++) {
    if (kShapes[i].resident && columns <= kShapes[i].columns && stages_of(kShapes[i], width_bytes, terms, shared) >= 4)
      return i;
  }
  int best = -1;
  double least = 0;
  for (int i = 0; i < kShapesBuilt; i++) {
    if (kShapes[i].resident || stages_of(kShapes[i], width_bytes, terms, shared) < 2) continue;
    // Narrow tiles read more of the keys and tokens for each product.
    const int side = many_keys ? kShapes[i].chunks : kShapes[i].columns;
    const double cost = static_cast<double>(round_up(columns, kShapes[i].columns)) * (1.0 + 16.0 / side);
    if (best < 0 || cost < least) {
      best = i;
      least = cost;
    }
  }
  return best;
}

struct Places {
  size_t used, counts, starts, rows, groups, largest, best, packed, scores, end;
  int64_t pitch, document_groups, group_pitch;
  bool long_documents;
};

static Places places_of(const Call& call, const Plan& plan) {
  Places at = {};
  size_t next = 0;
  const auto take = [&next](int64_t bytes) {
    const size_t place = next;
    next += round_up(bytes, 256);
    return place;
  };
  at.pitch = round_up(call.chunks, 32);
  at.long_documents = call.documents > 0 && call.chunks / call.documents >= kLongDocuments;
  at.document_groups = at.long_documents ? call.documents : round_up(call.documents, kGroupDocuments) / kGroupDocuments;
  at.group_pitch = round_up(at.document_groups, 32);
  const int64_t number = plan.path == Path::plain ? 4 : bytes_of(call.key_type);
  at.used = take(4);
  at.counts = take(call.samples * 4);
  at.starts = take(call.samples * 4);
  at.rows = take(plan.columns * 4);
  at.groups = take(plan.columns / kGroup * 4);
  at.largest = take(call.samples * 4);
  at.best = take(call.samples * at.group_pitch * 4);
  at.packed = take(plan.terms * plan.columns * call.width * number);
  at.scores = take(call.samples * at.pitch * 4);
  at.end = next;
  return at;
}

Plan plan(const Call& call, Choice choice) {
  Plan result;
  const auto refuse = [&result](const char* why) {
    result.error = why;
    return result;
  };
  constexpr int64_t LIMIT = int64_t{1} << 31;
  if (call.samples > 65535) return refuse("more than 65535 samples");
  if (call.samples * round_up(call.tokens, kGroup) >= LIMIT / 2) return refuse("more than 2^30 query tokens");
  if (call.chunks >= LIMIT - 4096 || call.documents >= LIMIT) return refuse("more than 2^31 chunks or documents");
  if (call.width < 1 || call.width >= LIMIT / 4) return refuse("the width of the keys");
  if (is_quantized(call.key_type) != (call.scales != nullptr)) return refuse("scales belong to 8-bit keys");
  if (is_quantized(call.query_type)) return refuse("queries must be float32, bfloat16 or float16");

  const Machine here = machine();
  const int64_t columns = call.samples * round_up(call.tokens, kGroup) + (call.tokens == 0 ? kGroup : 0);
  const int64_t width_bytes = call.width * bytes_of(call.key_type);
  // 16-bit keys take queries that hold more than they do in two terms.
  const bool finer = call.query_type == Type::f32 || (call.query_type == Type::f16 && call.key_type == Type::bf16);
  const int terms = finer && (call.key_type == Type::bf16 || call.key_type == Type::f16) ? 2 : 1;

  const char* no_tensor_cores = nullptr;
  if (call.key_type == Type::f32)
    no_tensor_cores = "float32 keys are scored without tensor cores";
  else if (width_bytes % 16 != 0)
    no_tensor_cores = "rows of keys are not a multiple of 16 bytes";
  else if (reinterpret_cast<uintptr_t>(call.keys) % 16 != 0)
    no_tensor_cores = "keys do not begin at a multiple of 16 bytes";
  const char* no_wgmma = no_tensor_cores;
  int shape = -1;
  const bool many_keys = is_quantized(call.key_type) && call.samples > 1 && call.tokens < 256;
  if (no_wgmma == nullptr && (here.capability != 90 || !compiled(call.key_type).wgmma))
    no_wgmma = "needs a device of compute capability 9.0 and code compiled for sm_90a";
  if (no_wgmma == nullptr) {
    shape = choice.shape >= 0 ? choice.shape : best_shape(columns, width_bytes, terms, here.shared, many_keys);
    if (shape < 0 || shape >= kShapeCount)
      no_wgmma = "no such shape";
    else if (kShapes[shape].resident && columns > kShapes[shape].columns)
      no_wgmma = "more routing tokens than stay in shared memory";
    else if (stages_of(kShapes[shape], width_bytes, terms, here.shared) < 2)
      no_wgmma = "the width of the keys: tokens do not fit in shared memory";
  }
  const char* no_mma = no_tensor_cores;
  if (no_mma == nullptr && (here.capability < (call.key_type == Type::e4m3 ? 89 : 80) || !compiled(call.key_type).mma))
    no_mma = "needs a device of compute capability 8.0 and code compiled for it; for float8 keys 8.9";

  result.path = choice.path != Path::automatic ? choice.path
                : no_wgmma == nullptr          ? Path::wgmma
                : no_mma == nullptr            ? Path::mma
                                               : Path::plain;
  if (result.path == Path::wgmma && no_wgmma != nullptr) return refuse(no_wgmma);
  if (result.path == Path::mma && no_mma != nullptr) return refuse(no_mma);
  result.shape = result.path == Path::wgmma ? shape : -1;
  result.terms = result.path == Path::plain ? 1 : terms;
  const int tile = result.path == Path::wgmma ? kShapes[shape].columns
                   : result.path == Path::mma ? kMmaColumns[columns > kMmaColumns[0]]
                                              : kGroup;
  result.columns = round_up(columns, tile);
  result.workspace = places_of(call, result).end;
  return result;
}

template <Type QUERY, Type PACKED>
static cudaError_t launch_pack(const Call& call, const Plan& plan, const Lists& lists, void* packed, cudaStream_t stream) {
  const int warps = kPackThreads / 32;
  if (is_quantized(PACKED)) {
    const int64_t rows = call.samples * call.tokens;
    const cudaError_t error =
        launch_kernel("largest_kernel", largest_kernel<QUERY>,
                      {dim3(static_cast<unsigned>((rows + warps - 1) / warps)), kPackThreads}, stream, call.queries, call.mask, static_cast<int>(rows), static_cast<int>(call.tokens), static_cast<int>(call.width),
               lists.largest);
    if (error != cudaSuccess) return error;
  }
  return launch_kernel("pack_kernel", pack_kernel<QUERY, PACKED>,
                       {dim3(static_cast<unsigned>((plan.columns + warps - 1) / warps)), kPackThreads}, stream, call.queries, lists, static_cast<int>(plan.columns), static_cast<int>(call.width), plan.terms,
                packed);
}

template <Type QUERY>
static cudaError_t launch_pack(const Call& call, const Plan& plan, const Lists& lists, void* packed, cudaStream_t stream) {
  switch (plan.path == Path::plain ? Type::f32 : call.key_type) {
    case Type::f32:
      return launch_pack<QUERY, Type::f32>(call, plan, lists, packed, stream);
    case Type::bf16:
      return launch_pack<QUERY, Type::bf16>(call, plan, lists, packed, stream);
    case Type::f16:
      return launch_pack<QUERY, Type::f16>(call, plan, lists, packed, stream);
    case Type::e4m3:
      return launch_pack<QUERY, Type::e4m3>(call, plan, lists, packed, stream);
    default:
      return launch_pack<QUERY, Type::s8>(call, plan, lists, packed, stream);
  }
}

template <Type KEY>
static cudaError_t launch_score(const Score& score, const Plan& plan, cudaStream_t stream) {
  if constexpr (KEY != Type::f32) {
    if (plan.path == Path::wgmma) return score_wgmma<KEY>(score, plan.shape, stream);
    if (plan.path == Path::mma) return score_mma<KEY>(score, plan.columns <= kMmaColumns[0] ? kMmaColumns[0] : kMmaColumns[1], stream);
  }
  return score_plain<KEY>(score, stream);
}

cudaError_t route_documents(
    const Call& call, const Plan& plan, void* workspace, cudaStream_t stream, const cudaEvent_t* marks) {
  if (plan.error != nullptr) return cudaErrorInvalidValue;
  if (call.samples == 0 || call.k == 0) return cudaSuccess;
  const Places at = places_of(call, plan);
  const auto place = [workspace](size_t offset) { return static_cast<void*>(static_cast<char*>(workspace) + offset); };

  Lists lists;
  lists.used = static_cast<int*>(place(at.used));
  lists.counts = static_cast<int*>(place(at.counts));
  lists.starts = static_cast<int*>(place(at.starts));
  lists.rows = static_cast<int*>(place(at.rows));
  lists.groups = static_cast<int*>(place(at.groups));
  lists.largest = static_cast<float*>(place(at.largest));
  cudaError_t error =
      launch_kernel("scan_kernel", scan_kernel, {dim3(1), kScanThreads}, stream, call.mask, static_cast<int>(call.samples),
             static_cast<int>(call.tokens), static_cast<int>(plan.columns), lists);
  if (error != cudaSuccess) return error;

  if (call.chunks > 0 && call.tokens > 0) {
    void* packed = place(at.packed);
    error = call.query_type == Type::f32    ? launch_pack<Type::f32>(call, plan, lists, packed, stream)
            : call.query_type == Type::bf16 ? launch_pack<Type::bf16>(call, plan, lists, packed, stream)
                                            : launch_pack<Type::f16>(call, plan, lists, packed, stream);
    if (error == cudaSuccess && marks != nullptr) error = cudaEventRecord(marks[0], stream);
    if (error != cudaSuccess) return error;
    Score score = {};
    score.keys = call.keys;
    score.packed = packed;
    score.used = lists.used;
    score.groups = lists.groups;
    score.factors = call.scales;
    score.sink.scores = static_cast<float*>(place(at.scores));
    score.sink.pitch = at.pitch;
    const bool quantized = is_quantized(call.key_type) && plan.path != Path::plain;
    score.sink.largest = quantized ? lists.largest : nullptr;
    score.sink.inverse_largest = 1.0f / largest_of(call.key_type);
    score.chunks = call.chunks;
    score.width = static_cast<int>(call.width);
    score.columns = static_cast<int>(plan.columns);
    score.terms = plan.terms;
    if (plan.path == Path::wgmma)
      score.stages = stages_of(kShapes[plan.shape], call.width * bytes_of(call.key_type), plan.terms, machine().shared);
    switch (call.key_type) {
      case Type::f32:
        error = launch_score<Type::f32>(score, plan, stream);
        break;
      case Type::bf16:
        error = launch_score<Type::bf16>(score, plan, stream);
        break;
      case Type::f16:
        error = launch_score<Type::f16>(score, plan, stream);
        break;
      case Type::e4m3:
        error = launch_score<Type::e4m3>(score, plan, stream);
        break;
      default:
        error = launch_score<Type::s8>(score, plan, stream);
    }
    if (error == cudaSuccess && marks != nullptr) error = cudaEventRecord(marks[1], stream);
    if (error != cudaSuccess) return error;
  }

  Select select = {};
  select.scores = static_cast<float*>(place(at.scores));
  select.pitch = at.pitch;
  select.offsets = call.offsets;
  select.alive = call.alive;
  select.counts = lists.counts;
  select.samples = call.samples;
  select.chunks = call.chunks;
  select.documents = call.documents;
  select.k = call.k;
  select.long_documents = at.long_documents;
  select.groups = at.document_groups;
  select.group_pitch = at.group_pitch;
  select.best = static_cast<uint32_t*>(place(at.best));
  select.chosen = call.chosen;
  select.chosen_scores = call.chosen_scores;
  return launch_select(select, stream);
}

}  // namespace msa_hf::route
