// Runs CUDA kernels on the host: every thread a fiber, the blocks of a cluster together, clusters one after the other.
//
// Fibers run in a random order, so that a missing barrier shows; a barrier or an operation of a warp that not all threads
// reach ends the program. Instructions of sm_80 and later are in hopper_on_host.h. Only what these kernels use is here.
// Compile the .cu files with a C++ compiler and -DMSA_HF_EMULATE; CUDA's headers are needed, a GPU and nvcc are not.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibers.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#define MSA_HF_SHARED(name, alignment) unsigned char* name = emulated::now->block->shared.data()

namespace emulated {

inline int multiprocessors = 4;
inline int64_t shared_limit = 232448;
constexpr uint32_t kSharedBase = 1040;  // not aligned, so that kernels must align by themselves
inline std::mt19937 order(7);

[[noreturn]] inline void fail(const char* problem) {
  std::fprintf(stderr, "emulation: %s\n", problem);
  std::exit(3);
}

struct Barrier {  // of threads
  uint32_t generation = 0;
  int arrived = 0, alive = 0;
  int votes[2] = {0, 0};
};
struct Phase {  // mbarrier
  uint32_t number = 0;
  int pending = 0, arrivals = 0;
  int64_t bytes = 0;
  void check() {
    if (pending < 0) fail("more arrivals at an mbarrier than it was made for");
    if (pending == 0 && bytes == 0) {
      number++;
      pending = arrivals;
    }
  }
};
struct Warp {
  Barrier barrier;
  unsigned char slots[2][32][64];
};
struct Block {
  std::vector<unsigned char> shared;
  std::map<uint32_t, Phase> phases;
  std::vector<Warp> warps;
  Barrier barrier;
  Barrier* cluster_barrier = nullptr;
  std::vector<Block>* cluster = nullptr;
  uint32_t rank = 0;
  uint3 index;

  unsigned char& at(uint32_t address) {
    if (address < kSharedBase || address >= kSharedBase + shared.size()) fail("an address outside shared memory");
    return shared[address - kSharedBase];
  }
  Phase& phase(uint32_t address) {
    if (barrier.alive == 0) fail("an mbarrier of a block that has ended");
    at(address + 7);
    if (address % 8 != 0) fail("an mbarrier that is not aligned");
    const auto found = phases.find(address);
    if (found == phases.end()) fail("an mbarrier that was not initialized");
    return found->second;
  }
};
struct Fiber {
  Context context;
  Block* block = nullptr;
  uint3 thread;
  bool done = false;
  const uint32_t* watched = nullptr;  // it sleeps while this is `asleep`
  uint32_t asleep = 0;
  // groups of products and of copies, and those that no group holds yet
  std::vector<std::vector<std::function<void()>>> products, copies;
  std::vector<std::function<void()>> open_products, open_copies;
};

inline Fiber* now = nullptr;
inline Context scheduler;
inline const std::function<void()>* body = nullptr;
inline std::vector<std::function<void()>> transfers;  // of the copy engine, not yet done
inline dim3 block_size, grid_size;

inline void to_scheduler() { switch_to(now->context, scheduler); }
inline void to_fiber(Fiber* fiber) {
  now = fiber;
  fiber->watched = nullptr;
  switch_to(scheduler, fiber->context);
}
inline void sleep_while(const uint32_t* watched, uint32_t value) {
  while (*watched == value) {
    now->watched = watched;
    now->asleep = value;
    to_scheduler();
  }
}
inline void arrive_and_wait(Barrier& barrier) {
  const uint32_t generation = barrier.generation;
  if (++barrier.arrived == barrier.alive) {
    barrier.arrived = 0;
    barrier.votes[(generation + 1) & 1] = 0;
    barrier.generation++;
  } else {
    sleep_while(&barrier.generation, generation);
  }
}
inline void leave(Barrier& barrier) {
  barrier.alive--;
  if (barrier.arrived > 0 && barrier.arrived == barrier.alive) {
    barrier.arrived = 0;
    barrier.votes[(barrier.generation + 1) & 1] = 0;
    barrier.generation++;
  }
}
inline void enter() {
  (*body)();
  Block& block = *now->block;
  if (!now->open_products.empty() || !now->products.empty()) fail("a thread ended with products under way");
  if (!now->copies.empty()) {
    for (const auto& group : now->copies)
      if (!group.empty()) fail("a thread ended with copies under way");
  }
  leave(block.barrier);
  leave(*block.cluster_barrier);
  now->done = true;
  to_scheduler();
}

inline void run_cluster(int cluster, unsigned threads, size_t shared, uint3 first) {
#ifdef MSA_HF_WATCHED_STACKS
  constexpr size_t kStack = 64 * 1024;  // an address sanitizer goes through the whole of a stack at every switch
#else
  constexpr size_t kStack = 256 * 1024;
#endif
  static std::vector<std::unique_ptr<char[]>> stacks;
  if (threads % 32 != 0) fail("blocks must be whole warps");
  std::vector<Block> blocks(cluster);
  Barrier together;
  together.alive = cluster * static_cast<int>(threads);
  std::vector<Fiber> fibers(cluster * threads);
  for (int b = 0; b < cluster; b++) {
    Block& block = blocks[b];
    block.shared.assign(shared, 0xff);
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.alive = 32;
    block.barrier.alive = static_cast<int>(threads);
    block.cluster_barrier = &together;
    block.cluster = &blocks;
    block.rank = b;
    block.index = {first.x + b, first.y, first.z};
    for (unsigned t = 0; t < threads; t++) {
      Fiber& fiber = fibers[b * threads + t];
      if (stacks.size() < fibers.size()) stacks.emplace_back(new char[kStack]);
      fiber.block = &block;
      fiber.thread = {t, 0, 0};
      prepare(fiber.context, stacks[b * threads + t].get(), kStack, enter);
    }
  }
  std::vector<Fiber*> ready;
  const Block* late = cluster > 1 && order() % 2 == 0 ? &blocks[order() % cluster] : nullptr;
  for (int round = 0;; round++) {
    ready.clear();
    bool all_done = true;
    for (Fiber& fiber : fibers) {
      all_done = all_done && fiber.done;
      if (!fiber.done && (fiber.watched == nullptr || *fiber.watched != fiber.asleep)) ready.push_back(&fiber);
    }
    if (all_done) break;
    if (!transfers.empty() && (ready.empty() || order() % 2 == 0)) {
      std::swap(transfers[order() % transfers.size()], transfers.back());
      const auto transfer = transfers.back();
      transfers.pop_back();
      transfer();
    } else if (ready.empty()) {
      fail("threads wait for what never comes: a barrier in divergent code, or a wrong phase");
    }
    std::shuffle(ready.begin(), ready.end(), order);
    for (Fiber* fiber : ready) {
      if (order() % 8 == 0 || (round < 20 && fiber->block == late)) continue;
      to_fiber(fiber);
    }
  }
  if (!transfers.empty()) fail("a block ended before what it had asked for came");
}

template <class T>
struct Gathered {
  const unsigned char (*slots)[64];
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots[lane], sizeof(T));
    return value;
  }
};
// What every lane of the warp gives.
template <class T>
Gathered<T> gather(const T& value) {
  static_assert(sizeof(T) <= 64);
  Warp& warp = now->block->warps[now->thread.x / 32];
  auto& slots = warp.slots[warp.barrier.generation & 1];
  std::memcpy(slots[now->thread.x % 32], &value, sizeof(T));
  arrive_and_wait(warp.barrier);
  return {slots};
}

template <class T>
void finish(std::vector<std::vector<T>>& groups, size_t most) {
  while (groups.size() > most) {
    const auto group = groups.front();
    groups.erase(groups.begin());
    for (const auto& operation : group) operation();
  }
}

// What a launch is refused for on a GPU, and how.
constexpr size_t kSharedUnasked = 48 * 1024;
inline std::map<const void*, size_t> allowed_shared;  // of kernels that asked for more
inline cudaError_t last_error = cudaSuccess;

inline cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

inline cudaError_t launch(
    const void* kernel, dim3 grid, unsigned threads, size_t shared, unsigned cluster,
    const std::function<void()>& function) {
  const bool possible = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x < 1u << 31 && grid.y < 1u << 16 &&
                        grid.z < 1u << 16 && grid.x % cluster == 0;
  if (!possible || threads == 0 || threads > 1024) return failed(cudaErrorInvalidConfiguration);
  const auto allowed = allowed_shared.find(kernel);
  if (shared > (allowed == allowed_shared.end() ? kSharedUnasked : std::max(kSharedUnasked, allowed->second)))
    return failed(cudaErrorInvalidValue);
  body = &function;
  block_size = dim3(threads);
  grid_size = grid;
  std::vector<uint3> clusters;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x += cluster) clusters.push_back({x, y, z});
  std::shuffle(clusters.begin(), clusters.end(), order);
  for (const uint3& first : clusters) run_cluster(cluster, threads, shared, first);
  return cudaSuccess;
}

}  // namespace emulated

#define threadIdx (emulated::now->thread)
#define blockIdx (emulated::now->block->index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)

inline void __syncthreads() { emulated::arrive_and_wait(emulated::now->block->barrier); }
inline int __syncthreads_count(int vote) {
  emulated::Barrier& barrier = emulated::now->block->barrier;
  int& votes = barrier.votes[barrier.generation & 1];
  votes += vote != 0;
  emulated::arrive_and_wait(barrier);
  return votes;
}
inline void __syncwarp(unsigned = 0xffffffffu) { emulated::gather(0); }
inline void __threadfence() {}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated::gather(value)[lane & 31];
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::gather(value)[(threadIdx.x % 32) ^ mask];
}
template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = threadIdx.x % 32;
  return emulated::gather(value)[lane >= step ? lane - step : lane];
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto votes = emulated::gather(vote);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= (votes[i] ? 1u : 0u) << i;
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old > value ? old : value;
  return old;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

using std::max;
using std::min;

// What the code under test and its checks call of the runtime.
extern "C" {
inline cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > emulated::shared_limit) return emulated::failed(cudaErrorInvalidValue);
  emulated::allowed_shared[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}
// Memory of no bytes has no address, as on a GPU.
inline cudaError_t cudaMalloc(void** p, size_t n) {
  *p = nullptr;
  if (n != 0 && posix_memalign(p, 256, n) != 0) return cudaErrorMemoryAllocation;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return *p = n ? std::malloc(n) : nullptr, cudaSuccess; }
inline cudaError_t cudaFreeHost(void* p) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  return n ? std::memcpy(to, from, n) : to, cudaSuccess;
}
inline cudaError_t cudaMemset(void* p, int value, size_t n) { return n ? std::memset(p, value, n) : p, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t) { return cudaMemset(p, value, n); }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  return function(data), cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                       ? "no error"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                  : "invalid argument";
}
}
