// What the scoring kernels are given, and their launchers.
#pragma once

#include "device.cuh"

namespace msa_hf::route {

struct Score {
  const void* keys;      // [chunks, width]
  const void* packed;    // [terms][columns][width], columns in the keys' type (f32 on the plain path)
  const int* used;       // columns in use
  const int* groups;     // [columns / kGroup] sample of a group, -1 behind the last
  const float* factors;  // [chunks] or null: the scales of the keys
  Sink sink;
  int64_t chunks;
  int width;
  int columns;
  int terms;
  int stages;  // wgmma
};

// The shapes that are compiled; those behind kShapesBuilt only with MSA_HF_ALL_SHAPES, to be compared by the benchmark.
constexpr Shape kShapes[] = {
    {128, 32, 1, true},  {128, 64, 1, true},   {128, 128, 1, true},  {256, 128, 2, false}, {128, 192, 2, false},
    {128, 256, 2, false},
#ifdef MSA_HF_ALL_SHAPES
    {256, 32, 1, true},  {256, 64, 1, true},   {256, 128, 1, false}, {128, 256, 1, false}, {128, 256, 4, false},
    {256, 128, 4, false},
#endif
};
constexpr int kShapeCount = sizeof(kShapes) / sizeof(kShapes[0]);
constexpr int kShapesBuilt = 6;

constexpr int kAlignment = 1024;        // of tiles in shared memory
constexpr int kConsumerWarps = 8;       // two warpgroups
constexpr int kWgmmaThreads = 288;      // and one warp that loads
constexpr int kMostStages = 16;

constexpr int64_t resident_bytes(const Shape& shape, int64_t width_bytes, int terms) {
  return shape.resident ? terms * ((width_bytes + kRow - 1) / kRow) * shape.columns * kRow : 0;
}
constexpr int stage_bytes(const Shape& shape) {
  return (shape.chunks + (shape.resident ? 0 : shape.columns)) * kRow;
}
constexpr int kBarrierBytes = (2 * kMostStages + 1) * 8;
// Stages that fit beside what stays, 0 for none.
constexpr int stages_of(const Shape& shape, int64_t width_bytes, int terms, int64_t shared) {
  const int64_t room = shared - kAlignment - kBarrierBytes - resident_bytes(shape, width_bytes, terms);
  const int64_t stages = room < 0 ? 0 : room / stage_bytes(shape);
  return static_cast<int>(stages < kMostStages ? stages : kMostStages);
}
constexpr int64_t wgmma_shared(const Shape& shape, int64_t width_bytes, int terms, int stages) {
  return kAlignment + kBarrierBytes + resident_bytes(shape, width_bytes, terms) + int64_t{stages} * stage_bytes(shape);
}

// wgmma_<type>.cu
template <Type TYPE>
bool wgmma_compiled();
template <Type TYPE>
cudaError_t score_wgmma(const Score& score, int shape, cudaStream_t stream);
// mma.cu
constexpr int kMmaColumns[2] = {32, 64};
template <Type TYPE>
bool mma_compiled();
template <Type TYPE>
cudaError_t score_mma(const Score& score, int columns, cudaStream_t stream);
// route_documents.cu
template <Type TYPE>
cudaError_t score_plain(const Score& score, cudaStream_t stream);

}  // namespace msa_hf::route
