// Numbers of all types, wide loads, and what a warp does together.
//
// With MSA_HF_EMULATE the same sources compile with a C++ compiler and run on the host, one fiber per CUDA thread
// (standalone/cuda_on_host.h): how indices and barriers are tested where there is no GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "types.h"

#ifdef MSA_HF_EMULATE
#include "../standalone/cuda_on_host.h"
#else
#define MSA_HF_SHARED(name, alignment) extern __shared__ __align__(alignment) unsigned char name[]
#endif

namespace msa_hf {

constexpr unsigned kWarp = 0xffffffffu;

template <Type TYPE>
struct Number;
template <>
struct Number<Type::f32> {
  using storage = float;
  static __host__ __device__ __forceinline__ float decode(float x) { return x; }
  static __host__ __device__ __forceinline__ float encode(float x) { return x; }
};
template <>
struct Number<Type::bf16> {
  using storage = __nv_bfloat16;
  static __host__ __device__ __forceinline__ float decode(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __host__ __device__ __forceinline__ __nv_bfloat16 encode(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Number<Type::f16> {
  using storage = __half;
  static __host__ __device__ __forceinline__ float decode(__half x) { return __half2float(x); }
  static __host__ __device__ __forceinline__ __half encode(float x) { return __float2half_rn(x); }
};
template <>
struct Number<Type::e4m3> {
  using storage = uint8_t;
  static __host__ __device__ __forceinline__ float decode(uint8_t x) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(x, __NV_E4M3)));
  }
  static __host__ __device__ __forceinline__ uint8_t encode(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
};
template <>
struct Number<Type::s8> {
  using storage = int8_t;
  static __host__ __device__ __forceinline__ float decode(int8_t x) { return static_cast<float>(x); }
  static __host__ __device__ __forceinline__ int8_t encode(float x) {
    return static_cast<int8_t>(fminf(fmaxf(rintf(x), -127.0f), 127.0f));
  }
};
// The largest number of a quantized type: that of a sample's largest absolute value.
__host__ __device__ constexpr float largest_of(Type type) { return type == Type::e4m3 ? 448.0f : type == Type::s8 ? 127.0f : 1.0f; }
__host__ __device__ constexpr bool is_quantized(Type type) { return type == Type::e4m3 || type == Type::s8; }

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
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return Number<Type::bf16>::decode(x); }
__device__ __forceinline__ float to_float(__half x) { return Number<Type::f16>::decode(x); }
__device__ __forceinline__ float float8_to_float(uint8_t bits) { return Number<Type::e4m3>::decode(bits); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return Number<Type::f16>::encode(x);
  } else {
    return Number<Type::bf16>::encode(x);
  }
}

// `words` as so many numbers of type T.
template <typename T, int COUNT>
union Numbers {
  typename Raw<sizeof(T) * COUNT>::type word;
  T values[COUNT];
  __device__ __forceinline__ Numbers() {}
};

__device__ __forceinline__ float load_as_float(const void* data, int64_t index, Type type) {
  switch (type) {
    case Type::f32:
      return static_cast<const float*>(data)[index];
    case Type::bf16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    case Type::f16:
      return to_float(static_cast<const __half*>(data)[index]);
    case Type::s8:
      return static_cast<float>(static_cast<const int8_t*>(data)[index]);
    default:
      return float8_to_float(static_cast<const uint8_t*>(data)[index]);
  }
}

__device__ __forceinline__ void store_float(void* data, int64_t index, Type type, float x) {
  switch (type) {
    case Type::f32:
      static_cast<float*>(data)[index] = x;
      break;
    case Type::bf16:
      static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(x);
      break;
    case Type::f16:
      static_cast<__half*>(data)[index] = from_float<__half>(x);
      break;
    case Type::s8:
      static_cast<int8_t*>(data)[index] = Number<Type::s8>::encode(x);
      break;
    default:
      static_cast<uint8_t*>(data)[index] = Number<Type::e4m3>::encode(x);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWarp, x, step);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kWarp, x, step));
  return x;
}

inline bool fits_words(const void* data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

}  // namespace msa_hf
