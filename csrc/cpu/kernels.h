// Inner products of routing tokens and keys, with the largest over the tokens of a sample: what every level provides.

#pragma once

#include <cstdint>

#include "core.h"

namespace msa_hf::cpu {

// A token whose products are taken one key at a time, and where its sample's scores lie.
struct LoneToken {
  const float* query;  // [stride], zeros behind the width
  float* best;         // [keys]
};

// Kernels that multiply in float32. Keys and queries have zeros behind their width, up to a multiple of `lanes`.
struct FloatKernels {
  int lanes;   // tokens side by side in a panel
  int panels;  // panels that one call takes at most
  int tokens;  // lone tokens that one call takes at most
  int unit;    // keys per call that keep all registers busy
  void (*widen)(const void* source, Type type, int64_t count, float* target);
  // queries [panels][width][lanes] against keys [count][stride]; best[p][c] = max(best[p][c], max over p's lanes).
  void (*panel)(const float* queries, int panels, const float* keys, int64_t stride, int64_t width, int64_t count,
                float* const* best);
  // The same for lone tokens; `width` is a multiple of `lanes`.
  void (*lone)(const LoneToken* tokens, int count_tokens, const float* keys, int64_t stride, int64_t width,
               int64_t count);
};
const FloatKernels* generic_kernels();
const FloatKernels* avx2_kernels();    // nullptr where the compiler or the machine has no such thing
const FloatKernels* avx512_kernels();  // likewise

// Where the numbers of blocks of 16 keys lie, in numbers: those of block b, step s and row r begin at
// data + b * block + s * step + r * row, 32 of them side by side.
struct TileKeys {
  const uint16_t* data;
  int64_t block, step, row;
};

// Kernels of the matrix unit (AMX). A tile holds 16 rows of 32 bfloat16. Keys are split into one tile per 16 keys and 32
// numbers; queries, exactly, into at most three bfloat16 parts whose sum they are. Products of bfloat16 are exact in
// float32, so nothing is lost against multiplying in float32.
struct TileKernels {
  // Keys that bfloat16 holds exactly (bf16, i8, e4m3): [count <= 16][width] to [steps][16][32], zeros in what is missing.
  void (*pack_keys)(const void* keys, Type type, int64_t stride, int64_t count, int64_t width, uint16_t* tiles);
  // Up to 16 queries [width], nullptr for none, as `parts` matrices: tiles [parts][steps][16][32].
  void (*pack_queries)(const float* const* queries, int64_t width, int parts, uint16_t* tiles);
  // Keys against packed queries: tiles [groups <= 2][parts][steps][16][32].
  // products[group] [blocks * 16] = max over the 16 tokens of the group where `uniform`, else [blocks][16][16] products.
  void (*multiply)(const uint16_t* queries, int groups, int parts, const TileKeys& keys, int64_t blocks, int64_t steps,
                   bool uniform, float* const* products);
  // Sets the matrix unit up for this thread, keeping what was set up before in `saved` (64 bytes), and puts that back.
  void (*begin)(void* saved);
  void (*end)(const void* saved);
};
const TileKernels* amx_kernels();  // nullptr where the compiler, the machine or its system has no such thing

}  // namespace msa_hf::cpu
