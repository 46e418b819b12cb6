// Numbers of 8 and 16 bits to float32 and back, by their bits: needs nothing of the processor, and compilers vectorize it.
//
// Everything here is static: each file that includes this compiles it for its own instruction set.

#pragma once

#include <cstdint>
#include <cstring>

#include "core.h"

namespace msa_hf::cpu {

static inline int64_t size_of(Type type) {
  switch (type) {
    case Type::f64: return 8;
    case Type::f32: return 4;
    case Type::f16:
    case Type::bf16: return 2;
    default: return 1;
  }
}

static inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float from_bf16(uint16_t number) { return as_float(static_cast<uint32_t>(number) << 16); }

// To the nearest, ties to even; NaN stays NaN.
static inline uint16_t to_bf16(float value) {
  uint32_t bits = as_bits(value);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}

static inline float from_f16(uint16_t number) {
  uint32_t sign = static_cast<uint32_t>(number & 0x8000u) << 16;
  uint32_t magnitude = static_cast<uint32_t>(number & 0x7FFFu) << 13;
  uint32_t normal = magnitude + (112u << 23);
  uint32_t special = magnitude | 0x7F800000u;
  // Below the normal numbers: a multiple of 2^-24, exact in float32 and no denormal there.
  uint32_t small = as_bits(static_cast<float>(static_cast<int32_t>(number & 0x7FFFu)) * 5.9604644775390625e-8f);
  uint32_t exponent = number & 0x7C00u;
  uint32_t bits = exponent == 0 ? small : (exponent == 0x7C00u ? special : normal);
  return as_float(sign | bits);
}

static inline uint16_t to_f16(float value) {
  uint32_t bits = as_bits(value);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum with 0.5 rounds to a multiple of 2^-24
    return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f)));
  }
  uint32_t rounded = magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

static inline float from_e4m3(uint8_t number) {
  uint32_t sign = static_cast<uint32_t>(number & 0x80u) << 24;
  uint32_t magnitude = number & 0x7Fu;
  uint32_t normal = (magnitude << 20) + (120u << 23);
  uint32_t small = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0.001953125f);  // times 2^-9
  uint32_t bits = magnitude < 8u ? small : (magnitude == 0x7Fu ? 0x7FC00000u : normal);
  return as_float(sign | bits);
}

// To the nearest, ties to even; beyond 448 the largest number; NaN stays NaN.
static inline uint8_t to_e4m3(float value) {
  uint32_t bits = as_bits(value);
  uint32_t sign = (bits >> 24) & 0x80u;
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint8_t>(sign | 0x7Fu);
  if (magnitude >= 0x43E00000u) return static_cast<uint8_t>(sign | 0x7Eu);  // 448 and more
  if (magnitude < 0x3C800000u) {  // below 2^-6: the sum with 2^14 rounds to a multiple of 2^-9
    return static_cast<uint8_t>(sign | (as_bits(as_float(magnitude) + 16384.0f) - as_bits(16384.0f)));
  }
  uint32_t rounded = magnitude - (120u << 23) + 0x7FFFFu + ((magnitude >> 20) & 1u);
  return static_cast<uint8_t>(sign | (rounded >> 20));
}

// [count] numbers of any type to float32.
static inline void widen(const void* source, Type type, int64_t count, float* target) {
  switch (type) {
    case Type::f64: {
      auto* numbers = static_cast<const double*>(source);
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<float>(numbers[i]);
      break;
    }
    case Type::f32:
      std::memcpy(target, source, static_cast<size_t>(count) * sizeof(float));
      break;
    case Type::f16: {
      auto* numbers = static_cast<const uint16_t*>(source);
      for (int64_t i = 0; i < count; ++i) target[i] = from_f16(numbers[i]);
      break;
    }
    case Type::bf16: {
      auto* numbers = static_cast<const uint16_t*>(source);
      for (int64_t i = 0; i < count; ++i) target[i] = from_bf16(numbers[i]);
      break;
    }
    case Type::i8: {
      auto* numbers = static_cast<const int8_t*>(source);
      for (int64_t i = 0; i < count; ++i) target[i] = static_cast<float>(numbers[i]);
      break;
    }
    case Type::e4m3: {
      auto* numbers = static_cast<const uint8_t*>(source);
      for (int64_t i = 0; i < count; ++i) target[i] = from_e4m3(numbers[i]);
      break;
    }
  }
}

// The inverse for floating types of 16 bits and more.
static inline void narrow(const float* source, int64_t count, Type type, void* target) {
  switch (type) {
    case Type::f64: {
      auto* numbers = static_cast<double*>(target);
      for (int64_t i = 0; i < count; ++i) numbers[i] = static_cast<double>(source[i]);
      break;
    }
    case Type::f32:
      std::memcpy(target, source, static_cast<size_t>(count) * sizeof(float));
      break;
    case Type::f16: {
      auto* numbers = static_cast<uint16_t*>(target);
      for (int64_t i = 0; i < count; ++i) numbers[i] = to_f16(source[i]);
      break;
    }
    case Type::bf16: {
      auto* numbers = static_cast<uint16_t*>(target);
      for (int64_t i = 0; i < count; ++i) numbers[i] = to_bf16(source[i]);
      break;
    }
    default:
      break;  // quantized numbers are written with their scale, in pool.cpp
  }
}

}  // namespace msa_hf::cpu
