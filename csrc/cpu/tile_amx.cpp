// Scoring with the matrix unit of recent x86-64 servers (AMX, bfloat16), where the system lets a process use it.

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MSA_AMX 1
#endif

#if defined(MSA_AMX)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace msa_hf::cpu {

namespace {

constexpr int64_t kRows = 16, kNumbers = 32, kTile = kRows * kNumbers;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "the processor reads 64 bytes");

void begin(void* saved) {
  _tile_storeconfig(saved);
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  // The intrinsics name eight bytes as what they read; this keeps the compiler from dropping the others.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

void end(const void* saved) {
  if (*static_cast<const uint8_t*>(saved) == 0) {
    _tile_release();
  } else {
    _tile_loadconfig(saved);
  }
}

// 32 numbers, those that `there` names, as bfloat16; zeros elsewhere.
inline __m512i read_bf16(const uint16_t* numbers, __mmask32 there) { return _mm512_maskz_loadu_epi16(there, numbers); }

inline __m512i read_int8(const int8_t* numbers, __mmask32 there) {
  __m256i bytes = _mm256_maskz_loadu_epi8(there, numbers);
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));  // exact: seven bits and a sign
}

inline __m512i read_float8(const uint8_t* numbers, __mmask32 there) {
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, numbers));
  const __m512i magnitude = _mm512_and_si512(wide, _mm512_set1_epi16(0x7F));
  const __m512i sign = _mm512_slli_epi16(_mm512_sub_epi16(wide, magnitude), 8);
  // The exponent of bfloat16 is 120 larger, its fraction four bits longer.
  __m512i number = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  // Below 8 stand the multiples of 2^-9, at 127 the NaN.
  const __m512i small = _mm512_castsi128_si512(
      _mm_setr_epi16(0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60));
  number = _mm512_mask_permutexvar_epi16(number, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude,
                                         small);
  number = _mm512_mask_mov_epi16(number, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7F)),
                                 _mm512_set1_epi16(0x7FC0));
  return _mm512_or_si512(number, sign);
}

template <class Number, __m512i (*read)(const Number*, __mmask32)>
void pack_rows(const void* keys, int64_t stride, int64_t count, int64_t width, uint16_t* tiles) {
  const int64_t whole = width / kNumbers, steps = (width + kNumbers - 1) / kNumbers;
  const __mmask32 tail = static_cast<__mmask32>((1ull << (width % kNumbers)) - 1);
  for (int64_t row = 0; row < kRows; ++row) {
    uint16_t* target = tiles + row * kNumbers;
    const Number* key = static_cast<const Number*>(keys) + row * stride;
    for (int64_t step = 0; step < steps; ++step) {
      const __mmask32 there = row >= count ? 0 : step < whole ? ~0u : tail;
      _mm512_storeu_si512(target + step * kTile, read(row < count ? key + step * kNumbers : nullptr, there));
    }
  }
}

void pack_keys(const void* keys, Type type, int64_t stride, int64_t count, int64_t width, uint16_t* tiles) {
  if (type == Type::bf16) pack_rows<uint16_t, read_bf16>(keys, stride, count, width, tiles);
  if (type == Type::i8) pack_rows<int8_t, read_int8>(keys, stride, count, width, tiles);
  if (type == Type::e4m3) pack_rows<uint8_t, read_float8>(keys, stride, count, width, tiles);
}

// 16 rows of 16 pairs of numbers to 16 columns: a query per row in `rows`, per column in `target`.
inline __attribute__((always_inline)) void transpose(const __m512i* rows, uint16_t* target) {
  __m512i pair[16], quad[16], half[16];
  for (int i = 0; i < 8; ++i) {
    pair[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    pair[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  // quad[4 j + c]: of rows 4 j to 4 j + 3, columns c, c + 4, c + 8 and c + 12.
  for (int j = 0; j < 4; ++j) {
    quad[4 * j] = _mm512_unpacklo_epi64(pair[4 * j], pair[4 * j + 2]);
    quad[4 * j + 1] = _mm512_unpackhi_epi64(pair[4 * j], pair[4 * j + 2]);
    quad[4 * j + 2] = _mm512_unpacklo_epi64(pair[4 * j + 1], pair[4 * j + 3]);
    quad[4 * j + 3] = _mm512_unpackhi_epi64(pair[4 * j + 1], pair[4 * j + 3]);
  }
  // half[c] and half[c + 4]: of rows 0 to 7, columns c and c + 8, and c + 4 and c + 12; half[c + 8 ..] of rows 8 to 15.
  for (int j = 0; j < 2; ++j) {
    for (int c = 0; c < 4; ++c) {
      half[8 * j + c] = _mm512_shuffle_i32x4(quad[8 * j + c], quad[8 * j + 4 + c], 0x88);
      half[8 * j + 4 + c] = _mm512_shuffle_i32x4(quad[8 * j + c], quad[8 * j + 4 + c], 0xDD);
    }
  }
  for (int c = 0; c < 8; ++c) {
    _mm512_storeu_si512(target + c * kNumbers, _mm512_shuffle_i32x4(half[c], half[8 + c], 0x88));
    _mm512_storeu_si512(target + (8 + c) * kNumbers, _mm512_shuffle_i32x4(half[c], half[8 + c], 0xDD));
  }
}

// Numbers 2i and 2i + 1 of a query stand beside each other in row i of a tile, at the column of the query. What one part
// leaves of a number goes to the next.
void pack_queries(const float* const* queries, int64_t width, int parts, uint16_t* tiles) {
  const int64_t steps = (width + kNumbers - 1) / kNumbers;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t left = width - step * kNumbers;
    const uint32_t there = left >= kNumbers ? ~0u : (1u << left) - 1;
    __m512i numbers[3][16];
    for (int column = 0; column < 16; ++column) {
      __m512 low = _mm512_setzero_ps(), high = low;
      if (queries[column] != nullptr) {
        const float* query = queries[column] + step * kNumbers;
        low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), query);
        if (left > 16) high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), query + 16);
      }
      for (int part = 0; part < parts; ++part) {
        const __m512i number = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
        numbers[part][column] = number;
        const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(number));
        const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(number, 1));
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(second, 16)));
      }
    }
    for (int part = 0; part < parts; ++part) transpose(numbers[part], tiles + (part * steps + step) * kTile);
  }
}

// The largest of each of 16 rows of 16, in the order of the rows.
inline __attribute__((always_inline)) __m512 row_maxima(const float* rows) {
  __m512 part[8];
  for (int i = 0; i < 8; ++i) {
    __m512 a = _mm512_load_ps(rows + 32 * i), b = _mm512_load_ps(rows + 32 * i + 16);
    part[i] = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  __m512 quad[4];
  for (int i = 0; i < 4; ++i) {
    __m512d a = _mm512_castps_pd(part[2 * i]), b = _mm512_castps_pd(part[2 * i + 1]);
    quad[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  __m512 low = _mm512_max_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x88), _mm512_shuffle_f32x4(quad[0], quad[1], 0xDD));
  __m512 high =
      _mm512_max_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x88), _mm512_shuffle_f32x4(quad[2], quad[3], 0xDD));
  return _mm512_max_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD));
}

inline __attribute__((always_inline)) void put(const float* tile, int64_t block, bool uniform, float* products) {
  if (uniform) {
    float* best = products + block * kRows;
    _mm512_storeu_ps(best, _mm512_max_ps(_mm512_loadu_ps(best), row_maxima(tile)));
  } else {
    std::memcpy(products + block * kRows * 16, tile, kRows * 16 * sizeof(float));
  }
}

// Two blocks of keys at once against one or two groups of tokens: tiles 0 to 3 are sums, 4 and 5 keys, 6 and 7 queries.
template <bool pair>
void multiply_blocks(const uint16_t* queries, int parts, const TileKeys& keys, const uint16_t* first,
                     const uint16_t* second, int64_t steps, float (*sums)[256]) {
  const uint16_t* other = queries + parts * steps * kTile;
  _tile_zero(0);
  _tile_zero(1);
  if (pair) _tile_zero(2);
  if (pair) _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, first + step * keys.step, keys.row * 2);
    _tile_loadd(5, second + step * keys.step, keys.row * 2);
    for (int part = 0; part < parts; ++part) {
      int64_t place = (part * steps + step) * kTile;
      _tile_loadd(6, queries + place, 64);
      if (pair) _tile_loadd(7, other + place, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (pair) _tile_dpbf16ps(2, 4, 7);
      if (pair) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  if (pair) _tile_stored(2, sums[2], 64);
  if (pair) _tile_stored(3, sums[3], 64);
}

void multiply(const uint16_t* queries, int groups, int parts, const TileKeys& keys, int64_t blocks, int64_t steps,
              bool uniform, float* const* products) {
  alignas(64) float sums[4][256];
  for (int64_t block = 0; block < blocks; block += 2) {
    const uint16_t* first = keys.data + block * keys.block;
    const bool both = block + 1 < blocks;
    const uint16_t* second = both ? first + keys.block : first;
    if (groups == 2) {
      multiply_blocks<true>(queries, parts, keys, first, second, steps, sums);
    } else {
      multiply_blocks<false>(queries, parts, keys, first, second, steps, sums);
    }
    for (int group = 0; group < groups; ++group) {
      put(sums[2 * group], block, uniform, products[group]);
      if (both) put(sums[2 * group + 1], block + 1, uniform, products[group]);
    }
  }
}

const TileKernels kernels = {pack_keys, pack_queries, multiply, begin, end};

}  // namespace

}  // namespace msa_hf::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace msa_hf::cpu {

const TileKernels* amx_kernels() {
#if defined(MSA_AMX)
  static const bool there = [] {
    if (avx512_kernels() == nullptr) return false;
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;  // of the matrix unit
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16) == 0 || (d & tile) == 0) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & (1u << 5)) == 0) return false;  // bfloat16 of AVX-512
    // The system must save the tiles (17 and 18 of XCR0), and be asked for the second, once per process.
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (1u << 27)) == 0) return false;
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x60000u) != 0x60000u) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  if (there) return &kernels;
#endif
  return nullptr;
}

}  // namespace msa_hf::cpu
