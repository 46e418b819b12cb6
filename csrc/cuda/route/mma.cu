// Scores of chunks on sm_80 and later: cp.async and mma.sync. Eight warps of 16 chunks each, a tile of tokens at a time,
// 128 bytes of the width per stage. Keys are read again (from L2) for every tile of tokens.

#include "score.cuh"

namespace msa_hf::route {

constexpr int kMmaChunks = 128, kMmaThreads = 256, kMmaStages = 3;

constexpr int mma_shared(int columns) { return kAlignment + kMmaStages * (kMmaChunks + columns) * kRow; }

template <Type TYPE, int COLUMNS>
__global__ void __launch_bounds__(kMmaThreads, TYPE == Type::e4m3 ? 1 : 2) score_mma_kernel(const Score p) {
  using Acc = typename Accumulator<TYPE>::type;
  constexpr uint32_t KEY_BYTES = kMmaChunks * kRow, STAGE_BYTES = (kMmaChunks + COLUMNS) * kRow;
  constexpr int NUMBER_BYTES = sizeof(typename Number<TYPE>::storage);

  MSA_HF_SHARED(shared, 1024);
  const uint32_t base = (shared_address(shared) + kAlignment - 1) & ~uint32_t{kAlignment - 1};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t width_bytes = int64_t{p.width} * NUMBER_BYTES;
  const int steps = static_cast<int>((width_bytes + kRow - 1) / kRow) * p.terms;
  const int token_tiles = (*p.used + COLUMNS - 1) / COLUMNS;
  const int64_t key_tiles = (p.chunks + kMmaChunks - 1) / kMmaChunks;
  if (token_tiles == 0) return;

  // What is loaded next.
  int64_t load_tile = blockIdx.x;
  int load_tokens = 0, load_step = 0;
  const auto load_next = [&](int stage) {
    if (load_tile < key_tiles) {
      const int block = load_step / p.terms, term = load_step % p.terms;
      const uint32_t to = base + stage * STAGE_BYTES;
#pragma unroll
      for (int i = threadIdx.x; i < kMmaChunks * 8; i += kMmaThreads) {
        const int64_t row = load_tile * kMmaChunks + i / 8, at = int64_t{block} * kRow + i % 8 * 16;
        const bool real = row < p.chunks && at < width_bytes;
        const char* from = static_cast<const char*>(p.keys) + (real ? row * width_bytes + at : 0);
        copy16(to + swizzled(i / 8, i % 8 * 16), from, real ? 16 : 0);
      }
#pragma unroll
      for (int i = threadIdx.x; i < COLUMNS * 8; i += kMmaThreads) {
        const int64_t row = int64_t{term} * p.columns + load_tokens * COLUMNS + i / 8;
        const int64_t at = int64_t{block} * kRow + i % 8 * 16;
        const bool real = at < width_bytes;
        const char* from = static_cast<const char*>(p.packed) + (real ? row * width_bytes + at : 0);
        copy16(to + KEY_BYTES + swizzled(i / 8, i % 8 * 16), from, real ? 16 : 0);
      }
      if (++load_step == steps) {
        load_step = 0;
        if (++load_tokens == token_tiles) {
          load_tokens = 0;
          load_tile += gridDim.x;
        }
      }
    }
    copy_commit();
  };

#pragma unroll
  for (int stage = 0; stage < kMmaStages - 1; stage++) load_next(stage);
  int stage = 0;
  for (int64_t tile = blockIdx.x; tile < key_tiles; tile += gridDim.x) {
    const Rows<1> rows(static_cast<int>(tile) * kMmaChunks + warp * 16 + lane / 4, static_cast<int>(p.chunks), p.factors);
    Best<Acc, 1> best;
    for (int token_tile = 0; token_tile < token_tiles; token_tile++) {
      const int groups = groups_of<COLUMNS>(p.groups + token_tile * (COLUMNS / kGroup));
      Acc acc[1][COLUMNS / 2];
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; i++) acc[0][i] = 0;
      for (int step = 0; step < steps; step++) {
        copy_wait<kMmaStages - 2>();
        __syncthreads();
        load_next((stage + kMmaStages - 1) % kMmaStages);  // the stage of the step before, which all have left
        const uint32_t keys = base + stage * STAGE_BYTES, tokens = keys + KEY_BYTES;
#pragma unroll
        for (int k = 0; k < 4; k++) {
          uint32_t a[4];
          load_matrices(a, keys + swizzled(warp * 16 + lane % 16, k * 32 + lane / 16 * 16));
#pragma unroll
          for (int j = 0; j < COLUMNS / 16; j++) {
            uint32_t b[4];
            load_matrices(b, tokens + swizzled(j * 16 + lane / 16 * 8 + lane % 8, k * 32 + lane / 8 % 2 * 16));
            warp_product<TYPE>(&acc[0][8 * j], a, b[0], b[1]);
            warp_product<TYPE>(&acc[0][8 * j + 4], a, b[2], b[3]);
          }
        }
        stage = (stage + 1) % kMmaStages;
      }
      fold<Acc, 1, COLUMNS>(acc, groups, best, p.sink, rows);
    }
    flush<Acc, 1>(best, p.sink, rows);
  }
  copy_wait<0>();
}

template <Type TYPE, int COLUMNS>
cudaError_t launch_mma(const Score& score, cudaStream_t stream) {
  const auto kernel = score_mma_kernel<TYPE, COLUMNS>;
  constexpr int shared = mma_shared(COLUMNS);
  int multiprocessors = 0;
#ifdef MSA_HF_EMULATE
  multiprocessors = emulated::multiprocessors;
#else
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
#endif
  const int64_t tiles = (score.chunks + kMmaChunks - 1) / kMmaChunks;
  const int64_t blocks = tiles < 2 * multiprocessors ? tiles : 2 * multiprocessors;
  return launch_kernel("score_mma_kernel", kernel, {dim3(static_cast<unsigned>(blocks)), kMmaThreads, shared}, stream, score);
}

template <Type TYPE>
bool mma_compiled() {
  return compiled_for(score_mma_kernel<TYPE, kMmaColumns[0]>, TYPE == Type::e4m3 ? 89 : 80);
}

template <Type TYPE>
cudaError_t score_mma(const Score& score, int columns, cudaStream_t stream) {
  return columns == kMmaColumns[0] ? launch_mma<TYPE, kMmaColumns[0]>(score, stream)
                                   : launch_mma<TYPE, kMmaColumns[1]>(score, stream);
}

template bool mma_compiled<Type::bf16>();
template bool mma_compiled<Type::f16>();
template bool mma_compiled<Type::e4m3>();
template bool mma_compiled<Type::s8>();
template cudaError_t score_mma<Type::bf16>(const Score& score, int columns, cudaStream_t stream);
template cudaError_t score_mma<Type::f16>(const Score& score, int columns, cudaStream_t stream);
template cudaError_t score_mma<Type::e4m3>(const Score& score, int columns, cudaStream_t stream);
template cudaError_t score_mma<Type::s8>(const Score& score, int columns, cudaStream_t stream);

}  // namespace msa_hf::route
