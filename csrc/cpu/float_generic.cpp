// Scoring with the instruction set that every machine of the architecture has.

#include <cmath>

#include "kernels.h"
#include "numbers.h"

namespace msa_hf::cpu {

#define MSA_LANES 4
#define MSA_PANELS 2
#define MSA_KEYS 4
#define MSA_TOKENS 2
#define MSA_LONE_KEYS 4

namespace {

typedef float Vector __attribute__((vector_size(MSA_LANES * 4), aligned(4), may_alias));

inline __attribute__((always_inline)) Vector broadcast(float value) {
  Vector vector;
  for (int lane = 0; lane < MSA_LANES; ++lane) vector[lane] = value;
  return vector;
}

inline __attribute__((always_inline)) Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__FP_FAST_FMAF)  // ARM: one instruction
  for (int lane = 0; lane < MSA_LANES; ++lane) c[lane] = std::fma(a[lane], b[lane], c[lane]);
  return c;
#else  // x86-64 without FMA: there is nothing to fuse
  return a * b + c;
#endif
}

}  // namespace

#include "float_kernels.inc"

const FloatKernels* generic_kernels() { return &kernels; }

}  // namespace msa_hf::cpu
