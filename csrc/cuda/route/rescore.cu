// Exact scores of candidates, and the k best of them.
//
//   products  queries and keys of one 16-bit type: the products are exact in the tensor cores' float32. A block takes 32 of
//             a sample's chunks, counted through its candidates, and 32 of its tokens; its warps divide the width. Keys in
//             host memory are read once: a block copies its chunks to shared memory and goes through all tokens
//   plain     any other types and widths: products and sums in float32
//   pick      the k best of a sample's candidates
//
// How long it must take (H200, 64 candidates of width 1024): 2 chunks each and 32 tokens are 4 blocks that read 128 KB out
// of L2, 2 us, after three loads that wait for each other, 2 us. 16 chunks each and 1,024 tokens are 1,024 blocks, 131 MB
// out of L2, 27 us; 16 samples of 32 tokens 512 blocks and 34 MB of keys from memory, 15 us. 64 candidates of 16 chunks in
// host memory are 2 MB over the bus, 40 us at 50 GB/s, for any number of tokens.

#include "best.cuh"
#include "score.cuh"

namespace msa_hf::route {

constexpr int kRescoreThreads = 256, kRescoreWarps = kRescoreThreads / 32;

struct RescoreCall {
  Rescore call;
  int token_slices;
  uint32_t* scores;  // [samples, count], 0 before
};

// Products ------------------------------------------------------------------------------------------------------------

constexpr int kTileChunks = 32, kTileTokens = 32;
constexpr int kTilePitch = kTileTokens + 8;  // rows of a warp's sums: four rows of pairs meet different banks
constexpr int kMostProductCandidates = 256;  // a thread each
constexpr int kStagedPad = 32;  // numbers behind a staged row: two rows of a quarter warp meet different banks

struct RescoreShared {
  float sums[kRescoreWarps][kTileChunks][kTilePitch];
  int64_t begins[kMostProductCandidates], ends[kMostProductCandidates];  // first chunk; rows up to its last
  int64_t warp_rows[kRescoreWarps];
  int chunks[kTileChunks];
  int places[kTileChunks];  // candidates, -1 behind the last row
};

// The sums lie at a multiple of 16 bytes, and so does what follows them: with STAGED, [kTileChunks][width + kStagedPad] keys.
constexpr size_t kRescoreSharedBytes = (sizeof(RescoreShared) + 15) / 16 * 16;

template <Type TYPE, bool STAGED>
__global__ void __launch_bounds__(kRescoreThreads, STAGED ? 1 : 2) rescore_products_kernel(const RescoreCall p) {
  static_assert(kMostProductCandidates == kRescoreThreads);
  MSA_HF_SHARED(memory, 1024);
  auto& shared = *reinterpret_cast<RescoreShared*>(memory);
  using Storage = typename Number<TYPE>::storage;
  const Rescore& call = p.call;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, part = lane % 4;
  const int width = static_cast<int>(call.width), tokens = static_cast<int>(call.tokens), count = static_cast<int>(call.count);
  const int64_t sample = blockIdx.y;
  const auto* keys = static_cast<const Storage*>(call.keys);
  const auto* queries = static_cast<const Storage*>(call.queries) + sample * tokens * width;
  const bool* mask = call.mask + sample * tokens;

  // Rows: the candidates' chunks, one candidate after the other.
  int64_t rows = 0;
  if (threadIdx.x < count) {
    const int64_t document = call.candidates[sample * count + threadIdx.x];
    if (document >= 0 && document < call.documents) {
      const int64_t begin = call.offsets[document];
      rows = call.offsets[document + 1] - begin;
      shared.begins[threadIdx.x] = begin;
    }
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(kWarp, rows, step);
    if (lane >= step) rows += other;
  }
  if (lane == 31) shared.warp_rows[warp] = rows;
  __syncthreads();
  for (int other = 0; other < warp; other++) rows += shared.warp_rows[other];
  shared.ends[threadIdx.x] = rows;
  __syncthreads();

  const int64_t& all = shared.ends[kRescoreThreads - 1];
  for (int64_t first = int64_t{blockIdx.x} * kTileChunks; first < all; first += int64_t{gridDim.x} * kTileChunks) {
    __syncthreads();
    if (warp == 0) {
      const int64_t row = first + lane < all ? first + lane : all - 1;
      int low = 0, high = count - 1;  // the first candidate that ends behind the row
      while (low < high) {
        const int middle = (low + high) / 2;
        if (shared.ends[middle] > row)
          high = middle;
        else
          low = middle + 1;
      }
      shared.chunks[lane] = static_cast<int>(shared.begins[low] + row - (low == 0 ? 0 : shared.ends[low - 1]));
      shared.places[lane] = first + lane < all ? low : -1;
    }
    __syncthreads();

    auto* const staged = reinterpret_cast<Storage*>(memory + kRescoreSharedBytes);
    if constexpr (STAGED) {
      const int parts = width / 8;  // of 16 bytes
#pragma unroll 8
      for (int i = threadIdx.x; i < kTileChunks * parts; i += kRescoreThreads) {
        const int row = i / parts, at = i % parts * 8;
        *reinterpret_cast<uint4*>(staged + row * (width + kStagedPad) + at) =
            *reinterpret_cast<const uint4*>(keys + (int64_t{shared.chunks[row]} * width + at));
      }
      __syncthreads();
    }

    // A lane's 16 bytes of a row are its share of two products: the order of the summed numbers is that of both factors.
    const Storage* key_rows[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      key_rows[i] = STAGED ? staged + (quad + 8 * i) * (width + kStagedPad)
                           : keys + int64_t{shared.chunks[quad + 8 * i]} * width;
    const int row = threadIdx.x / 8, column = threadIdx.x % 8 * 4;
    float best = lowest<float>();
    for (int first_token = blockIdx.z * kTileTokens; first_token < tokens; first_token += gridDim.z * kTileTokens) {
      uint32_t token_rows[4];  // in numbers
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int token = first_token + quad + 8 * j;
        token_rows[j] = static_cast<uint32_t>(token < tokens ? token : tokens - 1) * width;
      }
      float sums[2][4][4] = {};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
      constexpr int AT_ONCE = 1;  // two spill there
#else
      constexpr int AT_ONCE = 2;
#endif
#pragma unroll AT_ONCE
      for (int base = warp * 32; base < width; base += kRescoreWarps * 32) {
        const int at = base + part * 8;
        uint4 a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          a[i] = at < width ? *reinterpret_cast<const uint4*>(key_rows[i] + at) : uint4{};
          b[i] = at < width ? *reinterpret_cast<const uint4*>(queries + (token_rows[i] + at)) : uint4{};
        }
#pragma unroll
        for (int t = 0; t < 2; t++) {
          const uint32_t left[4] = {a[2 * t].x, a[2 * t + 1].x, a[2 * t].y, a[2 * t + 1].y};
          const uint32_t right[4] = {a[2 * t].z, a[2 * t + 1].z, a[2 * t].w, a[2 * t + 1].w};
#pragma unroll
          for (int j = 0; j < 4; j++) {
            warp_product<TYPE>(sums[t][j], left, b[j].x, b[j].y);
            warp_product<TYPE>(sums[t][j], right, b[j].z, b[j].w);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < 2; t++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
          for (int h = 0; h < 2; h++)
            *reinterpret_cast<float2*>(&shared.sums[warp][16 * t + 8 * h + quad][8 * j + 2 * part]) =
                float2{sums[t][j][2 * h], sums[t][j][2 * h + 1]};
      __syncthreads();

      // Eight threads a row, four tokens each.
      float whole[4] = {};
      for (int other = 0; other < kRescoreWarps; other++) {
        const float4 four = *reinterpret_cast<const float4*>(&shared.sums[other][row][column]);
        whole[0] += four.x, whole[1] += four.y, whole[2] += four.z, whole[3] += four.w;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = first_token + column + i;
        if (token < tokens && mask[token]) best = max_of(best, whole[i]);
      }
      if constexpr (!STAGED) break;  // a block has no more tokens
      __syncthreads();
    }
#pragma unroll
    for (int step = 4; step > 0; step /= 2) best = max_of(best, __shfl_xor_sync(kWarp, best, step));
    if (threadIdx.x % 8 == 0 && shared.places[row] >= 0)
      atomicMax(p.scores + sample * count + shared.places[row], ordered_part(best));
  }
}

template <Type TYPE>
cudaError_t launch_products(const RescoreCall& call, cudaStream_t stream) {
  const int64_t all_slices = (call.call.tokens + kTileTokens - 1) / kTileTokens;
  const size_t staged = kTileChunks * (call.call.width + kStagedPad) * sizeof(typename Number<TYPE>::storage);
  bool stages = call.call.keys_on_host && all_slices > 1;
  if (stages && allow_shared(rescore_products_kernel<TYPE, true>, kRescoreSharedBytes + staged) != cudaSuccess) {
    cudaGetLastError();  // rows too wide for this GPU's shared memory: they are read once for every 32 tokens
    stages = false;
  }
  const int64_t slices = stages ? 1 : all_slices, wanted = 1024 / (slices * call.call.samples);
  const dim3 grid(static_cast<unsigned>(wanted < 1 ? 1 : wanted > 64 ? 64 : wanted), static_cast<unsigned>(call.call.samples),
                  static_cast<unsigned>(slices));
  const auto kernel = stages ? rescore_products_kernel<TYPE, true> : rescore_products_kernel<TYPE, false>;
  const size_t shared = kRescoreSharedBytes + (stages ? staged : 0);
  return launch_kernel("rescore_products_kernel", kernel, {grid, kRescoreThreads, shared}, stream, call);
}

static bool takes_products(const Rescore& call) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (call.key_type != call.query_type || (call.key_type != Type::bf16 && call.key_type != Type::f16)) return false;
  if (call.width % 8 != 0 || !aligned(call.keys) || !aligned(call.queries)) return false;
  if (call.count > kMostProductCandidates || call.tokens > 65535 * int64_t{kTileTokens}) return false;
  if (call.tokens * call.width >= int64_t{1} << 31) return false;
  return call.key_type == Type::bf16 ? mma_compiled<Type::bf16>() : mma_compiled<Type::f16>();
}

// Plain ---------------------------------------------------------------------------------------------------------------

constexpr int kRescoreChunks = 4, kRescoreTokens = 4;

// A block per (candidate, sample, slice of tokens and chunks); products and sums in float32.
template <Type QUERY, Type KEY>
__global__ void __launch_bounds__(kRescoreThreads) rescore_kernel(const RescoreCall p) {
  MSA_HF_SHARED(shared, 1024);
  auto* keys = reinterpret_cast<float*>(shared);  // [kRescoreChunks][width]
  const Rescore& call = p.call;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = kRescoreThreads / 32;
  const int width = static_cast<int>(call.width), tokens = static_cast<int>(call.tokens);
  const int64_t sample = blockIdx.y, place = sample * call.count + blockIdx.x;
  const int64_t document = call.candidates[place];
  if (document < 0 || document >= call.documents) return;
  const int token_slice = blockIdx.z % p.token_slices, chunk_slice = blockIdx.z / p.token_slices;
  const int chunk_slices = gridDim.z / p.token_slices;
  const int per_slice = (tokens + p.token_slices - 1) / p.token_slices, first_token = token_slice * per_slice;
  const int end_token = first_token + per_slice < tokens ? first_token + per_slice : tokens;
  const int64_t end = call.offsets[document + 1];
  const auto* all_keys = static_cast<const typename Number<KEY>::storage*>(call.keys);
  const auto* queries = static_cast<const typename Number<QUERY>::storage*>(call.queries) + sample * tokens * width;
  const bool* mask = call.mask + sample * tokens;

  float best = lowest<float>();
  bool any = false;
  for (int64_t chunk = call.offsets[document] + chunk_slice * kRescoreChunks; chunk < end;
       chunk += int64_t{chunk_slices} * kRescoreChunks) {
    __syncthreads();
    for (int r = 0; r < kRescoreChunks; r++) {  // behind the last chunk: the last again
      const int64_t row = chunk + r < end ? chunk + r : end - 1;
      for (int i = threadIdx.x; i < width; i += kRescoreThreads) keys[r * width + i] = Number<KEY>::decode(all_keys[row * width + i]);
    }
    __syncthreads();
    for (int token = first_token + warp * kRescoreTokens; token < end_token; token += warps * kRescoreTokens) {
      bool routes[kRescoreTokens];
      bool some = false;
      const typename Number<QUERY>::storage* rows[kRescoreTokens];
#pragma unroll
      for (int j = 0; j < kRescoreTokens; j++) {
        routes[j] = token + j < end_token && mask[token + j];
        some = some || routes[j];
        rows[j] = queries + int64_t{routes[j] ? token + j : token} * width;
      }
      if (!some) continue;
      float sums[kRescoreTokens][kRescoreChunks] = {};
      for (int i = lane; i < width; i += 32) {
        float numbers[kRescoreTokens];
#pragma unroll
        for (int j = 0; j < kRescoreTokens; j++) numbers[j] = Number<QUERY>::decode(rows[j][i]);
#pragma unroll
        for (int r = 0; r < kRescoreChunks; r++) {
          const float number = keys[r * width + i];
#pragma unroll
          for (int j = 0; j < kRescoreTokens; j++) sums[j][r] += numbers[j] * number;
        }
      }
#pragma unroll
      for (int j = 0; j < kRescoreTokens; j++) {
#pragma unroll
        for (int r = 0; r < kRescoreChunks; r++) {
#pragma unroll
          for (int step = 16; step > 0; step /= 2) sums[j][r] += __shfl_xor_sync(kWarp, sums[j][r], step);
          if (routes[j]) best = max_of(best, sums[j][r]);
        }
      }
      any = true;
    }
  }
  if (any && lane == 0) atomicMax(p.scores + place, ordered_part(best));
}

// The whole -----------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kBestThreads) pick_kernel(const RescoreCall p) {
  MSA_HF_SHARED(shared, 1024);
  auto& found = *reinterpret_cast<BestShared*>(shared);
  const int64_t sample = blockIdx.x;
  const int count = static_cast<int>(p.call.count), all = static_cast<int>(p.call.k);
  const int64_t* candidates = p.call.candidates + sample * count;
  const uint32_t* scores = p.scores + sample * count;
  uint64_t bound = ~uint64_t{0};  // only what ranks below may still be chosen
  for (int done = 0; done < all; done += kPerRound) {
    const int k = all - done < kPerRound ? all - done : kPerRound;
    find_best(
        [&](const auto& take) {
#pragma unroll 1
          for (int i = threadIdx.x; i < count; i += kBestThreads) {
            if (candidates[i] < 0 || !can_be_chosen(scores[i])) continue;
            const uint64_t number = ranked(scores[i], candidates[i]);
            if (number < bound) take(number);
          }
        },
        k, found);
    for (int i = threadIdx.x; i < k; i += kBestThreads)
      write_chosen(found.best[i], p.call.chosen + sample * all + done + i, p.call.chosen_scores + sample * all + done + i);
    bound = found.best[k - 1];
    __syncthreads();
  }
}

size_t rescore_workspace(const Rescore& call) { return (call.samples * call.count * 4 + 255) / 256 * 256; }

template <Type QUERY, Type KEY>
cudaError_t launch_rescore(const RescoreCall& call, dim3 grid, cudaStream_t stream) {
  const size_t shared = kRescoreChunks * call.call.width * 4;
  return launch_kernel("rescore_kernel", rescore_kernel<QUERY, KEY>, {grid, kRescoreThreads, shared}, stream, call);
}

template <Type QUERY>
cudaError_t launch_rescore(const RescoreCall& call, dim3 grid, cudaStream_t stream) {
  switch (call.call.key_type) {
    case Type::f32:
      return launch_rescore<QUERY, Type::f32>(call, grid, stream);
    case Type::bf16:
      return launch_rescore<QUERY, Type::bf16>(call, grid, stream);
    case Type::f16:
      return launch_rescore<QUERY, Type::f16>(call, grid, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t rescore_documents(const Rescore& call, void* workspace, cudaStream_t stream) {
  if (call.samples == 0 || call.k == 0) return cudaSuccess;
  if (call.width > kMostWidthRescored || call.k > kMostRescored || call.samples > 65535) return cudaErrorInvalidValue;
  RescoreCall inner{call, 1, static_cast<uint32_t*>(workspace)};
  cudaError_t error = cudaMemsetAsync(workspace, 0, call.samples * call.count * 4, stream);
  if (error != cudaSuccess) return error;
  const bool any = call.count > 0 && call.tokens > 0 && call.documents > 0;
  if (any && takes_products(call)) {
    error = call.key_type == Type::bf16 ? launch_products<Type::bf16>(inner, stream) : launch_products<Type::f16>(inner, stream);
    if (error != cudaSuccess) return error;
  } else if (any) {
    // About a thousand blocks: slices of at least 32 tokens, then slices of chunks.
    const int64_t slices = 1024 / (call.count * call.samples) < 1 ? 1 : 1024 / (call.count * call.samples);
    const int64_t token_slices = (call.tokens + 31) / 32 < slices ? (call.tokens + 31) / 32 : slices;
    inner.token_slices = static_cast<int>(token_slices);
    const dim3 grid(static_cast<unsigned>(call.count), static_cast<unsigned>(call.samples),
                    static_cast<unsigned>(slices / token_slices * token_slices));
    error = call.query_type == Type::f32    ? launch_rescore<Type::f32>(inner, grid, stream)
            : call.query_type == Type::bf16 ? launch_rescore<Type::bf16>(inner, grid, stream)
            : call.query_type == Type::f16  ? launch_rescore<Type::f16>(inner, grid, stream)
                                            : cudaErrorInvalidValue;
    if (error != cudaSuccess) return error;
  }
  const dim3 blocks(static_cast<unsigned>(call.samples));
  return launch_kernel("pick_kernel", pick_kernel, {blocks, kBestThreads, sizeof(BestShared)}, stream, inner);
}

}  // namespace msa_hf::route
