// The types of numbers that kernels read and write.
#pragma once

namespace msa_hf {

enum class Type : int { f32, bf16, f16, e4m3, s8 };

constexpr int bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 || type == Type::f16 ? 2 : 1; }

}  // namespace msa_hf
