// Launchers of pool_chunks and gather_documents: plain pointers and numbers, no torch.
//
// All return the first CUDA error they meet. Nothing here allocates, synchronizes or reads device memory on the host,
// so every launch can be captured in a graph. Strides and offsets count elements, never bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace msa_hf {

enum class Format : int { float32, bfloat16, float16, int8, float8_e4m3 };

constexpr int bytes_of(Format format) {
  return format == Format::float32 ? 4 : format == Format::int8 || format == Format::float8_e4m3 ? 1 : 2;
}

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
  Format input = Format::float32;
  void* content = nullptr;  // [C, 2, G, D]
  Format content_format = Format::float32;  // floating
  void* routing = nullptr;  // [C, G * D]
  Format routing_format = Format::float32;
  float* scales = nullptr;  // [C], where routing_format is int8 or float8: value = scale * number
  bool normalize = false;
};

// Gradients of all three inputs. Packed tokens that belong to no document get zero; padding is not written.
struct PoolBackward {
  Chunking chunking;
  TokenStates router_keys;  // of the forward; read only where it normalized
  Format input = Format::float32;
  const void* grad_content = nullptr;  // [C, 2, G, D]
  Format grad_content_format = Format::float32;
  const void* grad_routing = nullptr;  // [C, G * D]
  Format grad_routing_format = Format::float32;
  TokenStates grad_keys, grad_values, grad_router_keys;  // in the format of the input
  bool normalize = false;
};

cudaError_t pool_chunks_forward(const PoolForward& call, cudaStream_t stream);
cudaError_t pool_chunks_backward(const PoolBackward& call, cudaStream_t stream);

// chunk_offsets[i] = sum of ceil(tokens of document j / chunk_size) over j < i; one block, for any number of documents.
cudaError_t find_chunk_offsets(
    const int64_t* token_offsets, int64_t* chunk_offsets, int64_t documents, int chunk_size, cudaStream_t stream);

// Chosen documents' rows of content, in ascending order of documents, then zeros, to [B, G, width, D].
struct GatherCall {
  const int64_t* documents = nullptr;  // [B, k]; outside 0..N-1: none
  const int64_t* offsets = nullptr;  // [N + 1]
  int64_t num_documents = 0;
  int64_t chunks = 0;  // C; offsets that point behind it count as none
  int batch = 0;
  int k = 0;
  int width = 0;  // rows per sample; what would lie behind is left out
  int groups = 0;
  int dim = 0;
  const void* content = nullptr;  // [C, 2, G, D], or staged [B, width, 2, G, D]; device or pinned host memory
  const float* scales = nullptr;  // [C, 2], or staged [B, width, 2], where content is float8_e4m3
  bool staged = false;  // rows of content already lie as they are to be written
  Format content_format = Format::float32;
  Format output_format = Format::float32;  // floating
  void* keys = nullptr;  // [B, G, width, D]
  void* values = nullptr;  // [B, G, width, D]
  bool* valid = nullptr;  // [B, width]
  int64_t* slots = nullptr;  // [B, width] column of `documents`; 0 where not valid
};

constexpr int kMostGathered = 1024;  // documents per sample

cudaError_t gather_documents(const GatherCall& call, cudaStream_t stream);

// For content that the device cannot read (staging.h): runs [B, k, 2], first chunk and number of chunks of the chosen
// documents in the order of their rows, to device or pinned host memory.
cudaError_t list_runs(const GatherCall& call, int64_t* runs, cudaStream_t stream);

}  // namespace msa_hf
