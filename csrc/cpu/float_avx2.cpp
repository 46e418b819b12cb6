// Scoring with AVX2 and FMA (x86-64 of 2013 and later).

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "numbers.h"

namespace msa_hf::cpu {

#define MSA_LANES 8
#define MSA_PANELS 2
#define MSA_KEYS 6
#define MSA_TOKENS 4
#define MSA_LONE_KEYS 2

namespace {

typedef float Vector __attribute__((vector_size(MSA_LANES * 4), aligned(4), may_alias));

inline __attribute__((always_inline)) Vector broadcast(float value) { return (Vector)_mm256_set1_ps(value); }

inline __attribute__((always_inline)) Vector multiply_add(Vector a, Vector b, Vector c) {
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
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

const FloatKernels* avx2_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &kernels;
  }
#endif
  return nullptr;
}

}  // namespace msa_hf::cpu
