// Launcher of gather_documents: plain pointers and numbers, no torch.
//
// It returns the first CUDA error that it meets, and neither allocates nor synchronizes nor reads device memory on the
// host, so that it can be captured in a graph. Offsets count elements, never bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../common/types.h"

namespace msa_hf {

// Chosen documents' rows of content, in ascending order of documents, then zeros, to [B, G, width, D].
struct GatherCall {
  const int64_t* documents = nullptr;  // [B, k]; outside 0..N-1: none
  const int64_t* offsets = nullptr;  // [N + 1]
  int64_t num_documents = 0;
  int64_t chunks = 0;  // C; offsets that point behind it count as none, unless content is
  bool part = false;  // a part of the chunks: what it does not have is zero, and valid; never staged
  int64_t first = 0;  // the chunk that a part begins with
  int batch = 0;
  int k = 0;
  int width = 0;  // rows per sample; what would lie behind is left out
  int groups = 0;
  int dim = 0;
  const void* content = nullptr;  // [C, 2, G, D], or staged [B, width, 2, G, D]; device or pinned host memory
  const float* scales = nullptr;  // [C, 2], or staged [B, width, 2], where content is float8_e4m3
  bool staged = false;  // rows of content already lie as they are to be written
  Type content_type = Type::f32;
  Type output_type = Type::f32;  // floating
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
