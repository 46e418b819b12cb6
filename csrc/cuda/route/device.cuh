// What the kernels of route_documents share: instructions, and the index maps of tiles.
//
// With MSA_HF_EMULATE the same sources compile with a C++ compiler and run on the host, where every instruction below is
// replaced by what its documentation says it does (standalone/hopper_on_host.h): how indices, barriers and pipelines
// are tested where there is no GPU.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../common/launch.cuh"
#include "../common/numbers.cuh"
#include "route_documents.h"

#ifdef MSA_HF_EMULATE
#include "../standalone/hopper_on_host.h"
#else
#include "wgmma.cuh"
// wgmma and the tensor memory accelerator: code for any other architecture holds empty kernels, which plan() never picks.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MSA_HF_SM90 1
#endif
#endif

namespace msa_hf::route {

constexpr float kNoScore = -1e30f;  // documents at or below it are not chosen (routing_msa.NO_SCORE)
constexpr int kRow = 128;           // bytes of a row of a tile: 64 numbers of 16 bit, 128 of 8 bit
constexpr int kGroup = 8;           // columns of one sample: every sample's tokens are padded to a multiple of it

template <Type TYPE>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<Type::s8> {
  using type = int;
};

// max that keeps NaN: a score that is NaN must not be chosen
__device__ __forceinline__ float max_of(float a, float b) {
#ifdef __CUDA_ARCH__
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return a != a || b != b ? NAN : a > b ? a : b;
#endif
}
__device__ __forceinline__ int max_of(int a, int b) { return a > b ? a : b; }
template <class T>
__device__ __forceinline__ T lowest();
template <>
__device__ __forceinline__ float lowest<float>() {
  return -INFINITY;
}
template <>
__device__ __forceinline__ int lowest<int>() {
  return INT_MIN;
}

// float32 as an unsigned number of the same order; never 0 but for NaN, which is below everything.
__device__ __forceinline__ uint32_t ordered(float x) {
  if (x != x) return 0;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t x) {
  return __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x);
}

// Tiles in shared memory: rows of 128 bytes, eight of them an atom of 1024 bytes, in which the 16 bytes at column c of
// row r lie at column c ^ (r % 8). That is the tensor memory accelerator's and wgmma's 128-byte swizzle.
__host__ __device__ constexpr uint32_t swizzled(uint32_t row, uint32_t byte) {
  return row * kRow + (byte ^ ((row & 7) << 4));
}

#ifndef MSA_HF_EMULATE

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// sm_80 ---------------------------------------------------------------------------------------------------------------

// 16 bytes, of which `bytes` (0 or 16) are read and the others zero
__device__ __forceinline__ void copy16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;\n" ::); }
template <int N>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
// d[16 x 8] += a[16 x 32 bytes] * b[8 x 32 bytes]^T
template <Type TYPE, class Acc>
__device__ __forceinline__ void warp_product(Acc* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (TYPE == Type::bf16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (TYPE == Type::f16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else if constexpr (TYPE == Type::s8) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(__CUDA_ARCH__)
    __trap();  // mma_compiled() keeps plan() from coming here
#endif
  }
}

// sm_90 ---------------------------------------------------------------------------------------------------------------
#ifdef MSA_HF_SM90

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
// after barrier_init, before any other block or the copy engine uses them
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
// one arrival, and `bytes` more for the copy engine to deliver
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// returns once the phase of this parity is over; a fresh barrier stands after a phase of parity 1
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// At the same address in block `rank` of the cluster. What it signals are finished reads of the tensor cores: nothing that
// a fence of the cluster's memory (.release.cluster, hundreds of cycles) would order.
__device__ __forceinline__ void barrier_arrive_in(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}
__device__ __forceinline__ uint64_t keep_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t again_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t once_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}
// The box of `map` at number `x` of row `y`, to a tile at `to`; its bytes count towards `barrier`.
__device__ __forceinline__ void load_box(
    uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;\n" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "l"(policy)
      : "memory");
}
// The same into every block of the cluster whose bit is set, at the same addresses.
__device__ __forceinline__ void load_box_to(
    uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint16_t blocks, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5, %6;\n" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(blocks), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
#endif  // MSA_HF_SM90
#endif  // MSA_HF_EMULATE

// A tile's descriptor for wgmma: rows of 128 bytes along the summed dimension, 128-byte swizzle (1 in bits 62 and 63),
// 1024 bytes from one atom of eight rows to the next. `address` may be advanced by 32 bytes within the first row: the
// swizzle is a function of the address bits.
__host__ __device__ constexpr uint64_t tile_descriptor(uint32_t address) {
  return (uint64_t{1} << 62) | (uint64_t{1024 >> 4} << 32) | (uint64_t{1} << 16) | ((address & 0x3ffff) >> 4);
}

// Scores of a tile ----------------------------------------------------------------------------------------------------

// Where the scores of chunks go.
struct Sink {
  float* scores;          // [samples, pitch]
  int64_t pitch;
  const float* largest;   // [samples] largest absolute value of a sample's queries, where they were quantized
  float inverse_largest;  // of the type, so that largest * inverse_largest is a query's scale
};

// The largest products so far of the rows that a warp holds, and the sample that they belong to. A warp's accumulators
// are those of wgmma and mma.sync alike: acc[4 * j + i] of lane l is row l / 4 + 8 * (i / 2), column 8 * j + 2 * (l % 4)
// + i % 2, so that columns 8 * j ... 8 * j + 7, a group, are one sample's.
template <class Acc, int TILES>
struct Best {
  Acc value[TILES][2];
  int sample = -1;
};

// Which chunks a thread's rows are: those of value[t][h] are first + 64 * t + 8 * h, as far as they are below `end`.
template <int TILES>
struct Rows {
  int first, end;
  float factors[TILES][2];  // the keys' scales

  __device__ __forceinline__ Rows(int first, int end, const float* scales) : first(first), end(end) {
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
      for (int h = 0; h < 2; h++)
        factors[t][h] = scales != nullptr && row(t, h) < end ? scales[row(t, h)] : 1.0f;
    }
  }
  __device__ __forceinline__ int row(int t, int h) const { return first + 64 * t + 8 * h; }
};

// All lanes of a warp.
template <class Acc, int TILES>
__device__ __forceinline__ void flush(const Best<Acc, TILES>& best, const Sink& sink, const Rows<TILES>& rows) {
  if (best.sample < 0) return;
  float* scores = sink.scores + best.sample * sink.pitch;
  const float scale = sink.largest == nullptr ? 1.0f : sink.largest[best.sample] * sink.inverse_largest;
#pragma unroll
  for (int t = 0; t < TILES; t++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      Acc value = best.value[t][h];
      value = max_of(value, __shfl_xor_sync(kWarp, value, 1));
      value = max_of(value, __shfl_xor_sync(kWarp, value, 2));
      if ((threadIdx.x & 3) == 0 && rows.row(t, h) < rows.end)
        scores[rows.row(t, h)] = static_cast<float>(value) * (rows.factors[t][h] * scale);
    }
  }
}

// The samples of the groups of a tile, one in each lane, to be loaded while the tile's products are under way.
template <int COLUMNS>
__device__ __forceinline__ int groups_of(const int* groups) {
  static_assert(COLUMNS / kGroup <= 32);
  const int lane = threadIdx.x % 32;
  return lane < COLUMNS / kGroup ? groups[lane] : -1;
}

// Take the accumulators of COLUMNS columns into `best`. Lane j holds the sample of group j, -1 behind the last: scores are
// written between one group and the next, and loads would have to wait for that.
template <class Acc, int TILES, int COLUMNS>
__device__ __forceinline__ void fold(
    const Acc (&acc)[TILES][COLUMNS / 2], int groups, Best<Acc, TILES>& best, const Sink& sink, const Rows<TILES>& rows) {
  constexpr int GROUPS = COLUMNS / kGroup;
  constexpr unsigned ALL = GROUPS == 32 ? ~0u : (1u << GROUPS % 32) - 1;
  // Bits of groups: that are of any sample, and that are of another than the group before. Samples stand in order.
  const int before = __shfl_up_sync(kWarp, groups, 1);
  const unsigned real = __ballot_sync(kWarp, groups >= 0) & ALL;
  const unsigned begins = __ballot_sync(kWarp, groups != (threadIdx.x % 32 == 0 ? best.sample : before)) & ALL;
  const int first = __shfl_sync(kWarp, groups, 0);
  if (real == ALL && (begins & ~1u) == 0) {  // one sample
    if (first != best.sample) {
      flush<Acc, TILES>(best, sink, rows);
      best.sample = first;
#pragma unroll
      for (int t = 0; t < TILES; t++) best.value[t][0] = best.value[t][1] = lowest<Acc>();
    }
#pragma unroll
    for (int t = 0; t < TILES; t++) {
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        best.value[t][0] = max_of(best.value[t][0], max_of(acc[t][4 * j], acc[t][4 * j + 1]));
        best.value[t][1] = max_of(best.value[t][1], max_of(acc[t][4 * j + 2], acc[t][4 * j + 3]));
      }
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    if (real >> j & 1) {
      const bool next = begins >> j & 1;
      if (next) {
        flush<Acc, TILES>(best, sink, rows);
        best.sample = __shfl_sync(kWarp, groups, j);
      }
#pragma unroll
      for (int t = 0; t < TILES; t++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const Acc value = max_of(acc[t][4 * j + 2 * h], acc[t][4 * j + 2 * h + 1]);
          best.value[t][h] = next ? value : max_of(best.value[t][h], value);
        }
      }
    }
  }
}

}  // namespace msa_hf::route
