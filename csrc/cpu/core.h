// The CPU kernels of the operators: plain C++, no torch. Pointers come from bindings.cpp, which checks them.

#pragma once

#include <cstdint>
#include <string>

namespace msa_hf::cpu {

enum class Type { f64, f32, f16, bf16, i8, e4m3 };

// Calls body(begin, end, context) on pieces of [0, count), at once on as many threads as there may be.
struct Threads {
  int64_t count;  // how many there may be
  void (*run)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

  // body(task) for each of `tasks` tasks; threads take the next one as they come free.
  template <class Body>
  void each(int64_t tasks, const Body& body) const;
  // body(take) once per thread; take() gives the next task, or -1 at the end. For threads with buffers of their own.
  template <class Body>
  void workers(int64_t tasks, const Body& body) const;
};

// What of the processor the scoring kernels use. Every level computes the same function; a test runs all that are there.
enum class Level { generic, avx2, avx512, amx };
bool has_level(Level level);
Level best_level();
const char* level_name(Level level);

struct Route {
  // Routing tokens of all samples, one sample after the other: sample b has tokens starts[b] up to starts[b + 1].
  const float* queries;   // [tokens, width]
  const int64_t* starts;  // [samples + 1]
  int64_t samples, width;
  const void* keys;  // [chunks, width], rows `key_stride` numbers apart
  Type key_type;
  int64_t chunks, key_stride;
  const float* scales;     // [chunks] or nullptr
  const int64_t* offsets;  // [count + 1]
  int64_t count;           // documents
  const uint8_t* alive;    // [count], 0 for no, or nullptr
  int64_t k;
  int64_t* documents;  // [samples, k]
  float* scores;       // [samples, k]
};
void route_documents(const Route& route, Level level, const Threads& threads);

// [tokens, groups, dim]: any strides but a dense last dimension; counted in numbers.
struct Rows {
  const void* data;
  Type type;
  int64_t token_stride, group_stride;
};

// The sum of ceil(length / chunk_size).
int64_t chunks_of(const int64_t* token_offsets, int64_t count, int64_t chunk_size);

// Floating types of inputs and results are one `type`, the routing keys' aside.
struct Pool {
  Rows keys, values, router_keys;
  const int64_t* token_offsets;  // [count + 1]
  int64_t count, chunk_size, chunks, groups, dim;
  bool normalize;
  void* content;  // [chunks, 2, groups, dim]
  Type type;
  void* routing_keys;  // [chunks, groups * dim]
  Type routing_type;
  float* scales;  // [chunks] where routing_type is i8 or e4m3, else nullptr
};
void pool_chunks(const Pool& pool, const Threads& threads);

struct PoolBackward {
  const void* grad_content;  // [chunks, 2, groups, dim]
  Type content_type;
  const void* grad_routing_keys;  // [chunks, groups * dim]
  Type routing_type;
  Rows router_keys;                                   // read where `normalize`
  void *grad_keys, *grad_values, *grad_router_keys;  // [tokens, groups, dim] of `type`
  Type type;
  const int64_t* token_offsets;
  int64_t count, chunk_size, chunks, groups, dim;
  bool normalize;
};
// Gradients of tokens that no document has are left as they are.
void pool_chunks_backward(const PoolBackward& pool, const Threads& threads);

struct Gather {
  const int64_t* documents;  // [samples, k]
  int64_t samples, k;
  const int64_t* offsets;  // [documents of the bank + 1]
  const void* content;     // [chunks, 2, groups, dim]
  int64_t first, chunks;   // the bank's chunk that it begins with; rows of chunks that it does not have are zero
  Type content_type;
  int64_t groups, dim;
  const float* scales;  // [chunks, 2] or nullptr
  int64_t width;
  void *keys, *values;  // [samples, groups, width, dim] of `type`
  Type type;
  bool* valid;     // [samples, width]
  int64_t* slots;  // [samples, width]
};
void gather_documents(const Gather& gather, const Threads& threads);

}  // namespace msa_hf::cpu

#include <atomic>

namespace msa_hf::cpu {

template <class Body>
void Threads::workers(int64_t tasks, const Body& body) const {
  if (tasks <= 0) return;
  struct Shared {
    const Body& body;
    std::atomic<int64_t> next{0};
    int64_t tasks;
  } shared{body, {0}, tasks};
  auto work = [](int64_t begin, int64_t end, void* context) {
    auto& shared = *static_cast<Shared*>(context);
    auto take = [&shared]() -> int64_t {
      int64_t task = shared.next.fetch_add(1, std::memory_order_relaxed);
      return task < shared.tasks ? task : -1;
    };
    if (begin < end) shared.body(take);
  };
  int64_t wanted = tasks < count ? tasks : count;
  if (wanted <= 1) {
    work(0, 1, &shared);
  } else {
    run(wanted, work, &shared);
  }
}

template <class Body>
void Threads::each(int64_t tasks, const Body& body) const {
  workers(tasks, [&body](auto take) {
    for (int64_t task = take(); task >= 0; task = take()) body(task);
  });
}

}  // namespace msa_hf::cpu
