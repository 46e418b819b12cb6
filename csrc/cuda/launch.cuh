// Launching a kernel, with the shared memory that it needs; where CUDA refuses, with what was asked for.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "problem.h"

namespace msa_hf {

constexpr size_t kSharedUnasked = 48 * 1024;  // more dynamic shared memory than this must be asked for

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(
    const char* name, void (*kernel)(Parameters...), dim3 blocks, unsigned threads, size_t shared, cudaStream_t stream,
    const Arguments&... arguments) {
  cudaError_t status = cudaSuccess;
  if (shared > kSharedUnasked) {
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared));
  }
  if (status == cudaSuccess) {
#ifdef MSA_HF_EMULATE
    status = cuda_on_host::launch(reinterpret_cast<const void*>(kernel), blocks, threads, shared,
                                  [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
  }
  if (status == cudaSuccess) return status;
  cudaGetLastError();  // told here: not to be found by whoever looks next
  return refuse(status, std::string(name) + " in " + std::to_string(blocks.x) + " x " + std::to_string(blocks.y) + " x " +
                            std::to_string(blocks.z) + " blocks of " + std::to_string(threads) + " threads with " +
                            std::to_string(shared) + " bytes of shared memory");
}

}  // namespace msa_hf
