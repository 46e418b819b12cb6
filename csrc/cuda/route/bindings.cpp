// route_documents and rescore_documents on CUDA: from tensors to the calls of route_documents.h.
//
// Everything runs on the current stream of the tensors' device, and nothing waits for it.

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../common/tensors.h"
#include "route_documents.h"

namespace msa_hf {
namespace {

// A workspace lives until the call's kernels are queued: whoever gets its memory next on this stream runs after them.
Tensor make_workspace(const Tensor& like, size_t bytes) {
  return make(like, {static_cast<int64_t>(bytes > 0 ? bytes : 1)}, ScalarType::Byte);  // of no bytes: no address
}

std::tuple<Tensor, Tensor> route_documents(const Tensor& queries, const Tensor& routing_mask, const Tensor& keys,
                                           std::optional<Tensor> scales, const Tensor& offsets,
                                           std::optional<Tensor> alive, int64_t k) {
  const char* op = "route_documents";
  check_route_documents(queries, routing_mask, keys, scales, offsets, alive, k);
  const Place place(queries);
  const Tensor states = torch::stable::contiguous(queries), mask = torch::stable::contiguous(routing_mask);
  const Tensor rows = torch::stable::contiguous(keys), limits = torch::stable::contiguous(offsets);
  std::optional<Tensor> factors, living;
  if (scales) factors = torch::stable::contiguous(*scales);
  if (alive) living = torch::stable::contiguous(*alive);
  Tensor documents = make(queries, {queries.size(0), k}, ScalarType::Long);
  Tensor scores = make(queries, {queries.size(0), k}, ScalarType::Float);

  route::Call call;
  call.queries = states.const_data_ptr();
  call.query_type = type_of(states, op, "queries");
  call.mask = static_cast<const bool*>(mask.const_data_ptr());
  call.keys = rows.const_data_ptr();
  call.key_type = type_of(rows, op, "keys");
  call.offsets = static_cast<const int64_t*>(limits.const_data_ptr());
  call.alive = living ? static_cast<const bool*>(living->const_data_ptr()) : nullptr;
  call.samples = queries.size(0);
  call.tokens = queries.size(1);
  call.width = queries.size(2);
  call.chunks = keys.size(0);
  // Memory of no bytes may have no address, which would say that there are no scales: any other is as good then.
  const void* factors_at = !factors ? nullptr : call.chunks > 0 ? factors->const_data_ptr() : limits.const_data_ptr();
  call.scales = static_cast<const float*>(factors_at);
  call.documents = offsets.size(0) - 1;
  call.k = k;
  call.chosen = static_cast<int64_t*>(documents.mutable_data_ptr());
  call.chosen_scores = static_cast<float*>(scores.mutable_data_ptr());
  if (call.samples == 0 || k == 0) return {documents, scores};
  const route::Plan plan = route::plan(call);
  STD_TORCH_CHECK(plan.error == nullptr, op, " on CUDA: ", plan.error ? plan.error : "");
  const Tensor workspace = make_workspace(queries, plan.workspace);
  check(route::route_documents(call, plan, workspace.mutable_data_ptr(), place.stream), op);
  return {documents, scores};
}

std::tuple<Tensor, Tensor> rescore_documents(const Tensor& queries, const Tensor& routing_mask, const Tensor& exact_keys,
                                             const Tensor& offsets, const Tensor& candidates, int64_t k) {
  const char* op = "rescore_documents";
  check_tensor(op, "queries", queries, {-1, -1, -1}, std::nullopt);
  check_tensor(op, "routing_mask", routing_mask, {queries.size(0), queries.size(1)}, ScalarType::Bool);
  check_tensor(op, "exact_keys", exact_keys, {-1, queries.size(2)}, std::nullopt);
  STD_TORCH_CHECK(is_floating(queries.scalar_type()) && is_floating(exact_keys.scalar_type()), op,
                  ": `queries` and `exact_keys` must be floating, got ", shape_of(queries), " and ", shape_of(exact_keys));
  check_tensor(op, "offsets", offsets, {-1}, ScalarType::Long);
  STD_TORCH_CHECK(offsets.size(0) >= 1, op, ": `offsets` must begin with 0");
  check_tensor(op, "candidates", candidates, {queries.size(0), -1}, ScalarType::Long);
  check_device(op, "routing_mask", routing_mask, queries);
  check_device(op, "offsets", offsets, queries);
  check_device(op, "candidates", candidates, queries);
  STD_TORCH_CHECK(k >= 0 && k <= route::kMostRescored, op, " on CUDA: `k` must be from 0 to ", route::kMostRescored,
                  ", got ", k);
  STD_TORCH_CHECK(queries.size(2) <= route::kMostWidthRescored, op, " on CUDA: keys of at most ",
                  route::kMostWidthRescored, " numbers, got ", queries.size(2));
  STD_TORCH_CHECK(queries.size(0) <= 65535, op, " on CUDA: at most 65535 samples");
  STD_TORCH_CHECK(exact_keys.is_cpu() || exact_keys.get_device() == queries.get_device(), op,
                  ": `exact_keys` must lie on the device of `queries` or in host memory");
  STD_TORCH_CHECK(exact_keys.is_contiguous(), op, ": `exact_keys` must be contiguous");
  const Place place(queries);
  const Tensor states = torch::stable::contiguous(queries), mask = torch::stable::contiguous(routing_mask);
  const Tensor limits = torch::stable::contiguous(offsets), given = torch::stable::contiguous(candidates);
  Tensor documents = make(queries, {queries.size(0), k}, ScalarType::Long);
  Tensor scores = make(queries, {queries.size(0), k}, ScalarType::Float);

  route::Rescore call;
  call.queries = states.const_data_ptr();
  call.query_type = type_of(states, op, "queries");
  call.mask = static_cast<const bool*>(mask.const_data_ptr());
  call.keys = exact_keys.size(0) > 0 ? device_address(exact_keys) : nullptr;
  STD_TORCH_CHECK(call.keys != nullptr || exact_keys.size(0) == 0, op,
                  " on CUDA: `exact_keys` in host memory must be pinned");
  call.key_type = type_of(exact_keys, op, "exact_keys");
  call.keys_on_host = exact_keys.is_cpu();
  call.offsets = static_cast<const int64_t*>(limits.const_data_ptr());
  call.candidates = static_cast<const int64_t*>(given.const_data_ptr());
  call.samples = queries.size(0);
  call.tokens = queries.size(1);
  call.width = queries.size(2);
  call.documents = exact_keys.size(0) > 0 ? offsets.size(0) - 1 : 0;
  call.count = candidates.size(1);
  call.k = k;
  call.chosen = static_cast<int64_t*>(documents.mutable_data_ptr());
  call.chosen_scores = static_cast<float*>(scores.mutable_data_ptr());
  if (call.samples == 0 || k == 0) return {documents, scores};
  const Tensor workspace = make_workspace(queries, route::rescore_workspace(call));
  check(route::rescore_documents(call, workspace.mutable_data_ptr(), place.stream), op);
  return {documents, scores};
}

}  // namespace
}  // namespace msa_hf

STABLE_TORCH_LIBRARY_IMPL(msa_hf, CUDA, m) {
  m.impl("route_documents", TORCH_BOX(&msa_hf::route_documents));
}

// Only here: exact scores of candidates, from keys on the device or in pinned host memory, and the k best of them.
//   candidates  [B, m] int64, -1 for none; the rest and the result as for route_documents
STABLE_TORCH_LIBRARY_FRAGMENT(msa_hf, m) {
  m.def(
      "rescore_documents(Tensor queries, Tensor routing_mask, Tensor exact_keys, Tensor offsets, Tensor candidates, "
      "int k) -> (Tensor documents, Tensor scores)");
}
STABLE_TORCH_LIBRARY_IMPL(msa_hf, CUDA, rescoring) {
  rescoring.impl("rescore_documents", TORCH_BOX(&msa_hf::rescore_documents));
}
