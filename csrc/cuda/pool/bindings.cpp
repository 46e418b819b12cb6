// pool_chunks and its backward on CUDA: from tensors to the calls of pool_chunks.h, on the current stream.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/tensors.h"
#include "pool_chunks.h"

namespace msa_hf {
namespace {

Tensor with_dense_rows(const Tensor& tensor) {
  return tensor.size(2) == 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

TokenStates states_of(const Tensor& tensor, const void* data) {
  TokenStates states;
  states.data = data;
  states.token_stride = tensor.stride(0);
  states.head_stride = tensor.stride(1);
  return states;
}

Chunking chunking_of(const Tensor& offsets, int64_t chunks, int64_t chunk_size, const Tensor& states) {
  Chunking chunking;
  chunking.token_offsets = integers(offsets);
  chunking.documents = offsets.size(0) - 1;
  chunking.chunks = chunks;
  // A chunk larger than all tokens is as one of them all; kernels count it in 32 bits.
  chunking.chunk_size = static_cast<int>(std::min(chunk_size, std::clamp<int64_t>(states.size(0), 1, kMostSize)));
  chunking.groups = static_cast<int>(states.size(1));
  chunking.dim = static_cast<int>(states.size(2));
  chunking.tokens = states.size(0);
  return chunking;
}

// Where every block would take long to count the chunks of all documents, they are counted before; holds the memory.
std::optional<Tensor> count_chunks(Chunking& chunking, const Tensor& offsets, const Place& place, const char* op) {
  if (chunking.documents <= kFewDocuments) return std::nullopt;
  Tensor counted = make(offsets, {chunking.documents + 1}, ScalarType::Long);
  auto* data = static_cast<int64_t*>(counted.mutable_data_ptr());
  check(find_chunk_offsets(chunking.token_offsets, data, chunking.documents, chunking.chunk_size, place.stream), op);
  chunking.chunk_offsets = data;
  return counted;
}

std::tuple<Tensor, Tensor, Tensor> pool(const Tensor& keys, const Tensor& values, const Tensor& router_keys,
                                        const Tensor& token_offsets, int64_t chunk_size, int64_t chunks, bool normalize,
                                        std::optional<ScalarType> routing_dtype) {
  const char* op = "pool_chunks";
  check_pool_chunks(keys, values, router_keys, token_offsets, chunk_size, chunks, routing_dtype);
  const int64_t groups = values.size(1), dim = values.size(2);
  const Place place(values);
  Tensor offsets = torch::stable::contiguous(token_offsets);
  Tensor rows[3] = {with_dense_rows(keys), with_dense_rows(values), with_dense_rows(router_keys)};
  Tensor content = make(values, {chunks, 2, groups, dim}, values.scalar_type());
  Tensor routing_keys = make(values, {chunks, groups * dim}, routing_dtype.value_or(values.scalar_type()));
  Tensor scales = make(values, {routing_dtype ? chunks : 0}, ScalarType::Float);
  if (chunks == 0 || groups * dim == 0) return {content, routing_keys, scales};

  PoolForward call;
  call.chunking = chunking_of(offsets, chunks, chunk_size, values);
  const auto counted = count_chunks(call.chunking, offsets, place, op);
  call.keys = states_of(rows[0], rows[0].const_data_ptr());
  call.values = states_of(rows[1], rows[1].const_data_ptr());
  call.router_keys = states_of(rows[2], rows[2].const_data_ptr());
  call.input = call.content_type = type_of(values, op, "values");
  call.content = content.mutable_data_ptr();
  call.routing = routing_keys.mutable_data_ptr();
  call.routing_type = type_of(routing_keys, op, "routing_keys");
  call.scales = routing_dtype ? static_cast<float*>(scales.mutable_data_ptr()) : nullptr;
  call.normalize = normalize;
  check(pool_chunks_forward(call, place.stream), op);
  return {content, routing_keys, scales};
}

std::tuple<Tensor, Tensor, Tensor> pool_backward(const Tensor& grad_content, const Tensor& grad_routing_keys,
                                                 const Tensor& router_keys, const Tensor& token_offsets,
                                                 int64_t chunk_size, bool normalize) {
  const char* op = "pool_chunks_backward";
  check_pool_chunks_backward(grad_content, grad_routing_keys, router_keys, token_offsets, chunk_size);
  const int64_t tokens = router_keys.size(0), groups = router_keys.size(1), dim = router_keys.size(2);
  const Place place(router_keys);
  Tensor offsets = torch::stable::contiguous(token_offsets);
  Tensor content = torch::stable::contiguous(grad_content), routing = torch::stable::contiguous(grad_routing_keys);
  Tensor rows = with_dense_rows(router_keys);
  Tensor grads[3];
  for (Tensor& grad : grads) grad = make(router_keys, {tokens, groups, dim}, router_keys.scalar_type());
  if (tokens == 0 || groups * dim == 0) return {grads[0], grads[1], grads[2]};

  PoolBackward call;
  call.chunking = chunking_of(offsets, grad_content.size(0), chunk_size, router_keys);
  const auto counted = count_chunks(call.chunking, offsets, place, op);
  call.router_keys = states_of(rows, rows.const_data_ptr());
  call.input = type_of(router_keys, op, "router_keys");
  call.grad_content = content.const_data_ptr();
  call.grad_content_type = type_of(content, op, "grad_content");
  call.grad_routing = routing.const_data_ptr();
  call.grad_routing_type = type_of(routing, op, "grad_routing_keys");
  call.grad_keys = states_of(grads[0], grads[0].mutable_data_ptr());
  call.grad_values = states_of(grads[1], grads[1].mutable_data_ptr());
  call.grad_router_keys = states_of(grads[2], grads[2].mutable_data_ptr());
  call.normalize = normalize;
  check(pool_chunks_backward(call, place.stream), op);
  return {grads[0], grads[1], grads[2]};
}

}  // namespace
}  // namespace msa_hf

STABLE_TORCH_LIBRARY_IMPL(msa_hf, CUDA, m) {
  m.impl("pool_chunks", TORCH_BOX(&msa_hf::pool));
  m.impl("pool_chunks_backward", TORCH_BOX(&msa_hf::pool_backward));
}
