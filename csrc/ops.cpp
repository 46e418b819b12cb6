// The operators of the namespace `msa_hf`: what they are called with and what they return.
//
// Kernels register themselves for their device: cpu/bindings.cpp, and cuda/*/bindings.cpp where they were compiled. Both call
// the checks in checks.h first, so that the same mistake gives the same message everywhere. Shapes for tracing and
// derivatives are registered in Python (src/msa_hf/ops).

#include <torch/csrc/stable/library.h>

#include <string>

// MSA_HF_SOURCES and MSA_HF_CUDA_ARCHITECTURES, written by setup.py.
#if __has_include("msa_hf_build.h")
#include "msa_hf_build.h"
#endif
#if !defined(MSA_HF_SOURCES)
#define MSA_HF_SOURCES "unknown"
#endif
#if !defined(MSA_HF_CUDA_ARCHITECTURES)
#define MSA_HF_CUDA_ARCHITECTURES "none"
#endif

STABLE_TORCH_LIBRARY(msa_hf, m) {
  // Score every document for every sample and choose the k best.
  //   queries       [B, T, E] floating: heads reduced, normalized where the similarity is cosine
  //   routing_mask  [B, T] bool: the tokens that route
  //   keys          [C, E] float32, bfloat16, float16; or int8, float8_e4m3fn with
  //   scales        [C] float32, not negative: the value of a number is scale * number
  //   offsets       [N + 1] int64: the chunks of document i are offsets[i] up to offsets[i + 1], at least one
  //   alive         [N] bool: documents that may be chosen; None for all
  // Returns documents [B, k] int64, best first, equal scores by the lower index, -1 where fewer were there; and their
  // scores [B, k] float32 (max over a document's chunks of max over routing tokens of the inner product, accumulated in
  // float32), -inf beside -1. A sample without a routing token chooses nothing. A score that is NaN is never chosen.
  m.def(
      "route_documents(Tensor queries, Tensor routing_mask, Tensor keys, Tensor? scales, Tensor offsets, "
      "Tensor? alive, int k) -> (Tensor documents, Tensor scores)");

  // Means of the chunks of packed documents.
  //   keys, values, router_keys  [tokens, G, D] floating (float64 on the CPU too); any strides but a dense last dimension
  //   token_offsets              [N + 1] int64: the tokens of document i are token_offsets[i] up to token_offsets[i + 1]
  //   chunk_size                 tokens per chunk; chunks start with the document, the last may be partial
  //   chunks                     C, the sum of ceil(length / chunk_size): given, so that no device has to be waited for
  //   normalize                  L2-normalize routing keys per head, epsilon 1e-12 inside the root
  //   routing_dtype              None (that of router_keys), or int8 or float8_e4m3fn: one scale per chunk
  // Returns content [C, 2, G, D] in the dtype of values, routing_keys [C, G * D], and scales [C] float32, empty where
  // nothing was quantized. Sums are taken in float32 (float64 for float64).
  m.def(
      "pool_chunks(Tensor keys, Tensor values, Tensor router_keys, Tensor token_offsets, int chunk_size, "
      "SymInt chunks, bool normalize, ScalarType? routing_dtype=None) -> "
      "(Tensor content, Tensor routing_keys, Tensor scales)");
  // The derivative of the above, without quantization: gradients of content and routing_keys to those of keys, values
  // and router_keys. `router_keys` are those of the forward call; they matter only where it normalized.
  m.def(
      "pool_chunks_backward(Tensor grad_content, Tensor grad_routing_keys, Tensor router_keys, Tensor token_offsets, "
      "int chunk_size, bool normalize) -> (Tensor grad_keys, Tensor grad_values, Tensor grad_router_keys)");

  // Copy the chunks of chosen documents into one context per sample.
  //   documents  [B, k] int64: positions, -1 for none; rows come in ascending order of documents
  //   offsets    [N + 1] int64
  //   content    [C, 2, G, D]: floating, or float8_e4m3fn with
  //   scales     [C, 2] float32: one for the key and one for the value of a chunk
  //   width      R, at least the most rows of any sample: an error on the CPU where it is not, while a device, which cannot
  //              say so without being waited for, leaves out what does not fit
  //   dtype      of the result; None for that of content (float32 for float8_e4m3fn)
  //   first      the bank's chunk that content begins with, where it is a part of them, on the device of documents: rows
  //              of chunks that are not in it are zero, and valid. None: content has all chunks
  // Returns keys and values [B, G, R, D], valid [B, R] bool, and slots [B, R] int64: the column of `documents` that a
  // row came from. Rows that are not valid are zero, their slots 0.
  m.def(
      "gather_documents(Tensor documents, Tensor offsets, Tensor content, Tensor? scales, SymInt width, "
      "ScalarType? dtype=None, int? first=None) -> (Tensor keys, Tensor values, Tensor valid, Tensor slots)");

  // One softmax over [context rows; own tokens] for a single query token of every sample. No kernel of it is compiled yet:
  // Triton has one, for GPUs.
  //   query                         [B, H, D] floating
  //   keys, values                  [B, G, S, D]: the own tokens; H is a multiple of G
  //   mask                          [B or 1, S] bool: own tokens that are visible; None for all
  //   context_keys, context_values  [B, G, R, D]
  //   row_mask                      [B, R] bool: rows that are there
  //   bias                          [B, R] float32: added to the logits of rows; None for nothing
  //   scaling                       of the logits
  // Returns [B, H, D] in the dtype of values.
  m.def(
      "attend_token(Tensor query, Tensor keys, Tensor values, Tensor? mask, Tensor context_keys, "
      "Tensor context_values, Tensor row_mask, Tensor? bias, float scaling) -> Tensor");

  // What was compiled, one "name: text" per line: the sources' digest, the instruction sets that this processor has of
  // those that were compiled in, and the CUDA architectures ("none" without CUDA).
  m.def("build_info() -> str");
}

namespace msa_hf {

std::string cpu_info();  // cpu/bindings.cpp

static std::string build_info() {
  return "sources: " MSA_HF_SOURCES "\ncpu: " + cpu_info() + "\ncuda: " MSA_HF_CUDA_ARCHITECTURES;
}

}  // namespace msa_hf

STABLE_TORCH_LIBRARY_IMPL(msa_hf, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&msa_hf::build_info));
}
