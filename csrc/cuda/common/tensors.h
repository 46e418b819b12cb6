// From tensors to what launchers take: types, the current stream, addresses, and errors in words.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>

#include "../../checks.h"
#include "problem.h"
#include "types.h"

namespace msa_hf {

inline Type type_of(ScalarType type, const char* op, const char* name) {
  switch (type) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    case ScalarType::Float8_e4m3fn: return Type::e4m3;
    case ScalarType::Char: return Type::s8;
    default: STD_TORCH_CHECK(false, op, ": `", name, "` cannot be ", torch::headeronly::toString(type), " on CUDA");
  }
}
inline Type type_of(const Tensor& tensor, const char* op, const char* name) {
  return type_of(tensor.scalar_type(), op, name);
}

// The device of a tensor made current, and its current stream.
struct Place {
  explicit Place(const Tensor& tensor) : guard(tensor.get_device()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
};

inline void check(cudaError_t status, const char* op) {
  STD_TORCH_CHECK(status == cudaSuccess, op, " on CUDA: ", explain(status));
}

inline Tensor make(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, type);
}

inline const int64_t* integers(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

// The address under which the device reads a tensor of its own or of pinned host memory; null for any other.
inline const void* device_address(const Tensor& tensor) {
  if (tensor.is_cuda()) return tensor.const_data_ptr();
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, tensor.const_data_ptr()) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return attributes.type == cudaMemoryTypeHost ? attributes.devicePointer : nullptr;
}

}  // namespace msa_hf
