#include "wgmma_kernel.cuh"

namespace msa_hf::route {
template bool wgmma_compiled<Type::e4m3>();
template cudaError_t score_wgmma<Type::e4m3>(const Score& score, int shape, cudaStream_t stream);
}  // namespace msa_hf::route
