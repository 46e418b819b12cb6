// Scoring with AVX-512.

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

#include "numbers.h"

namespace msa_hf::cpu {

#define MSA_LANES 16
#define MSA_PANELS 2
#define MSA_KEYS 12
#define MSA_TOKENS 4
#define MSA_LONE_KEYS 6

namespace {

typedef float Vector __attribute__((vector_size(MSA_LANES * 4), aligned(4), may_alias));

inline __attribute__((always_inline)) Vector broadcast(float value) { return (Vector)_mm512_set1_ps(value); }

inline __attribute__((always_inline)) Vector multiply_add(Vector a, Vector b, Vector c) {
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

}  // namespace

#include "float_kernels.inc"

}  // namespace msa_hf::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace msa_hf::cpu {

const FloatKernels* avx512_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &kernels;
  }
#endif
  return nullptr;
}

}  // namespace msa_hf::cpu
