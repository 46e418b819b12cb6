// Checks of the operators' arguments, the same for every device. Nothing here looks at the numbers in a tensor.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace msa_hf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
         type == ScalarType::Double;
}

inline bool is_quantized(ScalarType type) { return type == ScalarType::Char || type == ScalarType::Float8_e4m3fn; }

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "] " + torch::headeronly::toString(tensor.scalar_type());
}

// A tensor with this many numbers per dimension (-1: any) and of this type.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape,
                         std::optional<ScalarType> type) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size()) && (!type || tensor.scalar_type() == *type);
  std::string wanted;
  int64_t dimension = 0;
  for (int64_t size : shape) {
    wanted += (dimension ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
    same = same && (size < 0 || tensor.size(dimension) == size);
    ++dimension;
  }
  STD_TORCH_CHECK(same, op, ": `", name, "` must be [", wanted, "]", type ? " " : "",
                  type ? torch::headeronly::toString(*type) : "", ", got ", shape_of(tensor));
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu() && (tensor.is_cpu() || tensor.get_device() == like.get_device()),
                  op, ": `", name, "` lies on another device than the rest");
}

// Sizes that kernels multiply or count in 32 bits.
constexpr int64_t kMostSize = (int64_t{1} << 31) - 1;

inline void check_size(const char* op, const char* name, int64_t size, int64_t least) {
  STD_TORCH_CHECK(size >= least && size <= kMostSize, op, ": `", name, "` must ",
                  size < 0 && least == 0 ? "not be negative" : "lie from " + std::to_string(least) + " to 2^31 - 1",
                  ", got ", size);
}

// Groups and numbers of a head, which stand beside each other.
inline void check_heads(const char* op, const Tensor& tensor, int64_t groups, int64_t dim) {
  STD_TORCH_CHECK(groups <= kMostSize && dim <= kMostSize && groups * dim <= kMostSize, op,
                  ": G * D must be below 2^31, got ", shape_of(tensor));
}

inline void check_route_documents(const Tensor& queries, const Tensor& routing_mask, const Tensor& keys,
                                  const std::optional<Tensor>& scales, const Tensor& offsets,
                                  const std::optional<Tensor>& alive, int64_t k) {
  const char* op = "route_documents";
  check_tensor(op, "queries", queries, {-1, -1, -1}, std::nullopt);
  STD_TORCH_CHECK(is_floating(queries.scalar_type()), op, ": `queries` must be floating, got ", shape_of(queries));
  check_tensor(op, "routing_mask", routing_mask, {queries.size(0), queries.size(1)}, ScalarType::Bool);
  check_tensor(op, "keys", keys, {-1, queries.size(2)}, std::nullopt);
  STD_TORCH_CHECK(is_floating(keys.scalar_type()) || is_quantized(keys.scalar_type()), op,
                  ": `keys` must be floating, int8 or float8_e4m3fn, got ", shape_of(keys));
  STD_TORCH_CHECK(is_quantized(keys.scalar_type()) == scales.has_value(), op,
                  ": `scales` belong to int8 and float8_e4m3fn keys, and only to them; the keys are ", shape_of(keys));
  // Keys of no numbers take no memory, however many there are; each takes time.
  STD_TORCH_CHECK(keys.size(1) > 0 || keys.size(0) <= kMostSize, op, ": so many keys of no numbers: ", shape_of(keys));
  if (scales) check_tensor(op, "scales", *scales, {keys.size(0)}, ScalarType::Float);
  check_tensor(op, "offsets", offsets, {-1}, ScalarType::Long);
  STD_TORCH_CHECK(offsets.size(0) >= 1, op, ": `offsets` must begin with 0");
  if (alive) check_tensor(op, "alive", *alive, {offsets.size(0) - 1}, ScalarType::Bool);
  check_size(op, "k", k, 0);
  check_device(op, "routing_mask", routing_mask, queries);
  check_device(op, "keys", keys, queries);
  check_device(op, "offsets", offsets, queries);
  if (scales) check_device(op, "scales", *scales, queries);
  if (alive) check_device(op, "alive", *alive, queries);
}

inline void check_pool_chunks(const Tensor& keys, const Tensor& values, const Tensor& router_keys,
                              const Tensor& token_offsets, int64_t chunk_size, int64_t chunks,
                              std::optional<ScalarType> routing_dtype) {
  const char* op = "pool_chunks";
  check_tensor(op, "values", values, {-1, -1, -1}, std::nullopt);
  STD_TORCH_CHECK(is_floating(values.scalar_type()), op, ": `values` must be floating, got ", shape_of(values));
  check_tensor(op, "keys", keys, {values.size(0), values.size(1), values.size(2)}, values.scalar_type());
  check_tensor(op, "router_keys", router_keys, {values.size(0), values.size(1), values.size(2)}, values.scalar_type());
  check_tensor(op, "token_offsets", token_offsets, {-1}, ScalarType::Long);
  STD_TORCH_CHECK(token_offsets.size(0) >= 1, op, ": `token_offsets` must begin with 0");
  STD_TORCH_CHECK(chunk_size >= 1, op, ": `chunk_size` must be at least 1, got ", chunk_size);
  STD_TORCH_CHECK(chunks >= 0, op, ": `chunks` must not be negative, got ", chunks);
  check_heads(op, values, values.size(1), values.size(2));
  STD_TORCH_CHECK(!routing_dtype || is_quantized(*routing_dtype), op,
                  ": `routing_dtype` must be int8, float8_e4m3fn or None, got ",
                  torch::headeronly::toString(routing_dtype.value_or(ScalarType::Float)));
  check_device(op, "keys", keys, values);
  check_device(op, "router_keys", router_keys, values);
  check_device(op, "token_offsets", token_offsets, values);
}

inline void check_pool_chunks_backward(const Tensor& grad_content, const Tensor& grad_routing_keys,
                                       const Tensor& router_keys, const Tensor& token_offsets, int64_t chunk_size) {
  const char* op = "pool_chunks_backward";
  check_tensor(op, "router_keys", router_keys, {-1, -1, -1}, std::nullopt);
  STD_TORCH_CHECK(is_floating(router_keys.scalar_type()), op, ": `router_keys` must be floating, got ",
                  shape_of(router_keys));
  const int64_t groups = router_keys.size(1), dim = router_keys.size(2);
  check_heads(op, router_keys, groups, dim);
  check_tensor(op, "grad_content", grad_content, {-1, 2, groups, dim}, std::nullopt);
  check_tensor(op, "grad_routing_keys", grad_routing_keys, {grad_content.size(0), groups * dim}, std::nullopt);
  STD_TORCH_CHECK(is_floating(grad_content.scalar_type()) && is_floating(grad_routing_keys.scalar_type()), op,
                  ": gradients must be floating, got ", shape_of(grad_content), " and ", shape_of(grad_routing_keys));
  check_tensor(op, "token_offsets", token_offsets, {-1}, ScalarType::Long);
  STD_TORCH_CHECK(token_offsets.size(0) >= 1, op, ": `token_offsets` must begin with 0");
  STD_TORCH_CHECK(chunk_size >= 1, op, ": `chunk_size` must be at least 1, got ", chunk_size);
  check_device(op, "grad_content", grad_content, router_keys);
  check_device(op, "grad_routing_keys", grad_routing_keys, router_keys);
  check_device(op, "token_offsets", token_offsets, router_keys);
}

// `content` and `scales` may lie in host memory: that is for the device's own kernel to take or to refuse.
inline void check_gather_documents(const Tensor& documents, const Tensor& offsets, const Tensor& content,
                                   const std::optional<Tensor>& scales, int64_t width,
                                   std::optional<ScalarType> dtype, std::optional<int64_t> first) {
  const char* op = "gather_documents";
  check_tensor(op, "documents", documents, {-1, -1}, ScalarType::Long);
  check_tensor(op, "offsets", offsets, {-1}, ScalarType::Long);
  STD_TORCH_CHECK(offsets.size(0) >= 1, op, ": `offsets` must begin with 0");
  check_tensor(op, "content", content, {-1, 2, -1, -1}, std::nullopt);
  const bool quantized = content.scalar_type() == ScalarType::Float8_e4m3fn;
  STD_TORCH_CHECK(quantized || is_floating(content.scalar_type()), op,
                  ": `content` must be floating or float8_e4m3fn, got ", shape_of(content));
  STD_TORCH_CHECK(quantized == scales.has_value(), op,
                  ": `scales` belong to float8_e4m3fn content, and only to it; this is ", shape_of(content));
  if (scales) check_tensor(op, "scales", *scales, {content.size(0), 2}, ScalarType::Float);
  STD_TORCH_CHECK(!dtype || is_floating(*dtype), op, ": `dtype` must be floating, got ",
                  torch::headeronly::toString(dtype.value_or(ScalarType::Float)));
  check_size(op, "width", width, 0);
  STD_TORCH_CHECK(!first || *first >= 0, op, ": `first` must be at least 0, got ", first.value_or(0));
  check_heads(op, content, content.size(2), content.size(3));
  check_device(op, "offsets", offsets, documents);
}

}  // namespace msa_hf
