// From the scores of chunks to the k best documents, in two kernels.
//
//   reduce  reads the scores once. A warp takes groups of 32 documents and writes one number per group and sample, the
//           largest score of its documents. No barrier of the block: warps work by themselves
//   choose  one block per sample: the k best documents lie in the k groups with the largest numbers (equal ones: the
//           first), so it finds these, takes the scores of their documents again, and finds the best of them. k beyond
//           kPerRound takes rounds: what is left of a group replaces its number
// Where documents are long on average, a group is one document, and several blocks may reduce it.
//
// What a document's chunks add up to is put into the place of its first chunk's score where there are many of them, so that
// choose need not read them again. That changes no maximum, and nobody else reads that place.
//
// How long it must take (H200, C = 1,562,500): reduce reads 6.3 MB of scores and 6.3 MB of offsets (781,250 documents; 0.8
// MB for 97,656) out of L2, about 4 us and 2 us to launch; 16 samples read 100 MB of scores from memory, 24 us, and the
// offsets twice. choose waits about six times for L2 (0.7 us) and 50 times for a barrier (0.03 us) and reads 98 KB: 8 us.

#include "best.cuh"
#include "select.h"

namespace msa_hf::route {

constexpr int kReduceThreads = 256, kReduceWarps = kReduceThreads / 32;
constexpr int kTile = 1024;                       // chunks that a warp holds
constexpr int kPaddedTile = kTile + kTile / 32;   // strides of any power of two meet different banks
#ifdef MSA_HF_EMULATE
constexpr int64_t kWarpsWanted = 4;  // so that tests see several samples for a warp
#else
constexpr int64_t kWarpsWanted = 2 * 32 * 132;  // two rounds: a multiprocessor holds 32
#endif
constexpr int kSerial = 32;                       // longer documents are taken by all lanes, and their maximum is kept

__device__ __forceinline__ uint32_t warp_largest(uint32_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_max_sync(kWarp, value);
#else
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kWarp, value, step);
    value = other > value ? other : value;
  }
  return value;
#endif
}
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = max_of(value, __shfl_xor_sync(kWarp, value, step));
  return value;
}

// A warp takes GROUPS groups of neighboring documents, for `samples_each` samples one after the other.
template <int GROUPS>
__global__ void __launch_bounds__(kReduceThreads, 4) reduce_kernel(const Select p, int samples_each) {
  MSA_HF_SHARED(shared, 1024);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* tile = reinterpret_cast<float*>(shared) + warp * kPaddedTile;
  const int64_t group = (int64_t{blockIdx.x} * kReduceWarps + warp) * GROUPS, first = group * kGroupDocuments;
  if (first >= p.documents) return;
  const int64_t next = first + GROUPS * kGroupDocuments < p.documents ? first + GROUPS * kGroupDocuments : p.documents;
  const int64_t origin = p.offsets[first] / 4 * 4;  // float4 are read
  const int length = static_cast<int>(p.offsets[next] - origin);
  int from[GROUPS], to[GROUPS];  // dead documents and those behind the last are empty
#pragma unroll
  for (int r = 0; r < GROUPS; r++) {
    const int64_t document = first + r * kGroupDocuments + lane;
    const bool real = document < next;
    from[r] = real ? static_cast<int>(p.offsets[document] - origin) : 0;
    to[r] = real ? static_cast<int>(p.offsets[document + 1] - origin) : 0;
    if (real && p.alive != nullptr && !p.alive[document]) to[r] = from[r];
  }

  const int64_t begin = int64_t{blockIdx.y} * samples_each;
  const int64_t end = begin + samples_each < p.samples ? begin + samples_each : p.samples;
  for (int64_t sample = begin; sample < end; sample++) {
    if (p.counts[sample] == 0) continue;
    float* scores = p.scores + sample * p.pitch + origin;
    float value[GROUPS];
#pragma unroll
    for (int r = 0; r < GROUPS; r++) value[r] = lowest<float>();
    for (int start = 0; start < length; start += kTile) {
      const int count = length - start < kTile ? length - start : kTile;
      __syncwarp();
      for (int base = lane * 4; base < count; base += 512) {
        float4 four[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
          if (base + 128 * j < count) four[j] = *reinterpret_cast<const float4*>(scores + start + base + 128 * j);
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int i = base + 128 * j;
          if (i >= count) continue;
          float* place = tile + i + i / 32;
          place[0] = four[j].x, place[1] = four[j].y, place[2] = four[j].z, place[3] = four[j].w;
        }
      }
      __syncwarp();
#pragma unroll
      for (int r = 0; r < GROUPS; r++) {
        const int low = from[r] > start ? from[r] - start : 0, high = to[r] - start < kTile ? to[r] - start : kTile;
        const bool is_long = high - low > kSerial;
        for (int i = low; !is_long && i < high; i++) value[r] = max_of(value[r], tile[i + i / 32]);
        for (unsigned rest = __ballot_sync(kWarp, is_long); rest != 0; rest &= rest - 1) {  // the warp takes them in turn
          const int owner = __ffs(rest) - 1;
          const int its_low = __shfl_sync(kWarp, low, owner), its_high = __shfl_sync(kWarp, high, owner);
          float part = lowest<float>();
          for (int i = its_low + lane; i < its_high; i += 32) part = max_of(part, tile[i + i / 32]);
          part = warp_max(part);
          if (lane == owner) value[r] = max_of(value[r], part);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < GROUPS; r++) {
      if (to[r] - from[r] > kSerial) scores[from[r]] = value[r];
      const uint32_t largest = warp_largest(value[r] > kNoScore ? ordered(value[r]) : 0);
      if (lane == 0 && group + r < p.groups) p.best[sample * p.group_pitch + group + r] = largest;
    }
  }
}

// A block takes a slice of a document; the results are 0 before.
__global__ void __launch_bounds__(kReduceThreads) reduce_long_kernel(const Select p) {
  const int64_t document = blockIdx.x, sample = blockIdx.y;
  if (p.counts[sample] == 0 || (p.alive != nullptr && !p.alive[document])) return;
  const int64_t begin = p.offsets[document], end = p.offsets[document + 1];
  const float* scores = p.scores + sample * p.pitch;
  const int64_t stride = int64_t{gridDim.z} * kReduceThreads;
  float value = lowest<float>();
  for (int64_t base = begin + int64_t{blockIdx.z} * kReduceThreads + threadIdx.x; base < end; base += 8 * stride) {
    float part[8];
#pragma unroll
    for (int j = 0; j < 8; j++) part[j] = base + j * stride < end ? scores[base + j * stride] : lowest<float>();
#pragma unroll
    for (int j = 0; j < 8; j++) value = max_of(value, part[j]);
  }
  value = warp_max(value);
  if (threadIdx.x % 32 == 0) atomicMax(p.best + sample * p.group_pitch + document, ordered_part(value));
}

__global__ void __launch_bounds__(kBestThreads) choose_kernel(const Select p) {
  MSA_HF_SHARED(shared, 1024);
  auto& found = *reinterpret_cast<BestShared*>(shared);
  auto* groups = reinterpret_cast<uint64_t*>(shared + sizeof(BestShared));  // [kPerRound]
  auto* numbers = groups + kPerRound;                                       // [k of a round, kGroupDocuments]
  const int64_t sample = blockIdx.x;
  int64_t* chosen = p.chosen + sample * p.k;
  float* chosen_scores = p.chosen_scores + sample * p.k;
  uint32_t* best = p.best + sample * p.group_pitch;
  const float* scores = p.scores + sample * p.pitch;
  const bool routes = p.counts[sample] != 0;

  uint64_t bound = ~uint64_t{0};  // only what ranks below may still be chosen
  int64_t done = 0;
  while (routes && done < p.k && bound != 0) {
    const int k = static_cast<int>(p.k - done < kPerRound ? p.k - done : kPerRound);
    find_best(
        [&](const auto& take) {
          constexpr int AT_ONCE = 6;
          for (int64_t base = 4 * threadIdx.x; base < p.groups; base += 4 * AT_ONCE * kBestThreads) {
            uint4 four[AT_ONCE];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
              const int64_t i = base + 4 * j * kBestThreads;
              four[j] = i < p.groups ? __ldcg(reinterpret_cast<const uint4*>(best + i)) : uint4{};
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
              const int64_t i = base + 4 * j * kBestThreads;
              const uint32_t values[4] = {four[j].x, four[j].y, four[j].z, four[j].w};
#pragma unroll
              for (int l = 0; l < 4; l++)
                if (i + l < p.groups && can_be_chosen(values[l])) take(ranked(values[l], i + l));
            }
          }
        },
        k, found);

    if (p.long_documents) {  // groups are documents
      for (int i = threadIdx.x; i < k; i += kBestThreads)
        if (found.best[i] != 0) best[document_of(found.best[i])] = 0;
    } else {
      for (int i = threadIdx.x; i < k; i += kBestThreads) groups[i] = found.best[i];
      __syncthreads();
      const int slots = k * kGroupDocuments;
      for (int base = threadIdx.x; base < slots; base += 2 * kBestThreads) {  // two at once
        int64_t from[2] = {}, documents[2] = {};
        int length[2] = {};
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int slot = base + j * kBestThreads;
          const uint64_t group = slot < slots ? groups[slot / kGroupDocuments] : 0;
          documents[j] = document_of(group) * kGroupDocuments + slot % kGroupDocuments;
          if (group != 0 && documents[j] < p.documents && (p.alive == nullptr || p.alive[documents[j]])) {
            from[j] = p.offsets[documents[j]];
            const int64_t all = p.offsets[documents[j] + 1] - from[j];
            length[j] = static_cast<int>(all > kSerial ? 1 : all);  // its maximum stands in the first place
          }
        }
        float value[2] = {lowest<float>(), lowest<float>()};
        for (int i = 0; i < length[0] || i < length[1]; i += 4) {
          float part[2][4];
#pragma unroll
          for (int j = 0; j < 2; j++)
#pragma unroll
            for (int l = 0; l < 4; l++) part[j][l] = i + l < length[j] ? scores[from[j] + i + l] : lowest<float>();
#pragma unroll
          for (int j = 0; j < 2; j++)
#pragma unroll
            for (int l = 0; l < 4; l++) value[j] = max_of(value[j], part[j][l]);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const uint64_t number = value[j] > kNoScore ? ranked(ordered(value[j]), documents[j]) : 0;
          if (base + j * kBestThreads < slots) numbers[base + j * kBestThreads] = number < bound ? number : 0;
        }
      }
      __syncthreads();
      find_best(
          [&](const auto& take) {
            for (int slot = threadIdx.x; slot < slots; slot += kBestThreads)
              if (numbers[slot] != 0) take(numbers[slot]);
          },
          k, found);
      if (done + k < p.k) {  // what is left of these groups
        const uint64_t last = found.best[k - 1];
        for (int i = threadIdx.x / 32; i < k; i += kBestThreads / 32) {
          const uint64_t number = numbers[i * kGroupDocuments + threadIdx.x % 32];
          const uint32_t largest = warp_largest(number < last ? static_cast<uint32_t>(number >> 32) : 0);
          if (threadIdx.x % 32 == 0 && groups[i] != 0) best[document_of(groups[i])] = largest;
        }
      }
    }
    for (int i = threadIdx.x; i < k; i += kBestThreads)
      write_chosen(found.best[i], chosen + done + i, chosen_scores + done + i);
    bound = found.best[k - 1];
    done += k;
    __syncthreads();
  }
  for (int64_t i = done + threadIdx.x; i < p.k; i += kBestThreads) write_chosen(0, chosen + i, chosen_scores + i);
}

cudaError_t launch_select(const Select& select, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  const auto whole = [](int64_t value, int64_t by) { return (value + by - 1) / by; };
  if (select.documents > 0 && select.long_documents) {
    const int64_t blocks = select.documents * select.samples, slices = whole(2048, blocks);
    error = cudaMemsetAsync(select.best, 0, select.samples * select.group_pitch * 4, stream);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(select.documents), static_cast<unsigned>(select.samples),
                    static_cast<unsigned>(slices));
    error = launch_kernel("reduce_long_kernel", reduce_long_kernel, {grid, kReduceThreads}, stream, select);
  } else if (select.documents > 0) {
    // About 500 chunks for a warp; it takes several samples where there are warps enough.
    const bool short_documents = select.chunks / select.documents < 8;
    const int64_t warps = whole(select.groups, short_documents ? 4 : 1);
    const int64_t most = warps * select.samples / kWarpsWanted;
    const int64_t parts = most < 1 ? select.samples : whole(select.samples, most);
    const int64_t samples_each = whole(select.samples, parts);
    const dim3 grid(static_cast<unsigned>(whole(warps, kReduceWarps)), static_cast<unsigned>(whole(select.samples, samples_each)));
    const size_t shared = kReduceWarps * kPaddedTile * 4;
    error = launch_kernel("reduce_kernel", short_documents ? reduce_kernel<4> : reduce_kernel<1>,
                          {grid, kReduceThreads, shared}, stream, select, static_cast<int>(samples_each));
  }
  if (error != cudaSuccess) return error;
  const int64_t per_round = select.k < kPerRound ? select.k : kPerRound;
  const size_t shared = sizeof(BestShared) + (kPerRound + per_round * kGroupDocuments) * 8;
  const dim3 blocks(static_cast<unsigned>(select.samples));
  return launch_kernel("choose_kernel", choose_kernel, {blocks, kBestThreads, shared}, stream, select);
}

}  // namespace msa_hf::route
