// The CPU kernels as torch operators: from tensors to pointers and back, with the numbers in offsets checked.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "core.h"
#include "numbers.h"

namespace msa_hf {

namespace {

using cpu::Type;

Type type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return Type::f64;
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Char: return Type::i8;
    case ScalarType::Float8_e4m3fn: return Type::e4m3;
    default: STD_TORCH_CHECK(false, "no such numbers on the CPU: ", torch::headeronly::toString(type));
  }
}

Type type_of(const Tensor& tensor) { return type_of(tensor.scalar_type()); }

void run(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

cpu::Threads threads() { return {static_cast<int64_t>(torch::stable::get_num_threads()), run}; }

Tensor make(std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::empty({shape.begin(), shape.size()}, type, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// The tensor itself where its numbers lie at multiples of their size, else a copy: compilers rely on it.
Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % cpu::size_of(type_of(tensor)) == 0 ? tensor : torch::stable::clone(tensor);
}

// [n] int64, dense and aligned.
Tensor dense_integers(const Tensor& tensor) {
  Tensor dense = torch::stable::contiguous(tensor);
  const auto address = reinterpret_cast<uintptr_t>(dense.const_data_ptr());
  return address % sizeof(int64_t) == 0 ? dense : torch::stable::clone(dense);
}

// Numbers that are true: memory of another type may hold others than 0 and 1.
const uint8_t* flags(const Tensor& tensor) { return static_cast<const uint8_t*>(tensor.const_data_ptr()); }

const int64_t* integers(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

// Offsets from 0 to `end`, or to any number, that never fall.
Tensor checked_offsets(const char* op, const char* name, const Tensor& offsets, std::optional<int64_t> end) {
  Tensor dense = dense_integers(offsets);
  const int64_t* values = integers(dense);
  const int64_t count = dense.size(0) - 1;
  bool rising = values[0] == 0 && values[count] == end.value_or(values[count]);
  for (int64_t i = 0; i < count; ++i) rising = rising && values[i] <= values[i + 1];
  STD_TORCH_CHECK(rising, op, ": `", name, "` must rise from 0",
                  end ? " to " + std::to_string(*end) : "");
  return dense;
}

// The tensor itself where its last dimension is dense and its numbers are aligned, else a copy.
Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool dense = tensor.stride(last) == 1 || tensor.size(last) == 1;
  return aligned(dense ? tensor : torch::stable::contiguous(tensor));
}

Tensor with_all_dense(const Tensor& tensor) { return aligned(torch::stable::contiguous(tensor)); }

cpu::Rows rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), type_of(tensor), tensor.stride(0), tensor.stride(1)};
}

std::tuple<Tensor, Tensor> route_documents(const Tensor& queries, const Tensor& routing_mask, const Tensor& keys,
                                           std::optional<Tensor> scales, const Tensor& offsets,
                                           std::optional<Tensor> alive, int64_t k, cpu::Level level) {
  check_route_documents(queries, routing_mask, keys, scales, offsets, alive, k);
  const int64_t samples = queries.size(0), tokens = queries.size(1), width = queries.size(2);
  Tensor limits = checked_offsets("route_documents", "offsets", offsets, keys.size(0));
  Tensor mask = torch::stable::contiguous(routing_mask), rows = with_dense_rows(keys), states = with_dense_rows(queries);
  const uint8_t* routes = flags(mask);

  std::vector<int64_t> starts(samples + 1, 0);
  for (int64_t sample = 0; sample < samples; ++sample) {
    starts[sample + 1] = starts[sample];
    for (int64_t token = 0; token < tokens; ++token) starts[sample + 1] += routes[sample * tokens + token] != 0;
  }
  std::vector<float> packed(starts[samples] * width);
  float* target = packed.data();
  const Type type = type_of(states);
  for (int64_t sample = 0; sample < samples; ++sample) {
    for (int64_t token = 0; token < tokens; ++token) {
      if (!routes[sample * tokens + token]) continue;
      const int64_t place = sample * states.stride(0) + token * states.stride(1);
      cpu::widen(static_cast<const char*>(states.const_data_ptr()) + place * cpu::size_of(type), type, width, target);
      target += width;
    }
  }

  std::optional<Tensor> factors, living;
  if (scales) factors = with_all_dense(*scales);
  if (alive) living = torch::stable::contiguous(*alive);
  Tensor documents = make({samples, k}, ScalarType::Long), scores = make({samples, k}, ScalarType::Float);
  cpu::Route route;
  route.queries = packed.data();
  route.starts = starts.data();
  route.samples = samples;
  route.width = width;
  route.keys = rows.const_data_ptr();
  route.key_type = type_of(rows);
  route.chunks = rows.size(0);
  route.key_stride = rows.stride(0);
  route.scales = factors ? static_cast<const float*>(factors->const_data_ptr()) : nullptr;
  route.offsets = integers(limits);
  route.count = limits.size(0) - 1;
  route.alive = living ? flags(*living) : nullptr;
  route.k = k;
  route.documents = static_cast<int64_t*>(documents.mutable_data_ptr());
  route.scores = static_cast<float*>(scores.mutable_data_ptr());
  for (int64_t chunk = 0; route.scales != nullptr && chunk < route.chunks; ++chunk) {
    STD_TORCH_CHECK(route.scales[chunk] >= 0.0f, "route_documents: `scales` must not be negative or NaN");
  }
  cpu::route_documents(route, level, threads());
  return {documents, scores};
}

std::tuple<Tensor, Tensor> route(const Tensor& queries, const Tensor& routing_mask, const Tensor& keys,
                                 std::optional<Tensor> scales, const Tensor& offsets, std::optional<Tensor> alive,
                                 int64_t k) {
  static const cpu::Level best = cpu::best_level();
  // For few keys it does not pay to bring the queries into the order of the matrix unit.
  const bool few = keys.dim() == 2 && keys.size(0) < 256;
  const cpu::Level level = few && best == cpu::Level::amx ? cpu::Level::avx512 : best;
  return route_documents(queries, routing_mask, keys, scales, offsets, alive, k, level);
}

// The same with the kernels of one level, for tests.
std::tuple<Tensor, Tensor> route_at(const Tensor& queries, const Tensor& routing_mask, const Tensor& keys,
                                    std::optional<Tensor> scales, const Tensor& offsets, std::optional<Tensor> alive,
                                    int64_t k, std::string level) {
  for (cpu::Level each : {cpu::Level::generic, cpu::Level::avx2, cpu::Level::avx512, cpu::Level::amx}) {
    if (level == cpu::level_name(each) && cpu::has_level(each)) {
      return route_documents(queries, routing_mask, keys, scales, offsets, alive, k, each);
    }
  }
  STD_TORCH_CHECK(false, "this machine has no level ", level);
}

std::tuple<Tensor, Tensor, Tensor> pool(const Tensor& keys, const Tensor& values, const Tensor& router_keys,
                                        const Tensor& token_offsets, int64_t chunk_size, int64_t chunks, bool normalize,
                                        std::optional<ScalarType> routing_dtype) {
  check_pool_chunks(keys, values, router_keys, token_offsets, chunk_size, chunks, routing_dtype);
  const int64_t groups = values.size(1), dim = values.size(2);
  Tensor limits = checked_offsets("pool_chunks", "token_offsets", token_offsets, values.size(0));
  const int64_t count = limits.size(0) - 1, needed = cpu::chunks_of(integers(limits), count, chunk_size);
  STD_TORCH_CHECK(chunks == needed, "pool_chunks: `chunks` must be ", needed, " for these documents, got ", chunks);
  Tensor key_rows = with_dense_rows(keys), value_rows = with_dense_rows(values),
         router_rows = with_dense_rows(router_keys);
  Tensor content = make({chunks, 2, groups, dim}, values.scalar_type());
  Tensor routing_keys = make({chunks, groups * dim}, routing_dtype.value_or(values.scalar_type()));
  Tensor scales = make({routing_dtype ? chunks : 0}, ScalarType::Float);
  if (groups * dim == 0 && !routing_dtype) return {content, routing_keys, scales};  // of any number of tokens
  cpu::Pool call;
  call.keys = rows_of(key_rows);
  call.values = rows_of(value_rows);
  call.router_keys = rows_of(router_rows);
  call.token_offsets = integers(limits);
  call.count = count;
  call.chunk_size = chunk_size;
  call.chunks = chunks;
  call.groups = groups;
  call.dim = dim;
  call.normalize = normalize;
  call.content = content.mutable_data_ptr();
  call.type = type_of(content);
  call.routing_keys = routing_keys.mutable_data_ptr();
  call.routing_type = type_of(routing_keys);
  call.scales = routing_dtype ? static_cast<float*>(scales.mutable_data_ptr()) : nullptr;
  cpu::pool_chunks(call, threads());
  return {content, routing_keys, scales};
}

std::tuple<Tensor, Tensor, Tensor> pool_backward(const Tensor& grad_content, const Tensor& grad_routing_keys,
                                                 const Tensor& router_keys, const Tensor& token_offsets,
                                                 int64_t chunk_size, bool normalize) {
  check_pool_chunks_backward(grad_content, grad_routing_keys, router_keys, token_offsets, chunk_size);
  const char* op = "pool_chunks_backward";
  const int64_t tokens = router_keys.size(0), groups = router_keys.size(1), dim = router_keys.size(2);
  Tensor limits = checked_offsets(op, "token_offsets", token_offsets, tokens);
  const int64_t count = limits.size(0) - 1, needed = cpu::chunks_of(integers(limits), count, chunk_size);
  STD_TORCH_CHECK(grad_content.size(0) == needed, op, ": these documents have ", needed, " chunks, the gradients ",
                  grad_content.size(0));
  const bool wide = router_keys.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(wide == (grad_content.scalar_type() == ScalarType::Double) &&
                      wide == (grad_routing_keys.scalar_type() == ScalarType::Double),
                  op, ": float64 gradients belong to float64 router keys, and only to them");
  Tensor content = with_all_dense(grad_content), routing = with_all_dense(grad_routing_keys);
  Tensor router_rows = with_dense_rows(router_keys);
  Tensor grads[3];
  for (Tensor& grad : grads) grad = make({tokens, groups, dim}, router_keys.scalar_type());
  if (groups * dim == 0) return {grads[0], grads[1], grads[2]};
  cpu::PoolBackward call;
  call.grad_content = content.const_data_ptr();
  call.content_type = type_of(content);
  call.grad_routing_keys = routing.const_data_ptr();
  call.routing_type = type_of(routing);
  call.router_keys = rows_of(router_rows);
  call.grad_keys = grads[0].mutable_data_ptr();
  call.grad_values = grads[1].mutable_data_ptr();
  call.grad_router_keys = grads[2].mutable_data_ptr();
  call.type = type_of(router_keys);
  call.token_offsets = integers(limits);
  call.count = count;
  call.chunk_size = chunk_size;
  call.chunks = needed;
  call.groups = groups;
  call.dim = dim;
  call.normalize = normalize;
  cpu::pool_chunks_backward(call, threads());
  return {grads[0], grads[1], grads[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather(const Tensor& documents, const Tensor& offsets, const Tensor& content,
                                                  std::optional<Tensor> scales, int64_t width,
                                                  std::optional<ScalarType> dtype, std::optional<int64_t> first) {
  check_gather_documents(documents, offsets, content, scales, width, dtype, first);
  const char* op = "gather_documents";
  check_device(op, "content", content, documents);
  if (scales) check_device(op, "scales", *scales, documents);
  const int64_t samples = documents.size(0), k = documents.size(1), groups = content.size(2), dim = content.size(3);
  Tensor limits = checked_offsets(op, "offsets", offsets, first ? std::nullopt : std::optional(content.size(0)));
  Tensor chosen = dense_integers(documents), rows = with_all_dense(content);
  for (int64_t sample = 0; k > 0 && sample < samples; ++sample) {
    int64_t needed = 0;
    for (int64_t i = sample * k; i < (sample + 1) * k; ++i) {
      const int64_t document = integers(chosen)[i], count = limits.size(0) - 1;
      STD_TORCH_CHECK(document < count, op, ": there is no document ", document, ", only ", count, " documents");
      if (document >= 0) needed += integers(limits)[document + 1] - integers(limits)[document];
    }
    STD_TORCH_CHECK(needed <= width, op, ": `width` is ", width, ", but the documents of a sample have ", needed,
                    " chunks");
  }
  std::optional<Tensor> factors;
  if (scales) factors = with_all_dense(*scales);
  const ScalarType type =
      dtype.value_or(scales ? ScalarType::Float : content.scalar_type());
  Tensor keys = make({samples, groups, width, dim}, type), values = make({samples, groups, width, dim}, type);
  Tensor valid = make({samples, width}, ScalarType::Bool), slots = make({samples, width}, ScalarType::Long);
  cpu::Gather call;
  call.documents = integers(chosen);
  call.samples = samples;
  call.k = k;
  call.offsets = integers(limits);
  call.content = rows.const_data_ptr();
  call.first = first.value_or(0);
  call.chunks = content.size(0);
  call.content_type = type_of(rows);
  call.groups = groups;
  call.dim = dim;
  call.scales = factors ? static_cast<const float*>(factors->const_data_ptr()) : nullptr;
  call.width = width;
  call.keys = keys.mutable_data_ptr();
  call.values = values.mutable_data_ptr();
  call.type = type_of(type);
  call.valid = static_cast<bool*>(valid.mutable_data_ptr());
  call.slots = static_cast<int64_t*>(slots.mutable_data_ptr());
  cpu::gather_documents(call, threads());
  return {keys, values, valid, slots};
}

}  // namespace

// For build_info in ops.cpp.
std::string cpu_info() {
  std::string levels;
  for (cpu::Level level : {cpu::Level::generic, cpu::Level::avx2, cpu::Level::avx512, cpu::Level::amx}) {
    if (cpu::has_level(level)) levels += std::string(levels.empty() ? "" : ", ") + cpu::level_name(level);
  }
  return levels;
}

}  // namespace msa_hf

STABLE_TORCH_LIBRARY_FRAGMENT(msa_hf, m) {
  m.def(
      "_route_documents_at(Tensor queries, Tensor routing_mask, Tensor keys, Tensor? scales, Tensor offsets, "
      "Tensor? alive, int k, str level) -> (Tensor documents, Tensor scores)");
}

STABLE_TORCH_LIBRARY_IMPL(msa_hf, CPU, m) {
  m.impl("route_documents", TORCH_BOX(&msa_hf::route));
  m.impl("_route_documents_at", TORCH_BOX(&msa_hf::route_at));
  m.impl("pool_chunks", TORCH_BOX(&msa_hf::pool));
  m.impl("pool_chunks_backward", TORCH_BOX(&msa_hf::pool_backward));
  m.impl("gather_documents", TORCH_BOX(&msa_hf::gather));
}
