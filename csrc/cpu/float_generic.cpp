// Scoring with the instruction set that every machine of the architecture has.

#include "kernels.h"
#include "numbers.h"

namespace msa_hf::cpu {

#define MSA_LANES 4
#define MSA_PANELS 2
#define MSA_KEYS 4
#define MSA_TOKENS 2
#define MSA_LONE_KEYS 4
#include "float_kernels.inc"

const FloatKernels* generic_kernels() { return &kernels; }

}  // namespace msa_hf::cpu
