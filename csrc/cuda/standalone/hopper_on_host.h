// The instructions of sm_80 and later that route_documents uses, on the host's threads (cuda_on_host.h).
//
// They do what their documentation says, and nothing sooner than it must: copies into shared memory and products of
// warpgroups happen at a random moment between their issue and the wait for them. So a wrong parity, a stage that is
// filled again too early or a wrong descriptor shows. What it cannot show: speed, and rules of the hardware that are not
// written here.
#pragma once

#include <cuda.h>

#include "../common/numbers.cuh"
#include "cuda_on_host.h"

#ifndef __grid_constant__
#define __grid_constant__
#endif

namespace emulated {

struct Rows {  // a tensor map
  const unsigned char* data;
  int64_t number_bytes, width, rows;
  int box;
};
static_assert(sizeof(Rows) <= sizeof(CUtensorMap));
inline cudaError_t map_rows(CUtensorMap* map, const void* data, int number_bytes, int64_t width, int64_t rows, int box) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || width * number_bytes % 16 != 0 || box > 256 || rows < 1)
    return cudaErrorInvalidValue;
  const Rows value{static_cast<const unsigned char*>(data), number_bytes, width, rows, box};
  std::memcpy(map, &value, sizeof value);
  return cudaSuccess;
}

inline void transfer_box(Block& block, uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier) {
  Rows rows;
  std::memcpy(&rows, map, sizeof rows);
  if (to % 1024 != 0) fail("a tile that is not aligned to its swizzle");
  Block* target = &block;
  transfers.push_back([=] {
    for (int r = 0; r < rows.box; r++) {
      for (int b = 0; b < 128; b++) {
        const int64_t byte = x * rows.number_bytes + b, row = int64_t{y} + r;
        const bool inside = byte >= 0 && byte < rows.width * rows.number_bytes && row >= 0 && row < rows.rows;
        uint32_t address = to + r * 128 + b;
        address ^= (address >> 7 & 7) << 4;
        target->at(address) = inside ? rows.data[row * rows.width * rows.number_bytes + byte] : 0;
      }
    }
    Phase& phase = target->phase(barrier);
    phase.bytes -= int64_t{rows.box} * 128;
    phase.check();
  });
}

}  // namespace emulated

namespace msa_hf::route {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulated::now->block->shared.data()) +
         emulated::kSharedBase;
}

inline void copy16(uint32_t to, const void* from, int bytes) {
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) emulated::fail("cp.async of 16 bytes that are not aligned");
  emulated::Block* block = emulated::now->block;
  emulated::now->open_copies.push_back([=] {
    for (int i = 0; i < 16; i++) block->at(to + i) = i < bytes ? static_cast<const unsigned char*>(from)[i] : 0;
  });
}
inline void copy_commit() {
  emulated::now->copies.push_back(std::move(emulated::now->open_copies));
  emulated::now->open_copies.clear();
  if (emulated::order() % 2 == 0) {
    for (const auto& copy : emulated::now->copies.back()) copy();
    emulated::now->copies.back().clear();
  }
}
template <int N>
void copy_wait() {
  emulated::finish(emulated::now->copies, N);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  const auto rows = emulated::gather(address);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    const uint32_t row = rows[i * 8 + lane / 4];
    if (row % 16 != 0) emulated::fail("ldmatrix of a row that is not aligned");
    for (int b = 0; b < 4; b++)
      reinterpret_cast<unsigned char*>(&r[i])[b] = emulated::now->block->at(row + lane % 4 * 4 + b);
  }
}
template <Type TYPE>
auto number_at(const unsigned char* bytes) {
  typename Number<TYPE>::storage number;
  std::memcpy(&number, bytes, sizeof number);
  return Number<TYPE>::decode(number);
}
template <Type TYPE, class Acc>
void warp_product(Acc* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  const auto all = emulated::gather(Fragment{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = threadIdx.x % 32;
  constexpr int SIZE = sizeof(typename Number<TYPE>::storage);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int byte = 0; byte < 32; byte += SIZE) {
      const int other = byte % 16 / 4;
      const Fragment x = all[row % 8 * 4 + other], y = all[column * 4 + other];
      const auto* xs = reinterpret_cast<const unsigned char*>(&x.a[row / 8 + 2 * (byte / 16)]);
      const auto* ys = reinterpret_cast<const unsigned char*>(&y.b[byte / 16]);
      d[i] += static_cast<Acc>(number_at<TYPE>(xs + byte % 4) * number_at<TYPE>(ys + byte % 4));
    }
  }
}

inline void barrier_init(uint32_t barrier, int arrivals) {
  emulated::now->block->at(barrier + 7);
  emulated::now->block->phases[barrier] = {0, arrivals, arrivals, 0};
}
inline void barrier_init_done() {}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  if (bytes >= 1u << 20) emulated::fail("more bytes than an mbarrier counts");
  emulated::Phase& phase = emulated::now->block->phase(barrier);
  phase.bytes += bytes;
  phase.pending--;
  phase.check();
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  emulated::Phase& phase = emulated::now->block->phase(barrier);
  if (parity > 1) emulated::fail("a parity that is neither 0 nor 1");
  while ((phase.number & 1) == parity) emulated::sleep_while(&phase.number, phase.number);
}
inline void arrive_at(emulated::Block& block, uint32_t barrier) {
  emulated::Phase& phase = block.phase(barrier);
  phase.pending--;
  phase.check();
}
inline void barrier_arrive(uint32_t barrier) { arrive_at(*emulated::now->block, barrier); }
inline void barrier_arrive_in(uint32_t barrier, uint32_t rank) {
  if (rank >= emulated::now->block->cluster->size()) emulated::fail("a block outside the cluster");
  arrive_at((*emulated::now->block->cluster)[rank], barrier);
}
inline uint32_t cluster_rank() { return emulated::now->block->rank; }
inline void cluster_sync() { emulated::arrive_and_wait(*emulated::now->block->cluster_barrier); }
inline uint64_t keep_policy() { return 0; }
inline uint64_t again_policy() { return 0; }
inline uint64_t once_policy() { return 0; }
inline void load_box(uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint64_t) {
  emulated::transfer_box(*emulated::now->block, to, map, x, y, barrier);
}
inline void load_box_to(
    uint32_t to, const CUtensorMap* map, int x, int y, uint32_t barrier, uint16_t blocks, uint64_t) {
  for (size_t i = 0; i < emulated::now->block->cluster->size(); i++)
    if (blocks >> i & 1) emulated::transfer_box((*emulated::now->block->cluster)[i], to, map, x, y, barrier);
}
inline void prefetch_map(const CUtensorMap*) {}

// The lanes of a warp do these together (.sync.aligned).
inline void wgmma_begin() { __syncwarp(); }
inline void wgmma_commit() {
  __syncwarp();
  emulated::now->products.push_back(std::move(emulated::now->open_products));
  emulated::now->open_products.clear();
  if (emulated::order() % 2 == 0) {
    // products are done in order: all before these too
    for (auto& group : emulated::now->products) {
      for (const auto& product : group) product();
      group.clear();
    }
  }
}
template <int N>
void wgmma_wait() {
  emulated::finish(emulated::now->products, N);
  __syncwarp();
}
template <Type TYPE, int COLUMNS>
struct Wgmma {
  template <class Acc>
  static void run(Acc (&d)[COLUMNS / 2], uint64_t a, uint64_t b, int scale_d) {
    emulated::Block* block = emulated::now->block;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    Acc* out = d;
    // the bytes of a row of the tile that a descriptor describes
    const auto row_at = [block](uint64_t descriptor, int row, unsigned char (&bytes)[32]) {
      if (descriptor >> 62 != 1) emulated::fail("a descriptor without the 128-byte swizzle");
      const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
      const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
      for (int i = 0; i < 32; i++) {
        uint32_t address = start + row / 8 * stride + row % 8 * 128 + i;
        address ^= (address >> 7 & 7) << 4;
        bytes[i] = block->at(address);
      }
    };
    emulated::now->open_products.push_back([=] {
      constexpr int SIZE = sizeof(typename Number<TYPE>::storage);
      unsigned char bytes[32];
      Acc rows[2][32 / SIZE];
      for (int h = 0; h < 2; h++) {
        row_at(a, warp * 16 + lane / 4 + 8 * h, bytes);
        for (int i = 0; i < 32 / SIZE; i++) rows[h][i] = static_cast<Acc>(number_at<TYPE>(bytes + i * SIZE));
      }
      for (int column = 0; column < COLUMNS; column++) {
        if (column % 8 / 2 != lane % 4) continue;
        row_at(b, column, bytes);
        for (int h = 0; h < 2; h++) {
          Acc& sum = out[column / 8 * 4 + 2 * h + column % 2];
          if (!scale_d) sum = 0;
          for (int i = 0; i < 32 / SIZE; i++) sum += rows[h][i] * static_cast<Acc>(number_at<TYPE>(bytes + i * SIZE));
        }
      }
    });
  }
};

}  // namespace msa_hf::route
