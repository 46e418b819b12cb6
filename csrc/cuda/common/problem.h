// What went wrong in a launcher, in words: an error code alone says neither which kernel it was nor which size.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

namespace msa_hf {

inline std::string& problem_of_this_thread() {
  static thread_local std::string problem;
  return problem;
}

// The status, which `explain` will explain.
inline cudaError_t refuse(cudaError_t status, std::string problem) {
  problem_of_this_thread() = std::move(problem);
  return status;
}

// Once, after a launcher of this thread has failed.
inline std::string explain(cudaError_t status) {
  const std::string problem = std::exchange(problem_of_this_thread(), {});
  const char* error = cudaGetErrorString(status);
  return problem.empty() ? error : problem + " (" + error + ")";
}

}  // namespace msa_hf
