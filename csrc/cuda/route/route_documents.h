// Launchers of route_documents: plain pointers, a stream and a workspace; no torch.
//
// Nothing here allocates, synchronizes or reads device memory on the host, so every call can be captured in a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../common/types.h"

namespace msa_hf::route {

// The call of csrc/ops.cpp. All tensors contiguous and on one device.
struct Call {
  const void* queries = nullptr;  // [samples, tokens, width]
  Type query_type = Type::f32;    // f32, bf16, f16
  const bool* mask = nullptr;     // [samples, tokens]
  const void* keys = nullptr;     // [chunks, width]
  Type key_type = Type::bf16;
  const float* scales = nullptr;     // [chunks] where key_type is e4m3 or s8
  const int64_t* offsets = nullptr;  // [documents + 1]
  const bool* alive = nullptr;       // [documents] or null
  int64_t samples = 0, tokens = 0, width = 0, chunks = 0, documents = 0, k = 0;
  int64_t* chosen = nullptr;     // [samples, k]
  float* chosen_scores = nullptr;  // [samples, k]
};

// How scores are taken.
//   wgmma  tensor memory accelerator and warpgroup matrix products: sm_90
//   mma    cp.async and warp matrix products: sm_80 and later (e4m3: sm_89 and later)
//   plain  one warp per chunk, float32: any type and width
enum class Path : int { automatic, wgmma, mma, plain };

// One compiled shape of the wgmma kernel.
struct Shape {
  int chunks;     // per tile
  int columns;    // tokens per tile
  int cluster;    // blocks that share a tile of tokens
  bool resident;  // the tokens stay in shared memory
};

// What is chosen for a call; `automatic` and -1 leave the choice to plan().
struct Choice {
  Path path = Path::automatic;
  int shape = -1;  // index into shapes()
};

struct Plan {
  Path path = Path::automatic;
  int shape = -1;            // wgmma only
  int terms = 1;             // products per number of a query: 2 where float32 queries meet 16-bit keys
  int64_t columns = 0;       // packed tokens at most, a multiple of the tile's
  size_t workspace = 0;      // bytes
  const char* error = nullptr;  // why the call or the choice cannot be met
};

// Looks at sizes, types and alignment only, and at the current device.
Plan plan(const Call& call, Choice choice = {});
// `workspace` holds plan(call, choice).workspace bytes, 256-byte aligned; its contents do not matter. `marks`, where given,
// are two events to record: when queries are packed, and when chunks are scored.
cudaError_t route_documents(
    const Call& call, const Plan& plan, void* workspace, cudaStream_t stream, const cudaEvent_t* marks = nullptr);

int shape_count();
Shape shape_at(int index);

// Exact scores of candidates, from keys in device or pinned host memory, and the k best of them.
struct Rescore {
  const void* queries = nullptr;  // [samples, tokens, width]
  Type query_type = Type::f32;
  const bool* mask = nullptr;  // [samples, tokens]
  const void* keys = nullptr;  // [chunks, width] f32, bf16 or f16
  Type key_type = Type::bf16;
  bool keys_on_host = false;            // in its memory, which a block reads once for all tokens
  const int64_t* offsets = nullptr;     // [documents + 1]
  const int64_t* candidates = nullptr;  // [samples, count], -1 for none
  int64_t samples = 0, tokens = 0, width = 0, documents = 0, count = 0, k = 0;
  int64_t* chosen = nullptr;       // [samples, k]
  float* chosen_scores = nullptr;  // [samples, k]
};
constexpr int64_t kMostWidthRescored = 12288;
constexpr int64_t kMostRescored = 1024;  // k
size_t rescore_workspace(const Rescore& call);
cudaError_t rescore_documents(const Rescore& call, void* workspace, cudaStream_t stream);

}  // namespace msa_hf::route
