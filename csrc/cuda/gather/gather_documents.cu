// gather_documents: the chunks of chosen documents, ragged, into one context per sample.
//
// A block writes some rows of one sample. It first finds, in shared memory, where each of them comes from (documents and
// offsets are read on the device, the grid comes from the upper bound `width`: nothing waits for the host, and the launch
// can be captured), then copies them 16 bytes per thread, several loads in flight each. Content in pinned host memory is
// read over the bus directly, whole rows in one piece.
//
// Bytes per row: 2 * G * D numbers read, as many written.

#include <algorithm>
#include <type_traits>

#include "../common/launch.cuh"
#include "../common/numbers.cuh"
#include "gather_documents.h"

namespace msa_hf {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// Of a row of [2, G, D] numbers, where in [B, G, width, D] they go.
struct Target {
  bool is_value;
  int64_t index;
};

__device__ __forceinline__ Target target_of(const GatherCall& call, int sample, int row, int element) {
  const int size = call.groups * call.dim;
  const bool is_value = element >= size;
  const int within = is_value ? element - size : element;
  const int head = within / call.dim;
  const int64_t line = (static_cast<int64_t>(sample) * call.groups + head) * call.width + row;
  return {is_value, line * call.dim + (within - head * call.dim)};
}

// `VEC` numbers of S, scaled, as T.
template <typename S, typename T, int VEC>
__device__ __forceinline__ void write(
    const GatherCall& call, int sample, int row, int element, const Numbers<S, VEC>& numbers, float scale) {
  const Target target = target_of(call, sample, row, element);
  T* out = static_cast<T*>(target.is_value ? call.values : call.keys) + target.index;
  if constexpr (std::is_same_v<S, T>) {
    using Word = typename Raw<sizeof(S) * VEC>::type;
    *reinterpret_cast<Word*>(out) = numbers.word;
  } else {
    constexpr int kPart = VEC * sizeof(T) > 16 ? 16 / sizeof(T) : VEC;
    using Word = typename Raw<sizeof(T) * kPart>::type;
#pragma unroll
    for (int part = 0; part < VEC / kPart; ++part) {
      Numbers<T, kPart> converted;
#pragma unroll
      for (int i = 0; i < kPart; ++i) {
        const S number = numbers.values[part * kPart + i];
        if constexpr (std::is_same_v<S, uint8_t>) {
          converted.values[i] = from_float<T>(float8_to_float(number) * scale);
        } else {
          converted.values[i] = from_float<T>(to_float(number));
        }
      }
      reinterpret_cast<Word*>(out)[part] = converted.word;
    }
  }
}

// The chosen documents in the order of their rows: first chunk, rows up to and with this document, column. By one block.
__device__ __forceinline__ void lay_out(
    const GatherCall& call, int sample, int64_t* starts, int64_t* ends, int* columns) {
  const int thread = static_cast<int>(threadIdx.x), k = call.k;
  const int64_t* documents = call.documents + static_cast<int64_t>(sample) * k;
  for (int i = thread; i < k; i += kThreads) {
    const int64_t document = documents[i];
    int64_t start = 0, count = 0;
    if (document >= 0 && document < call.num_documents) {
      start = call.offsets[document];
      count = call.offsets[document + 1] - start;
      if (start < 0 || count < 0 || (!call.part && start + count > call.chunks)) count = 0;
    }
    int place = 0;
    for (int j = 0; j < k; ++j) {
      const int64_t other = documents[j];
      place += other < document || (other == document && j < i);
    }
    starts[place] = start;
    ends[place] = count;
    columns[place] = i;
  }
  __syncthreads();
  if (thread < 32) {
    int64_t before = 0;
    for (int base = 0; base < k; base += 32) {
      const int i = base + thread;
      int64_t sum = i < k ? ends[i] : 0;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(kWarp, sum, step);
        if (thread >= step) sum += other;
      }
      if (i < k) ends[i] = before + sum;
      before += __shfl_sync(kWarp, sum, 31);
    }
  }
  __syncthreads();
}

template <typename S, typename T, int VEC>
__global__ void __launch_bounds__(kThreads, 4) gather_kernel(const GatherCall call, int vectors, int rows_per_block) {
  using Word = typename Raw<sizeof(S) * VEC>::type;
  MSA_HF_SHARED(shared, 16);
  const int thread = static_cast<int>(threadIdx.x), k = call.k;
  const int sample = static_cast<int>(blockIdx.y);
  int64_t* starts = reinterpret_cast<int64_t*>(shared);  // [k] first chunk, in order of output
  int64_t* ends = starts + k;  // [k] rows up to and with this document
  int64_t* sources = ends + k;  // [rows_per_block] row of content, -1 for none
  float2* scales = reinterpret_cast<float2*>(sources + rows_per_block);  // [rows_per_block]
  int* columns = reinterpret_cast<int*>(scales + rows_per_block);  // [k] column of `documents`, in order of output

  lay_out(call, sample, starts, ends, columns);

  const int first = static_cast<int>(blockIdx.x) * rows_per_block;
  const int rows = min(rows_per_block, call.width - first);
  const int64_t total = k > 0 ? ends[k - 1] : 0;
  for (int i = thread; i < rows; i += kThreads) {
    const int row = first + i;
    int64_t source = -1;
    int column = 0;
    if (row < total) {
      int low = 0, high = k - 1;  // the first document that ends behind this row
      while (low < high) {
        const int middle = (low + high) / 2;
        if (ends[middle] > row) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      const int64_t before = low > 0 ? ends[low - 1] : 0;
      source = call.staged ? static_cast<int64_t>(sample) * call.width + row : starts[low] + (row - before);
      column = columns[low];
      if (call.part) {
        source -= call.first;
        if (source < 0 || source >= call.chunks) source = -1;
      }
      if (call.scales != nullptr && source >= 0) scales[i] = __ldg(reinterpret_cast<const float2*>(call.scales) + source);
    }
    sources[i] = source;
    const int64_t out = static_cast<int64_t>(sample) * call.width + row;
    call.valid[out] = row < total;
    call.slots[out] = column;
  }
  __syncthreads();

  const Word* content = static_cast<const Word*>(call.content);
  const int units = rows * vectors;
  for (int base = thread; base < units; base += kThreads * kUnroll) {
    Numbers<S, VEC> numbers[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      numbers[u].word = Word{};
      const int unit = base + u * kThreads;
      if (unit < units) {
        const int row = unit / vectors;
        const int64_t source = sources[row];
        if (source >= 0) numbers[u].word = load_once(content + source * vectors + (unit - row * vectors));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int unit = base + u * kThreads;
      if (unit < units) {
        const int row = unit / vectors, element = (unit - row * vectors) * VEC;
        float scale = 1.0f;
        if constexpr (std::is_same_v<S, uint8_t>) {
          // Rows without a source hold zeros; their scales were never written.
          if (sources[row] >= 0) scale = element < call.groups * call.dim ? scales[row].x : scales[row].y;
        }
        write<S, T, VEC>(call, sample, first + row, element, numbers[u], scale);
      }
    }
  }
}

// What the host has to copy for a staged gather: runs [B, k] of (first chunk, chunks), in the order of their rows.
__global__ void __launch_bounds__(kThreads) list_runs_kernel(const GatherCall call, int64_t* runs) {
  MSA_HF_SHARED(shared, 16);
  const int thread = static_cast<int>(threadIdx.x), k = call.k, sample = static_cast<int>(blockIdx.x);
  int64_t* starts = reinterpret_cast<int64_t*>(shared);
  int64_t* ends = starts + k;
  lay_out(call, sample, starts, ends, reinterpret_cast<int*>(ends + k));
  for (int i = thread; i < k; i += kThreads) {
    int64_t* run = runs + (static_cast<int64_t>(sample) * k + i) * 2;
    run[0] = starts[i];
    run[1] = ends[i] - (i > 0 ? ends[i - 1] : 0);
  }
}

template <typename S, typename T, int VEC>
cudaError_t launch(const GatherCall& call, cudaStream_t stream) {
  const int vectors = 2 * call.groups * call.dim / VEC;
  const int rows = std::clamp(kThreads * kUnroll / vectors, 1, std::max(call.width, 1));
  const size_t shared = call.k * (2 * sizeof(int64_t) + sizeof(int)) + rows * (sizeof(int64_t) + sizeof(float2));
  const dim3 blocks((call.width + rows - 1) / rows, call.batch);
  return launch_kernel("gather_kernel", gather_kernel<S, T, VEC>, {blocks, kThreads, shared}, stream, call, vectors, rows);
}

// 16 bytes at a time where heads start on such borders in the source and in the result.
template <typename S, typename T>
cudaError_t launch_widest(const GatherCall& call, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  const bool wide = call.dim % kVec == 0 && fits_words(call.content, 16) && fits_words(call.keys, 16) &&
                    fits_words(call.values, 16);
  return wide ? launch<S, T, kVec>(call, stream) : launch<S, T, 1>(call, stream);
}

template <typename S>
cudaError_t launch_from(const GatherCall& call, cudaStream_t stream) {
  switch (call.output_type) {
    case Type::f32:
      return launch_widest<S, float>(call, stream);
    case Type::bf16:
      return launch_widest<S, __nv_bfloat16>(call, stream);
    case Type::f16:
      return launch_widest<S, __half>(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// Why this cannot be launched, or null.
const char* refusal(const GatherCall& call) {
  if (call.batch < 0 || call.batch > 65535) return "samples beyond 65535";
  if (call.k < 0 || call.k > kMostGathered) return "too many documents per sample";
  if (call.part && (call.staged || call.first < 0)) return "a part of the chunks that is staged, or begins before the first";
  if (call.width < 0 || call.groups <= 0 || call.dim <= 0) return "rows without heads or numbers";
  if (int64_t{2} * call.groups * call.dim > 1 << 24) return "rows of more than 2^24 numbers";
  // Content without chunks has no scales either: memory of no bytes may have no address.
  const bool scaled = call.scales != nullptr, quantized = call.content_type == Type::e4m3;
  if (quantized ? !scaled && call.chunks > 0 : scaled) return "scales belong to float8 content, and only to it";
  return nullptr;
}

}  // namespace

cudaError_t list_runs(const GatherCall& call, int64_t* runs, cudaStream_t stream) {
  if (const char* why = refusal(call)) return refuse(cudaErrorInvalidValue, why);
  if (call.batch == 0 || call.k == 0) return cudaSuccess;
  const size_t shared = call.k * (2 * sizeof(int64_t) + sizeof(int));
  return launch_kernel("list_runs_kernel", list_runs_kernel, {dim3(call.batch), kThreads, shared}, stream, call, runs);
}

cudaError_t gather_documents(const GatherCall& call, cudaStream_t stream) {
  if (const char* why = refusal(call)) return refuse(cudaErrorInvalidValue, why);
  if (call.batch == 0 || call.width == 0) return cudaSuccess;
  switch (call.content_type) {
    case Type::f32:
      return launch_from<float>(call, stream);
    case Type::bf16:
      return launch_from<__nv_bfloat16>(call, stream);
    case Type::f16:
      return launch_from<__half>(call, stream);
    case Type::e4m3:
      return launch_from<uint8_t>(call, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace msa_hf
