// The k best of many numbers, by one block.
//
// A number is a score and what has it (`ranked`), so that no two are equal. The k-th largest of the threads' own largest
// numbers is a lower bound of the k-th largest of all, and only about k numbers reach it: they are gathered, and each
// counts how many are larger. Finding the bound takes a barrier per bit that tells the numbers apart, about twenty.
#pragma once

#include "device.cuh"

namespace msa_hf::route {

constexpr int kBestThreads = 1024;
constexpr int kPerRound = 256;  // of k: more take several rounds
#ifdef MSA_HF_EMULATE
constexpr int kRoom = kPerRound;  // so that tests see what happens where there is none
#else
constexpr int kRoom = 1024;
#endif
constexpr uint32_t kNan = 0xffffffffu;

// Larger scores first, then lower documents. 0 is no number.
__device__ __forceinline__ uint64_t ranked(uint32_t score, int64_t document) {
  return (uint64_t{score} << 32) | (0xffffffffu - static_cast<uint32_t>(document));
}
__device__ __forceinline__ int64_t document_of(uint64_t number) { return 0xffffffffu - static_cast<uint32_t>(number); }
__device__ __forceinline__ bool can_be_chosen(uint32_t score) { return score > ordered(kNoScore) && score != kNan; }
// of a part of a document; NaN is the largest, so that it is not lost beside other parts
__device__ __forceinline__ uint32_t ordered_part(float x) { return x != x ? kNan : ordered(x); }
__device__ __forceinline__ void write_chosen(uint64_t number, int64_t* document, float* score) {
  *document = number == 0 ? -1 : document_of(number);
  *score = number == 0 ? -INFINITY : from_ordered(static_cast<uint32_t>(number >> 32));
}

struct BestShared {
  uint64_t list[kRoom];
  uint64_t best[kPerRound];  // descending, 0 behind the last
  int filled, sum;
};

// The largest number that at least k numbers reach; 1 where there are at most k. `count(x)` is how many reach x, the same
// in all threads.
template <class Count>
__device__ __forceinline__ uint64_t bound_of(int k, const Count& count) {
  if (count(uint64_t{1}) <= k) return 1;
  uint64_t bound = 0;
  for (int bit = 63; bit >= 0; bit--) {
    const uint64_t higher = bound | uint64_t{1} << bit;
    const int reach = count(higher);
    if (reach >= k) bound = higher;
    if (reach == k) break;
  }
  return bound;
}

// `visit(take)` calls take(number) for every number of the calling thread, the same each time. All threads of the block;
// k <= kPerRound. After it, best[0 .. k) is what the name says.
template <class Visit>
__device__ __forceinline__ void find_best(const Visit& visit, int k, BestShared& shared) {
  uint64_t mine = 0;
  visit([&](uint64_t number) { mine = number > mine ? number : mine; });
  uint64_t bound = bound_of(k, [&](uint64_t x) { return __syncthreads_count(mine >= x); });
  const auto gather = [&] {
    if (threadIdx.x == 0) shared.filled = 0;
    __syncthreads();
    if (mine >= bound) {
      visit([&](uint64_t number) {
        if (number < bound) return;
        const int place = atomicAdd(&shared.filled, 1);
        if (place < kRoom) shared.list[place] = number;
      });
    }
    __syncthreads();
  };
  gather();
  if (shared.filled > kRoom) {  // few threads have many of the best: the k-th largest of all numbers, then
    bound = bound_of(k, [&](uint64_t x) {
      int reach = 0;
      visit([&](uint64_t number) { reach += number >= x; });
      __syncthreads();
      if (threadIdx.x == 0) shared.sum = 0;
      __syncthreads();
#pragma unroll
      for (int step = 16; step > 0; step /= 2) reach += __shfl_xor_sync(kWarp, reach, step);
      if (threadIdx.x % 32 == 0) atomicAdd(&shared.sum, reach);
      __syncthreads();
      return shared.sum;
    });
    gather();
  }
  const int filled = shared.filled;
  for (int i = filled + threadIdx.x; i < k; i += kBestThreads) shared.best[i] = 0;
  for (int i = threadIdx.x; i < filled; i += kBestThreads) {
    const uint64_t number = shared.list[i];
    int larger = 0;
#pragma unroll 8
    for (int j = 0; j < filled; j++) larger += shared.list[j] > number;
    if (larger < k) shared.best[larger] = number;
  }
  __syncthreads();
}

}  // namespace msa_hf::route
