#include "wgmma_kernel.cuh"

namespace msa_hf::route {
template bool wgmma_compiled<Type::bf16>();
template cudaError_t score_wgmma<Type::bf16>(const Score& score, int shape, cudaStream_t stream);
}  // namespace msa_hf::route
