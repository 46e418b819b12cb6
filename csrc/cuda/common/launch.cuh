// Launching a kernel, with the shared memory that it needs; where CUDA refuses, with what was asked for.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "problem.h"

#ifdef MSA_HF_EMULATE
#include "../standalone/cuda_on_host.h"
#endif

namespace msa_hf {

constexpr size_t kSharedUnasked = 48 * 1024;  // more dynamic shared memory than this must be asked for

struct Grid {
  dim3 blocks;
  unsigned threads = 0;  // of a block
  size_t shared = 0;     // bytes of dynamic shared memory
  unsigned cluster = 1;  // blocks, along x
};

// Once per kernel and device would do; it costs less than to remember.
template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), size_t shared) {
  if (shared <= kSharedUnasked) return cudaSuccess;
  return cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(
    const char* name, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
    const Arguments&... arguments) {
  cudaError_t status = allow_shared(kernel, grid.shared);
  if (status == cudaSuccess) {
#ifdef MSA_HF_EMULATE
    status = emulated::launch(reinterpret_cast<const void*>(kernel), grid.blocks, grid.threads, grid.shared, grid.cluster,
                              [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
    cudaLaunchConfig_t config = {};
    config.gridDim = grid.blocks;
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared;
    config.stream = stream;
    cudaLaunchAttribute attribute;
    if (grid.cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = grid.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
    status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
  }
  if (status == cudaSuccess) return status;
  cudaGetLastError();  // told here: not to be found by whoever looks next
  const dim3& blocks = grid.blocks;
  return refuse(status, std::string(name) + " in " + std::to_string(blocks.x) + " x " + std::to_string(blocks.y) + " x " +
                            std::to_string(blocks.z) + " blocks of " + std::to_string(grid.threads) + " threads with " +
                            std::to_string(grid.shared) + " bytes of shared memory");
}

// Whether this machine runs code of `kernel` that was compiled for at least this architecture (90 for sm_90 and sm_90a),
// rather than made from an older one's.
template <class Kernel>
bool compiled_for(Kernel kernel, int architecture) {
#ifdef MSA_HF_EMULATE
  return true;
#else
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) cudaGetLastError();  // no code for this machine: not an error of the caller's
  return error == cudaSuccess && attributes.ptxVersion >= architecture;
#endif
}

}  // namespace msa_hf
