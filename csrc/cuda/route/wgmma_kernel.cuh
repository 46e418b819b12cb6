// Scores of chunks on sm_90: tiles come through the tensor memory accelerator, products are wgmma's, and the maximum over
// tokens is taken in the accumulators. A block is two consumer warpgroups and one warp that loads, over a ring of stages.
//
// A tile is CHUNKS keys (rows of the product) by COLUMNS routing tokens (its columns), summed over blocks of 128 bytes of
// the width. One block per multiprocessor takes every (grid)-th tile of keys, and for each all tiles of tokens, so that
// the maximum over a sample's tokens never leaves the registers of one thread quad and is written once, 4 bytes per
// (sample, chunk). Two ways to hold the tokens:
//   resident   few tokens: loaded once, kept in shared memory. Only keys stream, each byte of them once from memory.
//   streaming  tokens come with every stage, out of the L2 cache; the blocks of a cluster work on the same tokens and
//              different keys, and each loads one part of the tokens for all.
//
// How long it must take (H200: 132 multiprocessors, 4.25 TB/s copy, 779 TFLOP/s bf16, about 1.7 GHz under load;
// C = 1,562,500, E = 1024; 3.2 GB of bf16 keys, 1.6 GB of 8-bit keys):
//   Memory. 4.25 TB/s is 32 GB/s * 1e3 per multiprocessor, 19 bytes per cycle. With 1 us of latency under load 32 KB must
//   be in flight per multiprocessor. Resident: 64 KB of tokens (32 x 1024) leave 9 stages of 16 KB = 144 KB in flight,
//   128 KB of tokens (64 x 1024) leave 5 = 80 KB. wgmma reads 16 KB of keys and 4 or 8 KB of tokens per stage at 128
//   bytes per cycle, 160 to 192 cycles, while a stage takes 860 cycles to arrive: arithmetic is hidden five times over.
//   Tail: 12,208 tiles over 132 blocks are 92.5 rounds; blocks that end early leave their bandwidth to the others.
//   Arithmetic. A tile of 128 x 256 x 1024 is 67 MFLOP, 11.4 us at 5.9 TFLOP/s per multiprocessor, and reads 256 KB of keys
//   and 512 KB of tokens: 8.9 TB/s out of L2 for all, more than it gives (5.5 to 7). In clusters of two the tokens count
//   half: 5.9 TB/s at the full rate, 4.2 at 0.72 of it. Reducing 128 accumulators takes about 300 cycles per warp, 0.35
//   us per tile (3 %), while the next stages arrive.
//   Predictions for the whole call, ms (score + 0.025 for packing, documents and top-k):
//     1 x 32  bf16 0.77, 8-bit 0.40      1 x 64   bf16 0.77, 8-bit 0.40     1 x 256  bf16 1.25, 8-bit 0.70
//     1 x 1024 bf16 4.8, 8-bit 2.6       16 x 32  bf16 2.5,  8-bit 1.35
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "score.cuh"

namespace msa_hf::route {

struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// RESIDENT: how many terms of the tokens stay in shared memory, 0 for streaming.
template <Type TYPE, int CHUNKS, int COLUMNS, int CLUSTER, int RESIDENT>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    score_wgmma_kernel(const __grid_constant__ CUtensorMap keys, const __grid_constant__ CUtensorMap packed, const Score p) {
#if defined(MSA_HF_SM90) || defined(MSA_HF_EMULATE)
  using Acc = typename Accumulator<TYPE>::type;
  static_assert(!RESIDENT || CLUSTER == 1);
  constexpr int TILES = CHUNKS / 128;  // of 64 chunks, per consumer warpgroup
  constexpr uint32_t KEY_BYTES = CHUNKS * kRow, TOKEN_BYTES = COLUMNS * kRow;
  constexpr uint32_t STAGE_BYTES = KEY_BYTES + (RESIDENT ? 0 : TOKEN_BYTES);
  constexpr int PER_ROW = kRow / sizeof(typename Number<TYPE>::storage);

  MSA_HF_SHARED(shared, 1024);
  const uint32_t base = (shared_address(shared) + kAlignment - 1) & ~uint32_t{kAlignment - 1};
  const int blocks = (p.width + PER_ROW - 1) / PER_ROW;  // of the summed dimension
  const uint32_t tokens_at = base;
  const uint32_t stages_at = base + RESIDENT * blocks * TOKEN_BYTES;
  const uint32_t full_at = stages_at + p.stages * STAGE_BYTES, empty_at = full_at + 8 * p.stages;
  const uint32_t resident_at = empty_at + 8 * p.stages;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = CLUSTER == 1 ? 0 : static_cast<int>(cluster_rank());
  const int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < p.stages; stage++) {
      barrier_init(full_at + 8 * stage, 1);
      barrier_init(empty_at + 8 * stage, CLUSTER * kConsumerWarps);
    }
    barrier_init(resident_at, 1);
    barrier_init_done();
  }
  if constexpr (CLUSTER == 1)
    __syncthreads();
  else
    cluster_sync();

  const int token_tiles = (*p.used + COLUMNS - 1) / COLUMNS;
  const int key_tiles = static_cast<int>((p.chunks + CHUNKS - 1) / CHUNKS);
  const int rounds = RESIDENT ? 1 : p.terms;  // how often a block of keys is loaded per tile of tokens
  Ring ring;

  if (warp == kConsumerWarps) {
    if (lane == 0 && token_tiles > 0) {
      prefetch_map(&keys);
      prefetch_map(&packed);
      const uint64_t once = once_policy(), again = again_policy(), keep = keep_policy();
      if constexpr (RESIDENT) {
        barrier_expect(resident_at, RESIDENT * blocks * TOKEN_BYTES);
        for (int term = 0; term < RESIDENT; term++)
          for (int block = 0; block < blocks; block++)
            load_box(tokens_at + (term * blocks + block) * TOKEN_BYTES, &packed, block * PER_ROW, term * p.columns,
                     resident_at, keep);
      }
      for (int first = cluster * CLUSTER; first < key_tiles; first += clusters * CLUSTER) {
        // a block without a tile of its own loads the last one for the sake of its cluster
        const int tile = first + rank < key_tiles ? first + rank : key_tiles - 1;
        for (int token_tile = 0; token_tile < token_tiles; token_tile++) {
          const bool last = token_tile == token_tiles - 1;
          for (int step = 0; step < blocks * rounds; step++) {
            const int block = rounds == 2 ? step >> 1 : step, term = rounds == 2 ? step & 1 : 0;
            const uint32_t to = stages_at + ring.stage * STAGE_BYTES, full = full_at + 8 * ring.stage;
            barrier_wait(empty_at + 8 * ring.stage, ring.parity ^ 1);
            barrier_expect(full, STAGE_BYTES);
            load_box(to, &keys, block * PER_ROW, tile * CHUNKS, full, last && term == rounds - 1 ? once : again);
            if constexpr (!RESIDENT) {
              constexpr int PART = COLUMNS / CLUSTER;
              const int row = term * p.columns + token_tile * COLUMNS + rank * PART;
              if constexpr (CLUSTER == 1)
                load_box(to + KEY_BYTES, &packed, block * PER_ROW, row, full, keep);
              else
                load_box_to(to + KEY_BYTES + rank * PART * kRow, &packed, block * PER_ROW, row, full,
                            static_cast<uint16_t>((1 << CLUSTER) - 1), keep);
            }
            ring.next(p.stages);
          }
        }
      }
    }
    __syncwarp();
  } else if (token_tiles > 0) {
    const int group = warp / 4;  // warpgroup
    Acc acc[TILES][COLUMNS / 2];
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < COLUMNS / 2; i++) acc[t][i] = 0;
    if constexpr (RESIDENT) barrier_wait(resident_at, 0);

    for (int first = cluster * CLUSTER; first < key_tiles; first += clusters * CLUSTER) {
      const Rows<TILES> rows((first + rank) * CHUNKS + group * TILES * 64 + (warp % 4) * 16 + lane / 4,
                             static_cast<int>(p.chunks), p.factors);
      Best<Acc, TILES> best;
      for (int token_tile = 0; token_tile < token_tiles; token_tile++) {
        const int groups = groups_of<COLUMNS>(p.groups + token_tile * (COLUMNS / kGroup));
        int previous = 0;
        for (int step = 0; step < blocks * rounds; step++) {
          const uint32_t key_tile = stages_at + ring.stage * STAGE_BYTES + group * TILES * 64 * kRow;
          barrier_wait(full_at + 8 * ring.stage, ring.parity);
          wgmma_begin();
#pragma unroll
          for (int term = 0; term < (RESIDENT ? RESIDENT : 1); term++) {
            const uint32_t tokens = RESIDENT ? tokens_at + (term * blocks + step) * TOKEN_BYTES
                                             : stages_at + ring.stage * STAGE_BYTES + KEY_BYTES;
#pragma unroll
            for (int k = 0; k < 4; k++) {
#pragma unroll
              for (int t = 0; t < TILES; t++)
                Wgmma<TYPE, COLUMNS>::run(acc[t], tile_descriptor(key_tile + t * 64 * kRow + k * 32),
                                          tile_descriptor(tokens + k * 32), step > 0 || term > 0 || k > 0);
            }
          }
          wgmma_commit();
          wgmma_wait<1>();  // the products of the step before are done: its stage may be filled again
          if (step > 0 && lane < CLUSTER) {
            if constexpr (CLUSTER == 1)
              barrier_arrive(empty_at + 8 * previous);
            else
              barrier_arrive_in(empty_at + 8 * previous, lane);
          }
          __syncwarp();
          previous = ring.stage;
          ring.next(p.stages);
        }
        wgmma_wait<0>();
        if (lane < CLUSTER) {
          if constexpr (CLUSTER == 1)
            barrier_arrive(empty_at + 8 * previous);
          else
            barrier_arrive_in(empty_at + 8 * previous, lane);
        }
        __syncwarp();
        fold<Acc, TILES, COLUMNS>(acc, groups, best, p.sink, rows);
      }
      flush<Acc, TILES>(best, p.sink, rows);
    }
  }
  if constexpr (CLUSTER > 1) cluster_sync();  // others may still signal this block's barriers
#elif defined(__CUDA_ARCH__)
  __trap();  // compiled for an architecture without wgmma: wgmma_compiled() keeps plan() from coming here
#endif
}

// Tensor map of rows of `width` numbers: boxes of 128 bytes by `box` rows, 128-byte swizzle, zeros outside.
inline cudaError_t map_rows(CUtensorMap* map, const void* data, Type type, int64_t width, int64_t rows, int box) {
#ifdef MSA_HF_EMULATE
  return emulated::map_rows(map, data, bytes_of(type), width, rows, box);
#else
  using Encode = CUresult (*)(
      CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
      const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const CUtensorMapDataType element = type == Type::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                      : type == Type::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                          : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(width) * bytes_of(type)};
  const cuuint32_t boxes[2] = {static_cast<cuuint32_t>(kRow / bytes_of(type)), static_cast<cuuint32_t>(box)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, element, 2, const_cast<void*>(data), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#endif
}

// How many clusters run at once: a part of the multiprocessors may not form whole ones.
template <class Kernel>
cudaError_t resident_clusters(Kernel kernel, int cluster, size_t shared, int* count) {
#ifdef MSA_HF_EMULATE
  *count = emulated::multiprocessors / cluster;
  return cudaSuccess;
#else
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (cluster == 1) return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  static std::mutex mutex;
  static std::map<std::pair<int, size_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({device, shared});
  if (found != known.end()) {
    *count = found->second;
    return cudaSuccess;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(kWgmmaThreads);
  config.dynamicSmemBytes = shared;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = allow_shared(kernel, shared);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(count, kernel, &config);
  if (error == cudaSuccess && *count < 1) error = cudaErrorLaunchOutOfResources;
  if (error == cudaSuccess) known[{device, shared}] = *count;
  return error;
#endif
}

template <Type TYPE, int INDEX, int TERMS>
cudaError_t launch_wgmma(const Score& score, cudaStream_t stream) {
  constexpr Shape shape = kShapes[INDEX];
  const int64_t width_bytes = int64_t{score.width} * bytes_of(TYPE);
  const size_t shared = wgmma_shared(shape, width_bytes, score.terms, score.stages);
  CUtensorMap keys, packed;
  cudaError_t error = map_rows(&keys, score.keys, TYPE, score.width, score.chunks, shape.chunks);
  if (error != cudaSuccess) return error;
  const int64_t rows = int64_t{score.terms} * score.columns;
  error = map_rows(&packed, score.packed, TYPE, score.width, rows, shape.columns / shape.cluster);
  if (error != cudaSuccess) return error;
  const auto kernel = score_wgmma_kernel<TYPE, shape.chunks, shape.columns, shape.cluster, shape.resident ? TERMS : 0>;
  int clusters = 0;
  error = resident_clusters(kernel, shape.cluster, shared, &clusters);
  if (error != cudaSuccess) return error;
  const int64_t tiles = (score.chunks + shape.chunks - 1) / shape.chunks;
  const int64_t wanted = (tiles + shape.cluster - 1) / shape.cluster;
  if (wanted < clusters) clusters = static_cast<int>(wanted);
  const Grid grid{dim3(clusters * shape.cluster), kWgmmaThreads, shared, static_cast<unsigned>(shape.cluster)};
  return launch_kernel("score_wgmma_kernel", kernel, grid, stream, keys, packed, score);
}

template <Type TYPE, int INDEX = 0>
cudaError_t launch_wgmma_shape(const Score& score, int shape, cudaStream_t stream) {
  if constexpr (INDEX == kShapeCount) {
    return cudaErrorInvalidValue;
  } else {
    if (shape != INDEX) return launch_wgmma_shape<TYPE, INDEX + 1>(score, shape, stream);
    if constexpr (!is_quantized(TYPE) && kShapes[INDEX].resident) {
      if (score.terms == 2) return launch_wgmma<TYPE, INDEX, 2>(score, stream);
    }
    return launch_wgmma<TYPE, INDEX, 1>(score, stream);
  }
}

template <Type TYPE>
bool wgmma_compiled() {
  return compiled_for(score_wgmma_kernel<TYPE, kShapes[0].chunks, kShapes[0].columns, 1, 1>, 90);
}

template <Type TYPE>
cudaError_t score_wgmma(const Score& score, int shape, cudaStream_t stream) {
  return launch_wgmma_shape<TYPE>(score, shape, stream);
}

}  // namespace msa_hf::route
