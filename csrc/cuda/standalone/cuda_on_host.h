// Runs CUDA kernels on the host: blocks one after the other, every thread of a block a fiber.
//
// Between two barriers the fibers run in a random order, so that a missing barrier shows; a barrier that not all threads
// reach, or a warp operation that not all lanes reach, ends the program. Only what these kernels use is here. Compile the
// .cu files with a C++ compiler and -DMSA_HF_EMULATE; CUDA's headers are needed, a GPU and nvcc are not.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
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
#include <vector>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

enum class Wait { none, warp, block, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::none;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline size_t running = 0;
inline std::vector<uint64_t> exchanged;
inline unsigned char* shared_memory = nullptr;
inline const std::function<void()>* body = nullptr;
inline std::mt19937 order(7);

[[noreturn]] inline void fail(const char* problem) {
  std::fprintf(stderr, "cuda_on_host: %s\n", problem);
  std::exit(3);
}

inline void wait(Wait kind) {
  Fiber& self = fibers[running];
  self.wait = kind;
  swapcontext(&self.context, &scheduler);
}

inline void enter() {
  (*body)();
  wait(Wait::done);
}

inline bool release() {
  bool any = false;
  bool all_done = true, block = true;
  for (size_t base = 0; base < fibers.size(); base += 32) {
    bool warp = true;
    for (size_t i = base; i < base + 32; ++i) {
      all_done = all_done && fibers[i].wait == Wait::done;
      block = block && (fibers[i].wait == Wait::block || fibers[i].wait == Wait::done);
      warp = warp && fibers[i].wait == Wait::warp;
    }
    for (size_t i = base; warp && i < base + 32; ++i) fibers[i].wait = Wait::none;
    any = any || warp;
  }
  if (all_done) return false;
  if (block) {
    for (Fiber& fiber : fibers) {
      if (fiber.wait == Wait::block) fiber.wait = Wait::none;
    }
  } else if (!any) {
    fail("threads wait for others that never come: a barrier or warp operation in divergent code");
  }
  return true;
}

inline void run_block(unsigned threads, size_t shared) {
  constexpr size_t kStack = 128 * 1024;
  if (threads % 32 != 0) fail("blocks must be whole warps");
  // Exactly as large as asked for, so that an address sanitizer sees what lies behind; not zero, as on a GPU.
  std::unique_ptr<unsigned char[]> memory(new unsigned char[shared ? shared : 1]);
  std::memset(memory.get(), 0xff, shared);
  shared_memory = memory.get();
  fibers.resize(threads);
  exchanged.assign(threads, 0);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.wait = Wait::none;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<size_t> ready;
  do {
    ready.clear();
    for (size_t i = 0; i < fibers.size(); ++i) {
      if (fibers[i].wait == Wait::none) ready.push_back(i);
    }
    std::shuffle(ready.begin(), ready.end(), order);
    for (size_t i : ready) {
      running = i;
      threadIdx = {static_cast<unsigned>(i), 0, 0};
      swapcontext(&scheduler, &fibers[i].context);
    }
  } while (release());
}

// What a launch is refused for on a GPU, and how. Shared memory: what every device from compute capability 8.0 on has.
constexpr size_t kSharedUnasked = 48 * 1024, kMostShared = 99 * 1024;
inline std::map<const void*, size_t> allowed_shared;  // of kernels that asked for more
inline cudaError_t last_error = cudaSuccess;

inline cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

inline cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMostShared) return failed(cudaErrorInvalidValue);
  allowed_shared[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

inline cudaError_t launch(
    const void* kernel, dim3 blocks, unsigned threads, size_t shared, const std::function<void()>& function) {
  const bool grid = blocks.x > 0 && blocks.y > 0 && blocks.z > 0 && blocks.x < 1u << 31 && blocks.y < 1u << 16 &&
                    blocks.z < 1u << 16;
  if (!grid || threads == 0 || threads > 1024) return failed(cudaErrorInvalidConfiguration);
  const auto allowed = allowed_shared.find(kernel);
  if (shared > (allowed == allowed_shared.end() ? kSharedUnasked : std::max(kSharedUnasked, allowed->second))) {
    return failed(cudaErrorInvalidValue);
  }
  body = &function;
  blockDim = dim3(threads);
  gridDim = blocks;
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        blockIdx = {x, y, z};
        run_block(threads, shared);
      }
    }
  }
  return cudaSuccess;
}

// Memory of no bytes has no address, as on a GPU.
inline cudaError_t allocate(void** pointer, size_t bytes) {
  *pointer = bytes ? std::malloc(bytes) : nullptr;
  return cudaSuccess;
}

template <typename T>
T exchange(T value, size_t lane_of_source, bool exists) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&exchanged[running], &value, sizeof(T));
  wait(Wait::warp);
  T other = value;
  if (exists) std::memcpy(&other, &exchanged[running / 32 * 32 + lane_of_source], sizeof(T));
  wait(Wait::warp);
  return other;
}

}  // namespace cuda_on_host

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#define MSA_HF_DYNAMIC_SHARED(name) unsigned char* name = cuda_on_host::shared_memory

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::Wait::block); }

inline void __syncwarp(unsigned = 0xffffffffu) { cuda_on_host::wait(cuda_on_host::Wait::warp); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_host::exchange(value, lane & 31, true);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_host::exchange(value, (cuda_on_host::running % 32) ^ mask, true);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = static_cast<int>(cuda_on_host::running % 32);
  return cuda_on_host::exchange(value, lane - step, lane >= step);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  cuda_on_host::exchanged[cuda_on_host::running] = vote;
  cuda_on_host::wait(cuda_on_host::Wait::warp);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) {
    if (cuda_on_host::exchanged[cuda_on_host::running / 32 * 32 + i] & 1) votes |= 1u << i;
  }
  cuda_on_host::wait(cuda_on_host::Wait::warp);
  return votes;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
using std::max;
using std::min;
