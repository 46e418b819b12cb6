// Runs the kernels of route_documents on the host: every CUDA thread a fiber, the blocks of a cluster together.
//
// Instructions do what their documentation says, and nothing sooner than it must: copies into shared memory and products
// of warpgroups happen at a random moment between their issue and the wait for them, fibers run in a random order. So a
// missing barrier, a wrong parity, a stage that is filled again too early or a wrong descriptor shows; barriers that are
// never reached end the program. What it cannot show: speed, and rules of the hardware that are not written here.
// Compile the .cu files with a C++ compiler and -DMSA_HF_EMULATE; CUDA's headers are needed, a GPU and nvcc are not.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#ifndef __grid_constant__
#define __grid_constant__
#endif
#define MSA_HF_SHARED(name) unsigned char* name = emulated::now->block->shared.data()

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
  ucontext_t context;  // to begin with; later switches are jumps, which make no system calls
  jmp_buf jump;
  bool begun = false;
  Block* block = nullptr;
  uint3 thread;
  bool done = false;
  const uint32_t* watched = nullptr;  // it sleeps while this is `asleep`
  uint32_t asleep = 0;
  // groups of products and of copies, and those that no group holds yet
  std::deque<std::vector<std::function<void()>>> products, copies;
  std::vector<std::function<void()>> open_products, open_copies;
};

inline Fiber* now = nullptr;
inline jmp_buf scheduler;
inline const std::function<void()>* body = nullptr;
inline std::vector<std::function<void()>> transfers;  // of the copy engine, not yet done
inline dim3 block_size, grid_size;

inline void to_scheduler() {
  if (_setjmp(now->jump) == 0) _longjmp(scheduler, 1);
}
inline void to_fiber(Fiber* fiber) {
  now = fiber;
  fiber->watched = nullptr;
  if (_setjmp(scheduler) == 0) {
    if (fiber->begun) _longjmp(fiber->jump, 1);
    fiber->begun = true;
    setcontext(&fiber->context);
  }
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
  constexpr size_t kStack = 256 * 1024;
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
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks[b * threads + t].get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      fiber.block = &block;
      fiber.thread = {t, 0, 0};
      makecontext(&fiber.context, enter, 0);
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
void finish(std::deque<std::vector<T>>& groups, size_t most) {
  while (groups.size() > most) {
    const auto group = groups.front();
    groups.pop_front();
    for (const auto& operation : group) operation();
  }
}

struct Rows {  // a tensor map
  const unsigned char* data;
  int64_t number_bytes, width, rows;
  int box;
};
static_assert(sizeof(Rows) <= sizeof(CUtensorMap));
inline cudaError_t map_rows(CUtensorMap* map, const void* data, int number_bytes, int64_t width, int64_t rows, int box) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || width * number_bytes % 16 != 0 || box > 256 || rows < 1)
    return cudaErrorInvalidValue;
  const Rows value{static_cast<const unsigned char*>(data), number_bytes, width, rows, box};
  std::memcpy(map, &value, sizeof value);
  return cudaSuccess;
}

inline void transfer_box(Block& block, uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  Rows rows;
  std::memcpy(&rows, map, sizeof rows);
  if (to % 1024 != 0) fail("a tile that is not aligned to its swizzle");
  Block* target = &block;
  transfers.push_back([=] {
    for (int r = 0; r < rows.box; r++) {
      for (int b = 0; b < 128; b++) {
        const int64_t byte = x * rows.number_bytes + b, row = int64_t{y} + r;
        const bool inside = byte >= 0 && byte < rows.width * rows.number_bytes && row >= 0 && row < rows.rows;
        uint32_t address = to + r * 128 + b;
        address ^= (address >> 7 & 7) << 4;
        target->at(address) = inside ? rows.data[row * rows.width * rows.number_bytes + byte] : 0;
      }
    }
    Phase& phase = target->phase(barrier);
    phase.bytes -= int64_t{rows.box} * 128;
    phase.check();
  });
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

namespace msa_hf::route {

enum class Type : int;
template <Type TYPE>
struct Number;

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulated::now->block->shared.data()) +
         emulated::kSharedBase;
}

inline void copy16(uint32_t to, const void* from, int bytes) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) emulated::fail("cp.async of 16 bytes that are not aligned");
  emulated::Block* block = emulated::now->block;
  emulated::now->open_copies.push_back([=] {
    for (int i = 0; i < 16; i++) block->at(to + i) = i < bytes ? static_cast<const unsigned char*>(from)[i] : 0;
  });
}
inline void copy_commit() {
  emulated::now->copies.push_back(std::move(emulated::now->open_copies));
  emulated::now->open_copies.clear();
  if (emulated::order() % 2 == 0) {
    for (const auto& copy : emulated::now->copies.back()) copy();
    emulated::now->copies.back().clear();
  }
}
template <int N>
void copy_wait() {
  emulated::finish(emulated::now->copies, N);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  const auto rows = emulated::gather(address);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    const uint32_t row = rows[i * 8 + lane / 4];
    if (row % 16 != 0) emulated::fail("ldmatrix of a row that is not aligned");
    for (int b = 0; b < 4; b++)
      reinterpret_cast<unsigned char*>(&r[i])[b] = emulated::now->block->at(row + lane % 4 * 4 + b);
  }
}
template <Type TYPE>
auto number_at(const unsigned char* bytes) {
  typename Number<TYPE>::storage number;
  std::memcpy(&number, bytes, sizeof number);
  return Number<TYPE>::decode(number);
}
template <Type TYPE, class Acc>
void warp_product(Acc* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  const auto all = emulated::gather(Fragment{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = threadIdx.x % 32;
  constexpr int SIZE = sizeof(typename Number<TYPE>::storage);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int byte = 0; byte < 32; byte += SIZE) {
      const int other = byte % 16 / 4;
      const Fragment x = all[row % 8 * 4 + other], y = all[column * 4 + other];
      const auto* xs = reinterpret_cast<const unsigned char*>(&x.a[row / 8 + 2 * (byte / 16)]);
      const auto* ys = reinterpret_cast<const unsigned char*>(&y.b[byte / 16]);
      d[i] += static_cast<Acc>(number_at<TYPE>(xs + byte % 4) * number_at<TYPE>(ys + byte % 4));
    }
  }
}

inline void barrier_init(uint32_t barrier, int arrivals) {
  emulated::now->block->at(barrier + 7);
  emulated::now->block->phases[barrier] = {0, arrivals, arrivals, 0};
}
inline void barrier_init_done() {}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  if (bytes >= 1u << 20) emulated::fail("more bytes than an mbarrier counts");
  emulated::Phase& phase = emulated::now->block->phase(barrier);
  phase.bytes += bytes;
  phase.pending--;
  phase.check();
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulated::Phase& phase = emulated::now->block->phase(barrier);
  if (parity > 1) emulated::fail("a parity that is neither 0 nor 1");
  while ((phase.number & 1) == parity) emulated::sleep_while(&phase.number, phase.number);
}
inline void arrive_at(emulated::Block& block, uint32_t barrier) {
  emulated::Phase& phase = block.phase(barrier);
  phase.pending--;
  phase.check();
}
inline void barrier_arrive(uint32_t barrier) { arrive_at(*emulated::now->block, barrier); }
inline void barrier_arrive_in(uint32_t barrier, uint32_t rank) {
  if (rank >= emulated::now->block->cluster->size()) emulated::fail("a block outside the cluster");
  arrive_at((*emulated::now->block->cluster)[rank], barrier);
}
inline uint32_t cluster_rank() { return emulated::now->block->rank; }
inline void cluster_sync() { emulated::arrive_and_wait(*emulated::now->block->cluster_barrier); }
inline uint64_t keep_policy() { return 0; }
inline uint64_t again_policy() { return 0; }
inline uint64_t once_policy() { return 0; }
inline void load_box(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint64_t) {
  emulated::transfer_box(*emulated::now->block, to, map, x, y, barrier);
}
inline void load_box_to(
    uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint16_t blocks, uint64_t) {
  for (size_t i = 0; i < emulated::now->block->cluster->size(); i++)
    if (blocks >> i & 1) emulated::transfer_box((*emulated::now->block->cluster)[i], to, map, x, y, barrier);
}
inline void prefetch_map(const CUtensorMap*) {}

// The lanes of a warp do these together (.sync.aligned).
inline void wgmma_begin() { __syncwarp(); }
inline void wgmma_commit() {
  __syncwarp();
  emulated::now->products.push_back(std::move(emulated::now->open_products));
  emulated::now->open_products.clear();
  if (emulated::order() % 2 == 0) {
    // products are done in order: all before these too
    for (auto& group : emulated::now->products) {
      for (const auto& product : group) product();
      group.clear();
    }
  }
}
template <int N>
void wgmma_wait() {
  emulated::finish(emulated::now->products, N);
  __syncwarp();
}
template <Type TYPE, int COLUMNS>
struct Wgmma {
  template <class Acc>
  static void run(Acc (&d)[COLUMNS / 2], uint64_t a, uint64_t b, int scale_d) {
    emulated::Block* block = emulated::now->block;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    Acc* out = d;
    // the bytes of a row of the tile that a descriptor describes
    const auto row_at = [block](uint64_t descriptor, int row, unsigned char (&bytes)[32]) {
      if (descriptor >> 62 != 1) emulated::fail("a descriptor without the 128-byte swizzle");
      const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
      const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
      for (int i = 0; i < 32; i++) {
        uint32_t address = start + row / 8 * stride + row % 8 * 128 + i;
        address ^= (address >> 7 & 7) << 4;
        bytes[i] = block->at(address);
      }
    };
    emulated::now->open_products.push_back([=] {
      constexpr int SIZE = sizeof(typename Number<TYPE>::storage);
      unsigned char bytes[32];
      Acc rows[2][32 / SIZE];
      for (int h = 0; h < 2; h++) {
        row_at(a, warp * 16 + lane / 4 + 8 * h, bytes);
        for (int i = 0; i < 32 / SIZE; i++) rows[h][i] = static_cast<Acc>(number_at<TYPE>(bytes + i * SIZE));
      }
      for (int column = 0; column < COLUMNS; column++) {
        if (column % 8 / 2 != lane % 4) continue;
        row_at(b, column, bytes);
        for (int h = 0; h < 2; h++) {
          Acc& sum = out[column / 8 * 4 + 2 * h + column % 2];
          if (!scale_d) sum = 0;
          for (int i = 0; i < 32 / SIZE; i++) sum += rows[h][i] * static_cast<Acc>(number_at<TYPE>(bytes + i * SIZE));
        }
      }
    });
  }
};

template <class... Parameters, class... Arguments>
cudaError_t launch(
    void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, int cluster, cudaStream_t,
    const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 || threads > 1024 ||
      static_cast<int64_t>(shared) > emulated::shared_limit || grid.x % cluster != 0)
    return cudaErrorInvalidConfiguration;
  const std::function<void()> function = [&] { kernel(static_cast<Parameters>(arguments)...); };
  emulated::body = &function;
  emulated::block_size = dim3(threads);
  emulated::grid_size = grid;
  std::vector<uint3> clusters;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x += cluster) clusters.push_back({x, y, z});
  std::shuffle(clusters.begin(), clusters.end(), emulated::order);
  for (const uint3& first : clusters) emulated::run_cluster(cluster, threads, shared, first);
  return cudaSuccess;
}

}  // namespace msa_hf::route
