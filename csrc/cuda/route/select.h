// What the choice of documents is given, and its launcher.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace msa_hf::route {

constexpr int kGroupDocuments = 32;
constexpr int64_t kLongDocuments = 512;  // chunks of a document on average from which each is a group of its own

struct Select {
  float* scores;  // [samples, pitch], 16-byte aligned rows
  int64_t pitch;
  const int64_t* offsets;
  const bool* alive;
  const int* counts;  // [samples] routing tokens: without any, nothing was scored
  int64_t samples, chunks, documents, k;
  bool long_documents;
  int64_t groups;       // of documents
  int64_t group_pitch;  // a multiple of 4
  uint32_t* best;       // [samples, group_pitch] best score of a group, see ordered()
  int64_t* chosen;      // [samples, k]
  float* chosen_scores;
};

// Everything on the stream; nothing waits.
cudaError_t launch_select(const Select& select, cudaStream_t stream);

}  // namespace msa_hf::route
