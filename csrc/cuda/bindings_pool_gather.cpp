// pool_chunks, its backward and gather_documents on CUDA: from tensors to the calls of pool_gather.h.
//
// Everything runs on the current stream of the tensors' device. Only one thing ever waits for the device: a staging
// buffer that has to grow (staging.h).

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "pool_gather.h"
#include "problem.h"
#include "staging.h"

namespace msa_hf {
namespace {

constexpr int kStagingSlots = 4;
constexpr int kStagingHelpers = 3;

Format format_of(ScalarType type, const char* op) {
  switch (type) {
    case ScalarType::Float: return Format::float32;
    case ScalarType::BFloat16: return Format::bfloat16;
    case ScalarType::Half: return Format::float16;
    case ScalarType::Char: return Format::int8;
    case ScalarType::Float8_e4m3fn: return Format::float8_e4m3;
    default: STD_TORCH_CHECK(false, op, ": no such numbers on CUDA: ", torch::headeronly::toString(type));
  }
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

void check(cudaError_t status, const char* op) {
  STD_TORCH_CHECK(status == cudaSuccess, op, " on CUDA: ", explain(status));
}

Tensor make(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, type);
}

const int64_t* integers(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

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
  chunking.chunk_size = static_cast<int>(chunk_size);
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
  call.input = call.content_format = format_of(values.scalar_type(), op);
  call.content = content.mutable_data_ptr();
  call.routing = routing_keys.mutable_data_ptr();
  call.routing_format = format_of(routing_keys.scalar_type(), op);
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
  call.input = format_of(router_keys.scalar_type(), op);
  call.grad_content = content.const_data_ptr();
  call.grad_content_format = format_of(content.scalar_type(), op);
  call.grad_routing = routing.const_data_ptr();
  call.grad_routing_format = format_of(routing.scalar_type(), op);
  call.grad_keys = states_of(grads[0], grads[0].mutable_data_ptr());
  call.grad_values = states_of(grads[1], grads[1].mutable_data_ptr());
  call.grad_router_keys = states_of(grads[2], grads[2].mutable_data_ptr());
  call.normalize = normalize;
  check(pool_chunks_backward(call, place.stream), op);
  return {grads[0], grads[1], grads[2]};
}

// The address under which the device reads a host tensor, null where it is not pinned.
const void* device_address(const Tensor& tensor) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, tensor.const_data_ptr()) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return attributes.type == cudaMemoryTypeHost ? attributes.devicePointer : nullptr;
}

StagingRing& ring_of(int device) {
  static std::mutex mutex;
  // Never destroyed: at the end of a process its memory and events may already be gone with the CUDA context.
  static auto& rings = *new std::map<int, std::unique_ptr<StagingRing>>;
  std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<StagingRing>& ring = rings[device];
  if (!ring) ring = std::make_unique<StagingRing>(kStagingSlots, kStagingHelpers);
  return *ring;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather(const Tensor& documents, const Tensor& offsets, const Tensor& content,
                                                  std::optional<Tensor> scales, int64_t width,
                                                  std::optional<ScalarType> dtype) {
  const char* op = "gather_documents";
  check_gather_documents(documents, offsets, content, scales, width, dtype);
  const int64_t batch = documents.size(0), k = documents.size(1), groups = content.size(2), dim = content.size(3);
  STD_TORCH_CHECK(documents.is_cuda(), op, ": `documents` must lie on the device, and `content` there or in host memory");
  STD_TORCH_CHECK(content.is_cpu() || content.get_device() == documents.get_device(), op,
                  ": `content` lies on another device than `documents`");
  if (scales) check_device(op, "scales", *scales, content);
  STD_TORCH_CHECK(k <= kMostGathered, op, ": at most ", kMostGathered, " documents per sample on CUDA, got ", k);
  STD_TORCH_CHECK(batch <= 65535 && width < (int64_t{1} << 31), op, ": at most 65535 samples of 2^31 rows on CUDA");
  const Place place(documents);
  Tensor chosen = torch::stable::contiguous(documents), limits = torch::stable::contiguous(offsets);
  Tensor rows = torch::stable::contiguous(content);
  std::optional<Tensor> factors;
  if (scales) factors = torch::stable::contiguous(*scales);
  const ScalarType type = dtype.value_or(scales ? ScalarType::Float : content.scalar_type());
  Tensor keys = make(documents, {batch, groups, width, dim}, type);
  Tensor values = make(documents, {batch, groups, width, dim}, type);
  Tensor valid = make(documents, {batch, width}, ScalarType::Bool);
  Tensor slots = make(documents, {batch, width}, ScalarType::Long);

  GatherCall call;
  call.documents = integers(chosen);
  call.offsets = integers(limits);
  call.num_documents = limits.size(0) - 1;
  call.chunks = rows.size(0);
  call.batch = static_cast<int>(batch);
  call.k = static_cast<int>(k);
  call.width = static_cast<int>(width);
  call.groups = static_cast<int>(groups);
  call.dim = static_cast<int>(dim);
  call.content = rows.const_data_ptr();
  call.content_format = format_of(rows.scalar_type(), op);
  call.output_format = format_of(type, op);
  call.scales = factors ? static_cast<const float*>(factors->const_data_ptr()) : nullptr;
  call.keys = keys.mutable_data_ptr();
  call.values = values.mutable_data_ptr();
  call.valid = static_cast<bool*>(valid.mutable_data_ptr());
  call.slots = static_cast<int64_t*>(slots.mutable_data_ptr());
  if (batch == 0 || width == 0) return {keys, values, valid, slots};
  if (rows.is_cuda() || rows.size(0) == 0) {  // of content without chunks nothing is read, wherever it lies
    check(gather_documents(call, place.stream), op);
    return {keys, values, valid, slots};
  }
  const void* content_address = device_address(rows);
  const void* scales_address = factors ? device_address(*factors) : nullptr;
  if (content_address != nullptr && (!factors || scales_address != nullptr)) {
    // The kernel reads the host's memory after this returns: the caller keeps `content`, as for a copy that does not wait.
    call.content = content_address;
    call.scales = static_cast<const float*>(scales_address);
    check(gather_documents(call, place.stream), op);
  } else {
    auto owner = std::make_shared<std::vector<Tensor>>(std::vector<Tensor>{rows});
    if (factors) owner->push_back(*factors);
    check(ring_of(documents.get_device()).gather(call, std::move(owner), place.stream), op);
  }
  return {keys, values, valid, slots};
}

}  // namespace
}  // namespace msa_hf

STABLE_TORCH_LIBRARY_IMPL(msa_hf, CUDA, m) {
  m.impl("pool_chunks", TORCH_BOX(&msa_hf::pool));
  m.impl("pool_chunks_backward", TORCH_BOX(&msa_hf::pool_backward));
  m.impl("gather_documents", TORCH_BOX(&msa_hf::gather));
}
