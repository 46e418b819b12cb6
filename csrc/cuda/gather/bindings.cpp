// gather_documents on CUDA: from tensors to the calls of gather_documents.h and staging.h.
//
// Everything runs on the current stream of the tensors' device. Only one thing ever waits for the device: a staging
// buffer that has to grow (staging.h).

#include <torch/csrc/stable/library.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/tensors.h"
#include "gather_documents.h"
#include "staging.h"

namespace msa_hf {
namespace {

constexpr int kStagingSlots = 4;
constexpr int kStagingHelpers = 3;

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
                                                  std::optional<ScalarType> dtype, std::optional<int64_t> first) {
  const char* op = "gather_documents";
  check_gather_documents(documents, offsets, content, scales, width, dtype, first);
  const int64_t batch = documents.size(0), k = documents.size(1), groups = content.size(2), dim = content.size(3);
  STD_TORCH_CHECK(documents.is_cuda(), op, ": `documents` must lie on the device, and `content` there or in host memory");
  STD_TORCH_CHECK(content.is_cpu() || content.get_device() == documents.get_device(), op,
                  ": `content` lies on another device than `documents`");
  if (scales) check_device(op, "scales", *scales, content);
  STD_TORCH_CHECK(!first || content.is_cuda(), op, ": a part of the chunks must lie on the device");
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
  call.part = first.has_value();
  call.first = first.value_or(0);
  call.batch = static_cast<int>(batch);
  call.k = static_cast<int>(k);
  call.width = static_cast<int>(width);
  call.groups = static_cast<int>(groups);
  call.dim = static_cast<int>(dim);
  call.content = rows.const_data_ptr();
  call.content_type = type_of(rows, op, "content");
  call.output_type = type_of(type, op, "dtype");
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

STABLE_TORCH_LIBRARY_IMPL(msa_hf, CUDA, m) { m.impl("gather_documents", TORCH_BOX(&msa_hf::gather)); }
