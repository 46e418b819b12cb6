// Launchers of pool_chunks and its backward: plain pointers and numbers, no torch.
//
// All return the first CUDA error they meet. Nothing here allocates, synchronizes or reads device memory on the host,
// so every launch can be captured in a graph. Strides and offsets count elements, never bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/types.h"

namespace msa_hf {

// Keys, values or router keys of tokens, [N, L, G, D] (padded) or [tokens, G, D] (packed), in any order of the outer
// dimensions; the last one is contiguous. The backward writes through such pointers.
struct TokenStates {
  const void* data = nullptr;
  int64_t document_stride = 0;  // padded only
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  bool packed = true;  // documents follow each other along the tokens, at token_offsets
};

// The documents of a batch and how they fall into chunks. Offsets are read on the device.
struct Chunking {
  const int64_t* token_offsets = nullptr;  // [N + 1]
  const int64_t* chunk_offsets = nullptr;  // [N + 1], of find_chunk_offsets; null: every block counts, for few documents
  int64_t documents = 0;
  int64_t chunks = 0;  // chunk_offsets[N], or more: what lies behind is written as zeros
  int chunk_size = 0;
  int groups = 0;
  int dim = 0;
  int64_t tokens = 0;  // of packed states: the backward writes to all, the forward asks for no row behind them
};

// Up to so many documents, counting in every block costs less than a launch before it.
constexpr int64_t kFewDocuments = 64;

struct PoolForward {
  Chunking chunking;
  TokenStates keys, values, router_keys;
  Type input = Type::f32;
  void* content = nullptr;  // [C, 2, G, D]
  Type content_type = Type::f32;  // floating
  void* routing = nullptr;  // [C, G * D]
  Type routing_type = Type::f32;
  float* scales = nullptr;  // [C], where routing_type is int8 or float8: value = scale * number
  bool normalize = false;
};

// Gradients of all three inputs. Packed tokens that belong to no document get zero; padding is not written.
struct PoolBackward {
  Chunking chunking;
  TokenStates router_keys;  // of the forward; read only where it normalized
  Type input = Type::f32;
  const void* grad_content = nullptr;  // [C, 2, G, D]
  Type grad_content_type = Type::f32;
  const void* grad_routing = nullptr;  // [C, G * D]
  Type grad_routing_type = Type::f32;
  TokenStates grad_keys, grad_values, grad_router_keys;  // in the format of the input
  bool normalize = false;
};

cudaError_t pool_chunks_forward(const PoolForward& call, cudaStream_t stream);
cudaError_t pool_chunks_backward(const PoolBackward& call, cudaStream_t stream);

// chunk_offsets[i] = sum of ceil(tokens of document j / chunk_size) over j < i; one block, for any number of documents.
cudaError_t find_chunk_offsets(
    const int64_t* token_offsets, int64_t* chunk_offsets, int64_t documents, int chunk_size, cudaStream_t stream);

}  // namespace msa_hf
