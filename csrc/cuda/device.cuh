// What the kernels of pool_chunks and gather_documents share: formats and wide loads.
//
// With MSA_HF_EMULATE the same sources compile with a C++ compiler and run on the host, one fiber per CUDA thread
// (standalone/cuda_on_host.h): how indices and barriers are tested where there is no GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "pool_gather.h"

#ifdef MSA_HF_EMULATE
#include "standalone/cuda_on_host.h"
#else
#define MSA_HF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include "launch.cuh"

namespace msa_hf {

constexpr unsigned kWholeWarp = 0xffffffffu;

template <int BYTES>
struct Raw;
template <>
struct Raw<16> {
  using type = uint4;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<4> {
  using type = uint32_t;
};
template <>
struct Raw<2> {
  using type = uint16_t;
};
template <>
struct Raw<1> {
  using type = uint8_t;
};

// Read once, by this thread alone: no room in the first cache.
template <typename W>
__device__ __forceinline__ W load_once(const W* address) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(W) == 16) {
    W word;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
        : "l"(address));
    return word;
  } else {
    return __ldg(address);
  }
#else
  return *address;
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

__device__ __forceinline__ float float8_to_float(uint8_t bits) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3)));
}

// `words` as so many numbers of type T.
template <typename T, int COUNT>
union Numbers {
  typename Raw<sizeof(T) * COUNT>::type word;
  T values[COUNT];
  __device__ __forceinline__ Numbers() {}
};

__device__ __forceinline__ float load_as_float(const void* data, int64_t index, Format format) {
  switch (format) {
    case Format::float32:
      return static_cast<const float*>(data)[index];
    case Format::bfloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    case Format::float16:
      return to_float(static_cast<const __half*>(data)[index]);
    case Format::int8:
      return static_cast<float>(static_cast<const int8_t*>(data)[index]);
    default:
      return float8_to_float(static_cast<const uint8_t*>(data)[index]);
  }
}

__device__ __forceinline__ void store_float(void* data, int64_t index, Format format, float x) {
  switch (format) {
    case Format::float32:
      static_cast<float*>(data)[index] = x;
      break;
    case Format::bfloat16:
      static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(x);
      break;
    case Format::float16:
      static_cast<__half*>(data)[index] = from_float<__half>(x);
      break;
    case Format::int8:
      static_cast<int8_t*>(data)[index] = static_cast<int8_t>(fminf(fmaxf(rintf(x), -127.0f), 127.0f));
      break;
    default:
      static_cast<uint8_t*>(data)[index] = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, step));
  return x;
}

// How many of `count` ascending numbers are <= value. The whole warp searches: 32 probes a round.
__device__ __forceinline__ int64_t warp_count_at_most(const int64_t* ascending, int64_t count, int64_t value) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  int64_t low = 0, high = count;  // below `low` all are <= value, from `high` on none is
  while (low < high) {
    const int64_t step = (high - low + 31) / 32;
    const int64_t probe = low + lane * step;
    const bool at_most = probe < high && ascending[probe] <= value;
    const int passed = __popc(__ballot_sync(kWholeWarp, at_most));
    if (passed == 0) break;
    const int64_t next = low + passed * step;
    low = low + (passed - 1) * step + 1;
    high = next < high ? next : high;
  }
  return low;
}

inline bool fits_words(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

}  // namespace msa_hf
