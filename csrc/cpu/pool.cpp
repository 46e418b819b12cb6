// pool_chunks and its derivative: every token is read once; sums are taken in float32, those of float64 in float64.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core.h"
#include "numbers.h"

namespace msa_hf::cpu {

namespace {

constexpr double kEpsilon = 1e-12;  // inside the root, as in routing_msa.normalize_heads
// Chunks that one task takes.
constexpr int64_t kChunks = 16;

struct Span {
  int64_t start, length;  // tokens
};

// Where the tokens of a chunk lie; `chunk_offsets` [count + 1].
Span span_of(int64_t chunk, const int64_t* token_offsets, const int64_t* chunk_offsets, int64_t count,
             int64_t chunk_size) {
  const int64_t document = std::upper_bound(chunk_offsets, chunk_offsets + count + 1, chunk) - chunk_offsets - 1;
  const int64_t start = token_offsets[document] + (chunk - chunk_offsets[document]) * chunk_size;
  return {start, std::min(chunk_size, token_offsets[document + 1] - start)};
}

const char* row_of(const Rows& rows, int64_t token, int64_t group) {
  return static_cast<const char*>(rows.data) +
         (token * rows.token_stride + group * rows.group_stride) * size_of(rows.type);
}

template <class Number, class Widen, class Real>
void add_row(const char* source, int64_t dim, Widen widen_one, Real* target) {
  auto* numbers = reinterpret_cast<const Number*>(source);
  for (int64_t i = 0; i < dim; ++i) target[i] += widen_one(numbers[i]);
}

void add_row(const char* source, Type type, int64_t dim, float* target) {
  switch (type) {
    case Type::f32: return add_row<float>(source, dim, [](float x) { return x; }, target);
    case Type::f16: return add_row<uint16_t>(source, dim, [](uint16_t x) { return from_f16(x); }, target);
    default: return add_row<uint16_t>(source, dim, [](uint16_t x) { return from_bf16(x); }, target);
  }
}

void add_row(const char* source, Type, int64_t dim, double* target) {
  add_row<double>(source, dim, [](double x) { return x; }, target);
}

void widen(const void* source, Type, int64_t count, double* target) {
  std::memcpy(target, source, static_cast<size_t>(count) * sizeof(double));
}

void narrow(const double* source, int64_t count, Type, void* target) {
  std::memcpy(target, source, static_cast<size_t>(count) * sizeof(double));
}

// The mean of a chunk's tokens, [groups * dim].
template <class Real>
void mean(const Rows& rows, Span span, int64_t groups, int64_t dim, Real* target) {
  std::fill(target, target + groups * dim, Real(0));
  if (groups * dim == 0) return;
  const bool dense = rows.group_stride == dim || groups == 1;
  for (int64_t token = span.start; token < span.start + span.length; ++token) {
    if (dense) {
      add_row(row_of(rows, token, 0), rows.type, groups * dim, target);
    } else {
      for (int64_t group = 0; group < groups; ++group) {
        add_row(row_of(rows, token, group), rows.type, dim, target + group * dim);
      }
    }
  }
  const Real length = static_cast<Real>(std::max<int64_t>(span.length, 1));
  for (int64_t i = 0; i < groups * dim; ++i) target[i] /= length;
}

template <class Real>
Real inverse_norm(const Real* vector, int64_t dim) {
  Real total = 0;
  for (int64_t i = 0; i < dim; ++i) total += vector[i] * vector[i];
  return Real(1) / std::sqrt(total + Real(kEpsilon));
}

// The scale of a routing key, as quantize.quantize_keys chooses it; the numbers are written to `target`.
template <class Real>
float quantize(const Real* key, int64_t width, Type type, void* target) {
  const float limit = type == Type::i8 ? 127.0f : 448.0f;
  float largest = 0.0f;
  for (int64_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(static_cast<float>(key[i])));
  const float scale = largest > 0.0f ? std::max(largest / limit, std::numeric_limits<float>::min()) : 1.0f;
  for (int64_t i = 0; i < width; ++i) {
    const float number = std::min(std::max(static_cast<float>(key[i]) / scale, -limit), limit);
    if (type == Type::i8) {
      static_cast<int8_t*>(target)[i] = static_cast<int8_t>(std::nearbyint(number));
    } else {
      static_cast<uint8_t*>(target)[i] = to_e4m3(number);
    }
  }
  return scale;
}

template <class Body>
void each_chunk(int64_t chunks, const Threads& threads, const Body& body) {
  threads.each((chunks + kChunks - 1) / kChunks, [&](int64_t task) {
    body(task * kChunks, std::min((task + 1) * kChunks, chunks));
  });
}

// Chunk offsets [count + 1] of documents with these token offsets.
std::vector<int64_t> chunk_offsets_of(const int64_t* token_offsets, int64_t count, int64_t chunk_size) {
  std::vector<int64_t> offsets(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = token_offsets[i + 1] - token_offsets[i];
    offsets[i + 1] = offsets[i] + length / chunk_size + (length % chunk_size != 0);
  }
  return offsets;
}

template <class Real>
void forward(const Pool& pool, const Threads& threads) {
  const std::vector<int64_t> chunk_offsets = chunk_offsets_of(pool.token_offsets, pool.count, pool.chunk_size);
  const int64_t width = pool.groups * pool.dim;
  each_chunk(pool.chunks, threads, [&](int64_t first, int64_t stop) {
    std::vector<Real> sums(width);
    for (int64_t chunk = first; chunk < stop; ++chunk) {
      const Span span = span_of(chunk, pool.token_offsets, chunk_offsets.data(), pool.count, pool.chunk_size);
      for (int part = 0; part < 2; ++part) {
        mean(part == 0 ? pool.keys : pool.values, span, pool.groups, pool.dim, sums.data());
        char* target = static_cast<char*>(pool.content) + (chunk * 2 + part) * width * size_of(pool.type);
        narrow(sums.data(), width, pool.type, target);
      }
      mean(pool.router_keys, span, pool.groups, pool.dim, sums.data());
      for (int64_t group = 0; pool.normalize && group < pool.groups; ++group) {
        Real* head = sums.data() + group * pool.dim;
        const Real factor = inverse_norm(head, pool.dim);
        for (int64_t i = 0; i < pool.dim; ++i) head[i] *= factor;
      }
      char* target = static_cast<char*>(pool.routing_keys) + chunk * width * size_of(pool.routing_type);
      if (pool.scales != nullptr) {
        pool.scales[chunk] = quantize(sums.data(), width, pool.routing_type, target);
      } else {
        narrow(sums.data(), width, pool.routing_type, target);
      }
    }
  });
}

template <class Real>
void backward(const PoolBackward& pool, const Threads& threads) {
  const std::vector<int64_t> chunk_offsets = chunk_offsets_of(pool.token_offsets, pool.count, pool.chunk_size);
  const int64_t width = pool.groups * pool.dim;
  const int64_t bytes = width * size_of(pool.type);
  each_chunk(pool.chunks, threads, [&](int64_t first, int64_t stop) {
    std::vector<Real> gradient(width), unit(width);
    std::vector<char> row(bytes);
    for (int64_t chunk = first; chunk < stop; ++chunk) {
      const Span span = span_of(chunk, pool.token_offsets, chunk_offsets.data(), pool.count, pool.chunk_size);
      auto spread = [&](void* grads) {  // every token of a chunk has the same share
        const Real length = static_cast<Real>(std::max<int64_t>(span.length, 1));
        for (int64_t i = 0; i < width; ++i) gradient[i] /= length;
        narrow(gradient.data(), width, pool.type, row.data());
        for (int64_t token = span.start; token < span.start + span.length; ++token) {
          std::memcpy(static_cast<char*>(grads) + token * bytes, row.data(), static_cast<size_t>(bytes));
        }
      };
      for (int part = 0; part < 2; ++part) {
        widen(static_cast<const char*>(pool.grad_content) + (chunk * 2 + part) * width * size_of(pool.content_type),
              pool.content_type, width, gradient.data());
        spread(part == 0 ? pool.grad_keys : pool.grad_values);
      }
      widen(static_cast<const char*>(pool.grad_routing_keys) + chunk * width * size_of(pool.routing_type),
            pool.routing_type, width, gradient.data());
      if (pool.normalize) {
        // y = r * mean, r = (|mean|^2 + epsilon)^(-1/2):  d mean = r * (g - y * <y, g>).
        mean(pool.router_keys, span, pool.groups, pool.dim, unit.data());
        for (int64_t group = 0; group < pool.groups; ++group) {
          Real *y = unit.data() + group * pool.dim, *g = gradient.data() + group * pool.dim;
          const Real r = inverse_norm(y, pool.dim);
          Real product = 0;
          for (int64_t i = 0; i < pool.dim; ++i) {
            y[i] *= r;
            product += y[i] * g[i];
          }
          for (int64_t i = 0; i < pool.dim; ++i) g[i] = r * (g[i] - y[i] * product);
        }
      }
      spread(pool.grad_router_keys);
    }
  });
}

}  // namespace

int64_t chunks_of(const int64_t* token_offsets, int64_t count, int64_t chunk_size) {
  return chunk_offsets_of(token_offsets, count, chunk_size).back();
}

void pool_chunks(const Pool& pool, const Threads& threads) {
  pool.type == Type::f64 ? forward<double>(pool, threads) : forward<float>(pool, threads);
}

void pool_chunks_backward(const PoolBackward& pool, const Threads& threads) {
  pool.type == Type::f64 ? backward<double>(pool, threads) : backward<float>(pool, threads);
}

}  // namespace msa_hf::cpu
