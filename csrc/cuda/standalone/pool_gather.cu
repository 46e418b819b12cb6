// Checks pool_chunks and gather_documents against plain loops on the host, then times them. No torch.
//
//   pool_gather.sh              checks, then times; ends with status 1 and times nothing where a check fails
//   pool_gather.sh --check      checks only; --cases N: how many of each (default 150), --seed N: which
//   pool_gather.sh --host       the same checks without a GPU, on emulated threads (cuda_on_host.h)

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#ifdef MSA_HF_EMULATE
#include "cuda_on_host.h"
#endif

#include "../gather/gather_documents.cu"
#include "../gather/staging.cu"
#include "../pool/pool_chunks.cu"

using namespace msa_hf;

#define CHECK_CUDA(call)                                                                             \
  do {                                                                                               \
    const cudaError_t status_ = (call);                                                              \
    if (status_ != cudaSuccess) {                                                                    \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, explain(status_).c_str());  \
      std::exit(2);                                                                                  \
    }                                                                                                \
  } while (false)

namespace trial {

std::mt19937_64 generator(20260);
int failures = 0, compared = 0;

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float draw_normal() { return std::normal_distribution<float>()(generator); }
template <typename T>
T pick(std::initializer_list<T> choices) {
  return *(choices.begin() + draw(0, static_cast<int64_t>(choices.size()) - 1));
}

const char* name_of(Type type) {
  switch (type) {
    case Type::f32:
      return "float32";
    case Type::bf16:
      return "bfloat16";
    case Type::f16:
      return "float16";
    case Type::s8:
      return "int8";
    default:
      return "float8_e4m3";
  }
}

float decode(const void* data, int64_t index, Type type) {
  switch (type) {
    case Type::f32:
      return static_cast<const float*>(data)[index];
    case Type::bf16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    case Type::f16:
      return __half2float(static_cast<const __half*>(data)[index]);
    case Type::s8:
      return static_cast<float>(static_cast<const int8_t*>(data)[index]);
    default:
      return __half2float(__half(__nv_cvt_fp8_to_halfraw(static_cast<const uint8_t*>(data)[index], __NV_E4M3)));
  }
}

void encode(void* data, int64_t index, Type type, float x) {
  switch (type) {
    case Type::f32:
      static_cast<float*>(data)[index] = x;
      break;
    case Type::bf16:
      static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16(x);
      break;
    case Type::f16:
      static_cast<__half*>(data)[index] = __float2half(x);
      break;
    case Type::s8:
      static_cast<int8_t*>(data)[index] = static_cast<int8_t>(x);
      break;
    default:
      static_cast<uint8_t*>(data)[index] = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  }
}

// Half a step of a type above 1.
double rounding_of(Type type) {
  switch (type) {
    case Type::f32:
      return std::ldexp(1.0, -24);
    case Type::bf16:
      return std::ldexp(1.0, -8);
    case Type::f16:
      return std::ldexp(1.0, -11);
    default:
      return std::ldexp(1.0, -4);
  }
}

// Memory on both sides. On the device it is exactly as large as asked for: compute-sanitizer sees what lies behind.
struct Buffer {
  std::vector<char> host;
  void* device = nullptr;
  size_t shift = 0;

  explicit Buffer(size_t bytes, size_t shift_by = 0) : host(bytes, static_cast<char>(0xff)), shift(shift_by) {
    CHECK_CUDA(cudaMalloc(&device, bytes + shift));
  }
  Buffer(Buffer&& other) : host(std::move(other.host)), device(other.device), shift(other.shift) {
    other.device = nullptr;
  }
  ~Buffer() { cudaFree(device); }
  void* at() const { return static_cast<char*>(device) + shift; }
  void upload() { CHECK_CUDA(cudaMemcpy(at(), host.data(), host.size(), cudaMemcpyHostToDevice)); }
  void download() { CHECK_CUDA(cudaMemcpy(host.data(), at(), host.size(), cudaMemcpyDeviceToHost)); }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(host.data());
  }
};

void expect(bool good, const std::string& what, const std::string& description) {
  if (good) return;
  ++failures;
  if (failures <= 20) std::fprintf(stderr, "FAILED %s\n  in %s\n", what.c_str(), description.c_str());
}

struct Layout {
  bool packed;
  bool head_major;
  int64_t tokens, documents, longest, groups, dim, padding;  // padding: numbers between tokens (or heads)

  int64_t numbers() const {
    const int64_t rows = packed ? tokens : documents * longest;
    return rows * groups * dim + rows * padding + 16;
  }
  TokenStates states(void* data) const {
    TokenStates result;
    result.data = data;
    result.packed = packed;
    const int64_t rows = packed ? tokens : longest;
    result.token_stride = head_major ? dim : groups * dim + padding;
    result.head_stride = head_major ? rows * dim : dim;
    result.document_stride = head_major ? groups * rows * dim : longest * (groups * dim + padding);
    return result;
  }
};

int64_t index_of(const TokenStates& states, int64_t document, int64_t offset, int64_t token, int64_t head, int64_t i) {
  const int64_t base =
      states.packed ? (offset + token) * states.token_stride : document * states.document_stride + token * states.token_stride;
  return base + head * states.head_stride + i;
}

// Kernels that pool_chunks_forward chooses among, and others to compare with.
struct Variant {
  const char* name;
  cudaError_t (*launch)(const PoolForward&, cudaStream_t);
  int threads;  // of pool_columns_kernel; 0: takes any shape

  bool fits(const PoolForward& call) const {
    return call.input == Type::bf16 && call.chunking.chunks > 0 &&
           are_wide<__nv_bfloat16>({&call.keys, &call.values, &call.router_keys}, call.chunking) &&
           (threads == 0 || are_columns(call, 8, threads));
  }
};

const Variant kVariants[] = {
    {"any shape", launch_pool_forward<__nv_bfloat16, 8, 128, 8>, 0},
    {"columns, 128 threads, ahead", launch_pool_columns<__nv_bfloat16, 8, 128, 8, true>, 128},
    {"columns, 128 threads", launch_pool_columns<__nv_bfloat16, 8, 128, 8, false>, 128},
    {"columns, 64 threads, ahead", launch_pool_columns<__nv_bfloat16, 8, 64, 8, true>, 64},
};

// All that can be taken, to the bits of the first; rows shorter than its block are added in another order.
void check_variants(
    const PoolForward& call, Buffer& content, Buffer& routing, Buffer& scales, const std::string& description) {
  std::vector<std::vector<char>> wanted;
  if (call.chunking.groups * call.chunking.dim < 1024) return;
  for (const Variant& variant : kVariants) {
    if (!variant.fits(call)) continue;
    for (Buffer* buffer : {&content, &routing, &scales}) {
      std::fill(buffer->host.begin(), buffer->host.end(), static_cast<char>(0xff));
      buffer->upload();
    }
    CHECK_CUDA(variant.launch(call, nullptr));
    CHECK_CUDA(cudaDeviceSynchronize());
    for (Buffer* buffer : {&content, &routing, &scales}) buffer->download();
    if (wanted.empty()) wanted = {content.host, routing.host, scales.host};
    const bool same = content.host == wanted[0] && routing.host == wanted[1] && scales.host == wanted[2];
    expect(same, std::string("other bits of ") + variant.name, description);
    ++compared;
  }
}

void check_pool(int number) {
  const bool common = number % 4 == 3;  // the shape that most models have
  const Type input = common ? Type::bf16 : pick({Type::f32, Type::bf16, Type::f16});
  const Type content_type = draw(0, 3) ? input : pick({Type::f32, Type::bf16});
  const Type routing_type =
      common ? pick({input, Type::s8, Type::e4m3})
             : pick({input, input, Type::f32, Type::bf16, Type::s8, Type::e4m3});
  const int chunk_size = pick({1, 2, 3, 7, 8, 9, 16, 33, 64, 100});
  Layout layout{};
  layout.packed = draw(0, 2) > 0;
  layout.head_major = draw(0, 1);
  layout.groups = pick({1, 2, 3, 4, 8});
  layout.dim = pick({1, 4, 8, 12, 16, 20, 32, 64, 80, 128, 256});
  layout.padding = layout.head_major || draw(0, 1) ? 0 : common ? 8 : pick({1, 8, 16});
  if (common) {
    layout.groups = pick({8, 8, 16});
    layout.dim = pick({128, 128, 256});
  }
  const size_t shift = common || draw(0, 3) ? 0 : bytes_of(input);
  layout.documents = common ? pick({number % 50 != 7 ? 0 : 1, 1, 5, 33}) : pick({1, 1, 2, 5, 31, 32, 33, 40});
  std::vector<int64_t> lengths(layout.documents);
  for (int64_t& length : lengths) {
    length = pick<int64_t>({0, 1, chunk_size - 1, chunk_size, chunk_size + 1, 2 * chunk_size, draw(1, 3 * chunk_size)});
  }
  // Packed tokens before the first document and behind the last belong to none.
  const int64_t outside = layout.packed && draw(0, 3) == 0 ? draw(1, 40) : 0;
  std::vector<int64_t> token_offsets(1, outside), chunk_offsets(1, 0);
  for (int64_t length : lengths) {
    token_offsets.push_back(token_offsets.back() + length);
    chunk_offsets.push_back(chunk_offsets.back() + (length + chunk_size - 1) / chunk_size);
    layout.longest = std::max(layout.longest, length);
  }
  layout.tokens = token_offsets.back() + outside;
  const bool normalize = draw(0, common ? 4 : 1), zeros = draw(0, 7) == 0;
  if (number % 50 == 7) {  // rows longer than the block, and more shared memory than comes without asking
    layout.groups = 64;
    layout.dim = 128;
    layout.documents = 1;
    token_offsets.resize(2);
    chunk_offsets.resize(2);
    lengths.resize(1);
    layout.tokens = token_offsets.back() + outside;
  }
  const int64_t behind = layout.documents > 0 && draw(0, 2) ? 0 : 3, chunks = chunk_offsets.back() + behind;
  const int64_t width = layout.groups * layout.dim, count = layout.numbers();
  char description[400];
  std::snprintf(description, sizeof description,
                "pool %d: input %s content %s routing %s P=%d %s %s N=%ld longest=%ld G=%ld D=%ld padding=%ld shift=%zu "
                "behind=%ld outside=%ld normalize=%d zeros=%d",
                number, name_of(input), name_of(content_type), name_of(routing_type), chunk_size,
                layout.packed ? "packed" : "padded", layout.head_major ? "head-major" : "token-major",
                long(layout.documents), long(layout.longest), long(layout.groups), long(layout.dim),
                long(layout.padding), shift, long(behind), long(outside), normalize, zeros);

  // What is no token holds NaN (all bits set).
  std::vector<Buffer> states;
  for (int part = 0; part < 3; ++part) states.emplace_back(count * bytes_of(input), shift);
  std::vector<std::vector<double>> means(3, std::vector<double>(chunks * width, 0.0));
  double largest = 0.0;
  for (int part = 0; part < 3; ++part) {
    const TokenStates view = layout.states(states[part].host.data());
    for (int64_t document = 0; document < layout.documents; ++document) {
      for (int64_t token = 0; token < lengths[document]; ++token) {
        const int64_t chunk = chunk_offsets[document] + token / chunk_size;
        const int64_t rows = std::min<int64_t>(chunk_size, lengths[document] - token / chunk_size * chunk_size);
        for (int64_t head = 0; head < layout.groups; ++head) {
          for (int64_t i = 0; i < layout.dim; ++i) {
            const int64_t index = index_of(view, document, token_offsets[document], token, head, i);
            encode(states[part].host.data(), index, input, zeros ? 0.0f : draw_normal());
            const double x = decode(states[part].host.data(), index, input);
            means[part][chunk * width + head * layout.dim + i] += x / rows;
            largest = std::max(largest, std::abs(x));
          }
        }
      }
    }
    states[part].upload();
  }
  Buffer tokens_at(token_offsets.size() * 8), chunks_at(token_offsets.size() * 8);
  std::memcpy(tokens_at.host.data(), token_offsets.data(), tokens_at.host.size());
  tokens_at.upload();
  chunks_at.upload();
  CHECK_CUDA(find_chunk_offsets(static_cast<int64_t*>(tokens_at.at()), static_cast<int64_t*>(chunks_at.at()),
                                layout.documents, chunk_size, nullptr));
  chunks_at.download();
  expect(std::memcmp(chunks_at.host.data(), chunk_offsets.data(), chunks_at.host.size()) == 0, "chunk offsets",
         description);

  Buffer content(chunks * 2 * width * bytes_of(content_type)), routing(chunks * width * bytes_of(routing_type));
  Buffer scales(chunks * 4);
  content.upload();
  routing.upload();
  scales.upload();
  PoolForward call;
  call.chunking = {static_cast<int64_t*>(tokens_at.at()), static_cast<int64_t*>(chunks_at.at()), layout.documents,
                   chunks, chunk_size, int(layout.groups), int(layout.dim)};
  if (draw(0, 1)) call.chunking.chunk_offsets = nullptr;
  call.chunking.tokens = layout.tokens;
  call.keys = layout.states(states[0].at());
  call.values = layout.states(states[1].at());
  call.router_keys = layout.states(states[2].at());
  call.input = input;
  call.content = content.at();
  call.content_type = content_type;
  call.routing = routing.at();
  call.routing_type = routing_type;
  call.scales = bytes_of(routing_type) == 1 ? static_cast<float*>(scales.at()) : nullptr;
  call.normalize = normalize;
  CHECK_CUDA(pool_chunks_forward(call, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  content.download();
  routing.download();
  scales.download();

  // Rounding of a mean in float32: errors of a sum's steps grow as the root of their number.
  const double sloppy = 4 * std::sqrt(chunk_size) * std::ldexp(1.0, -24) * largest;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int part = 0; part < 2; ++part) {
      for (int64_t i = 0; i < width; ++i) {
        const double want = means[part][chunk * width + i];
        const double got = decode(content.host.data(), (chunk * 2 + part) * width + i, content_type);
        const double allowed = rounding_of(content_type) * std::abs(want) * 1.01 + sloppy + 1e-7;
        if (!(std::abs(got - want) <= allowed)) {
          char text[200];
          std::snprintf(text, sizeof text, "%s of chunk %ld, number %ld: got %g, want %g", part ? "value" : "key",
                        long(chunk), long(i), got, want);
          expect(false, text, description);
          return;
        }
      }
    }
    std::vector<double> key(means[2].begin() + chunk * width, means[2].begin() + (chunk + 1) * width);
    double slack = sloppy, most = 0.0;
    for (int64_t head = 0; normalize && head < layout.groups; ++head) {
      double square = 1e-12;
      for (int64_t i = 0; i < layout.dim; ++i) square += key[head * layout.dim + i] * key[head * layout.dim + i];
      for (int64_t i = 0; i < layout.dim; ++i) key[head * layout.dim + i] /= std::sqrt(square);
      slack = std::max(slack, 2 * sloppy / std::sqrt(square) + 1e-6);
    }
    for (double x : key) most = std::max(most, std::abs(x));
    double scale = 1.0;
    if (call.scales != nullptr) {
      scale = scales.as<float>()[chunk];
      const double limit = routing_type == Type::s8 ? 127.0 : 448.0;
      const double want = most > 0.0 ? most / limit : 1.0;
      expect(std::abs(scale - want) <= slack / limit + 1e-6 * want, "scale of a chunk", description);
    }
    for (int64_t i = 0; i < width; ++i) {
      const double got = decode(routing.host.data(), chunk * width + i, routing_type) * scale;
      double allowed = slack + 1e-7;
      if (routing_type == Type::s8) {
        allowed += 0.5 * scale * 1.001;
      } else {
        allowed += rounding_of(routing_type) * std::abs(key[i]) * 1.01;
        if (routing_type == Type::e4m3) allowed += scale * std::ldexp(1.0, -10) * 1.01;
      }
      if (!(std::abs(got - key[i]) <= allowed)) {
        char text[200];
        std::snprintf(text, sizeof text, "routing key of chunk %ld, number %ld: got %g, want %g", long(chunk), long(i),
                      got, key[i]);
        expect(false, text, description);
        return;
      }
    }
  }

  check_variants(call, content, routing, scales, description);

  // Backward: every token of chunk c gets gradient / rows, through the norm for router keys.
  Buffer grad_content(chunks * 2 * width * bytes_of(input)), grad_routing(chunks * width * bytes_of(input));
  for (int64_t i = 0; i < chunks * 2 * width; ++i) encode(grad_content.host.data(), i, input, draw_normal());
  for (int64_t i = 0; i < chunks * width; ++i) encode(grad_routing.host.data(), i, input, draw_normal());
  grad_content.upload();
  grad_routing.upload();
  std::vector<Buffer> grads;
  for (int part = 0; part < 3; ++part) {
    grads.emplace_back(count * bytes_of(input), shift);
    grads[part].upload();
  }
  PoolBackward back;
  back.chunking = call.chunking;
  back.router_keys = call.router_keys;
  back.input = input;
  back.grad_content = grad_content.at();
  back.grad_content_type = input;
  back.grad_routing = grad_routing.at();
  back.grad_routing_type = input;
  back.grad_keys = layout.states(grads[0].at());
  back.grad_values = layout.states(grads[1].at());
  back.grad_router_keys = layout.states(grads[2].at());
  back.normalize = normalize;
  CHECK_CUDA(pool_chunks_backward(back, nullptr));
  CHECK_CUDA(cudaDeviceSynchronize());
  for (int part = 0; part < 3; ++part) {
    grads[part].download();
    const TokenStates view = layout.states(grads[part].host.data());
    std::vector<char> touched(count, 0);
    for (int64_t document = 0; document < layout.documents; ++document) {
      for (int64_t token = 0; token < lengths[document]; ++token) {
        const int64_t chunk = chunk_offsets[document] + token / chunk_size;
        const int64_t rows = std::min<int64_t>(chunk_size, lengths[document] - token / chunk_size * chunk_size);
        for (int64_t head = 0; head < layout.groups; ++head) {
          double along = 0.0, square = 1e-12, factor = 1.0;
          const double* mean = &means[2][chunk * width + head * layout.dim];
          const int64_t start = chunk * width + head * layout.dim;
          if (part == 2 && normalize) {
            for (int64_t i = 0; i < layout.dim; ++i) square += mean[i] * mean[i];
            factor = 1.0 / std::sqrt(square);
            for (int64_t i = 0; i < layout.dim; ++i) {
              along += decode(grad_routing.host.data(), start + i, input) * mean[i] * factor;
            }
          }
          for (int64_t i = 0; i < layout.dim; ++i) {
            double want;
            if (part < 2) {
              want = decode(grad_content.host.data(), (chunk * 2 + part) * width + head * layout.dim + i, input);
            } else {
              want = decode(grad_routing.host.data(), start + i, input);
              if (normalize) want = factor * (want - mean[i] * factor * along);
            }
            want /= rows;
            const int64_t index = index_of(view, document, token_offsets[document], token, head, i);
            touched[index] = 1;
            const double got = decode(grads[part].host.data(), index, input);
            double limit = 1.01 * rounding_of(input) * std::abs(want) + 1e-6 * (1 + factor) * (1 + std::abs(along)) / rows;
            if (part == 2 && normalize) {
              limit += 4 * sloppy * factor * factor * (1 + std::abs(along)) * std::sqrt(layout.dim) / rows;
            }
            if (input == Type::f16) limit += 1e-7;
            if (input == Type::f16 && std::abs(want) > 60000) continue;
            if (!(std::abs(got - want) <= limit)) {
              char text[200];
              std::snprintf(text, sizeof text, "gradient %d of document %ld, token %ld, number %ld: got %g, want %g",
                            part, long(document), long(token), long(head * layout.dim + i), got, want);
              expect(false, text, description);
              return;
            }
          }
        }
      }
    }
    for (int64_t i = 0; i < 2 * outside; ++i) {
      const int64_t token = i < outside ? i : token_offsets.back() + i - outside;
      for (int64_t head = 0; head < layout.groups; ++head) {
        for (int64_t j = 0; j < layout.dim; ++j) {
          const int64_t index = index_of(view, 0, 0, token, head, j);
          touched[index] = 1;
          if (decode(grads[part].host.data(), index, input) != 0.0f) {
            expect(false, "the gradient of a token of no document is not zero", description);
            return;
          }
        }
      }
    }
    const char* bytes = grads[part].host.data();
    for (int64_t i = 0; i < count * bytes_of(input); ++i) {
      if (!touched[i / bytes_of(input)] && bytes[i] != static_cast<char>(0xff)) {
        expect(false, "the backward wrote beside the tokens", description);
        return;
      }
    }
  }
}

// More documents than one round of the scan, or of a warp's search, takes.
void check_many_documents(const int64_t documents) {
  const int chunk_size = 4;
  std::vector<int64_t> tokens(1, 0), wanted(1, 0);
  for (int64_t i = 0; i < documents; ++i) {
    const int64_t length = draw(0, 9);
    tokens.push_back(tokens.back() + length);
    wanted.push_back(wanted.back() + (length + chunk_size - 1) / chunk_size);
  }
  const int64_t chunks = wanted.back();
  Buffer tokens_at(tokens.size() * 8), chunks_at(tokens.size() * 8), states(tokens.back() * 4), content(chunks * 8),
      routing(chunks * 4);
  std::memcpy(tokens_at.host.data(), tokens.data(), tokens_at.host.size());
  for (int64_t i = 0; i < tokens.back(); ++i) states.as<float>()[i] = static_cast<float>(i);
  tokens_at.upload();
  states.upload();
  CHECK_CUDA(find_chunk_offsets(static_cast<int64_t*>(tokens_at.at()), static_cast<int64_t*>(chunks_at.at()), documents,
                                chunk_size, nullptr));
  chunks_at.download();
  expect(std::memcmp(chunks_at.host.data(), wanted.data(), chunks_at.host.size()) == 0, "chunk offsets",
         "many documents");
  for (bool counted : {true, false}) {
    if (documents > 1024) break;  // as many blocks take minutes where threads are emulated
    PoolForward call;
    call.chunking = {static_cast<int64_t*>(tokens_at.at()), counted ? static_cast<int64_t*>(chunks_at.at()) : nullptr,
                     documents, chunks, chunk_size, 1, 1};
    call.keys = call.values = call.router_keys = {states.at(), 0, 1, 1, true};
    call.content = content.at();
    call.routing = routing.at();
    CHECK_CUDA(pool_chunks_forward(call, nullptr));
    content.download();
    for (int64_t document = 0, chunk = 0; document < documents; ++document) {
      for (int64_t token = tokens[document]; token < tokens[document + 1]; token += chunk_size, ++chunk) {
        const int64_t last = std::min(token + chunk_size, tokens[document + 1]) - 1;
        expect(content.as<float>()[2 * chunk] == (token + last) / 2.0f, "mean of chunk " + std::to_string(chunk),
               counted ? "many documents" : "many documents, counted in every block");
      }
    }
  }
}

enum class Source { device, pinned, staged };

void check_gather(int number, StagingRing& ring) {
  const bool empty = number % 10 == 3;  // content without chunks: without addresses, of scales too
  const Type content_type =
      empty ? Type::e4m3
            : pick({Type::f32, Type::bf16, Type::bf16, Type::f16, Type::e4m3});
  const Type output_type =
      content_type == Type::e4m3 || draw(0, 3) == 0
          ? pick({Type::f32, Type::bf16, Type::f16})
          : content_type;
  const Source source = pick({Source::device, Source::pinned, Source::staged});
  const int batch = draw(1, 3), k = pick({0, 1, 2, 16, 16, 33, 70}), groups = pick({1, 2, 3, 8});
  const int dim = pick({1, 4, 8, 12, 16, 20, 32, 64, 128});
  const int64_t documents = empty ? 0 : draw(0, 40), row = 2 * groups * dim;
  std::vector<int64_t> offsets(1, 0);
  for (int64_t i = 0; i < documents; ++i) offsets.push_back(offsets.back() + pick<int64_t>({1, 1, 2, 3, draw(1, 20)}));
  // Now and then offsets point behind the content: such documents have no rows.
  const int64_t chunks = offsets.back() - (draw(0, 7) == 0 ? offsets.back() / 3 : 0);
  // Of content on the device a part may be there alone, from a chunk to a chunk.
  const bool part = source == Source::device && draw(0, 2) == 0;
  const int64_t first = part ? draw(0, chunks) : 0, end = part ? draw(first, chunks) : chunks;
  std::vector<int64_t> chosen(batch * k);
  for (int64_t& document : chosen) document = documents == 0 || draw(0, 4) == 0 ? -1 : draw(0, documents - 1);
  if (!chosen.empty() && draw(0, 5) == 0) chosen[draw(0, chosen.size() - 1)] = documents;  // no such document
  // Rows of each sample: chunk and column.
  std::vector<std::vector<std::pair<int64_t, int64_t>>> rows(batch);
  int64_t most = 0;
  for (int sample = 0; sample < batch; ++sample) {
    std::vector<int> order(k);
    for (int i = 0; i < k; ++i) order[i] = i;
    auto document = [&](int i) { return chosen[sample * k + i]; };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return document(a) < document(b); });
    for (int column : order) {
      if (document(column) < 0 || document(column) >= documents) continue;
      if (!part && offsets[document(column) + 1] > chunks) continue;
      for (int64_t chunk = offsets[document(column)]; chunk < offsets[document(column) + 1]; ++chunk) {
        rows[sample].push_back({chunk, column});
      }
    }
    most = std::max<int64_t>(most, rows[sample].size());
  }
  const int64_t width = empty ? draw(1, 9) : pick<int64_t>({most, most, most + 1, most + draw(0, 40), most / 2, 0});
  char description[300];
  std::snprintf(description, sizeof description,
                "gather %d: %s -> %s from %s B=%d k=%d N=%ld C=%ld %ld..%ld G=%d D=%d most=%ld width=%ld", number,
                name_of(content_type), name_of(output_type),
                source == Source::device ? "device" : source == Source::pinned ? "pinned" : "staged", batch, k,
                long(documents), long(chunks), long(first), long(end), groups, dim, long(most), long(width));

  const size_t content_bytes = chunks * row * bytes_of(content_type), scales_bytes = chunks * 8;
  Buffer content(content_bytes), scales(scales_bytes);
  for (int64_t i = 0; i < chunks * row; ++i) encode(content.host.data(), i, content_type, draw_normal());
  for (int64_t i = 0; i < chunks * 2; ++i) scales.as<float>()[i] = std::exp(draw_normal());
  void *pinned = nullptr, *pinned_scales = nullptr;
  content.upload();
  scales.upload();
  if (chunks > 0) {
    CHECK_CUDA(cudaHostAlloc(&pinned, content_bytes, 0));
    CHECK_CUDA(cudaHostAlloc(&pinned_scales, scales_bytes, 0));
    std::memcpy(pinned, content.host.data(), content_bytes);
    std::memcpy(pinned_scales, scales.host.data(), scales_bytes);
  }

  Buffer chosen_at(chosen.size() * 8), offsets_at(offsets.size() * 8);
  std::memcpy(chosen_at.host.data(), chosen.data(), chosen_at.host.size());
  std::memcpy(offsets_at.host.data(), offsets.data(), offsets_at.host.size());
  chosen_at.upload();
  offsets_at.upload();
  const int64_t out = batch * width;
  Buffer keys(out * row / 2 * bytes_of(output_type)), values(out * row / 2 * bytes_of(output_type));
  Buffer valid(out), slots(out * 8);
  for (Buffer* buffer : {&keys, &values, &valid, &slots}) buffer->upload();

  GatherCall call;
  call.documents = static_cast<int64_t*>(chosen_at.at());
  call.offsets = static_cast<int64_t*>(offsets_at.at());
  call.num_documents = documents;
  call.chunks = chunks;
  call.batch = batch;
  call.k = k;
  call.width = int(width);
  call.groups = groups;
  call.dim = dim;
  call.content_type = content_type;
  call.output_type = output_type;
  call.keys = keys.at();
  call.values = values.at();
  call.valid = static_cast<bool*>(valid.at());
  call.slots = static_cast<int64_t*>(slots.at());
  const bool quantized = content_type == Type::e4m3;
  if (source == Source::device) {
    call.part = part;
    call.first = first;
    call.chunks = end - first;
    call.content = static_cast<char*>(content.at()) + first * row * bytes_of(content_type);
    call.scales = quantized ? static_cast<float*>(scales.at()) + 2 * first : nullptr;
    CHECK_CUDA(gather_documents(call, nullptr));
  } else if (source == Source::pinned) {
    call.content = pinned;
    call.scales = quantized ? static_cast<float*>(pinned_scales) : nullptr;
    CHECK_CUDA(gather_documents(call, nullptr));
  } else {
    call.content = content.host.data();
    call.scales = quantized ? scales.as<float>() : nullptr;
    CHECK_CUDA(ring.gather(call, nullptr, nullptr));
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  for (Buffer* buffer : {&keys, &values, &valid, &slots}) buffer->download();

  std::vector<char> number_of(8);
  for (int sample = 0; sample < batch; ++sample) {
    for (int64_t r = 0; r < width; ++r) {
      const bool real = r < static_cast<int64_t>(rows[sample].size());
      const int64_t chunk = real ? rows[sample][r].first : 0, column = real ? rows[sample][r].second : 0;
      const int64_t at = sample * width + r;
      bool good = valid.host[at] == static_cast<char>(real) && slots.as<int64_t>()[at] == column;
      expect(good, "valid or slots of row " + std::to_string(r) + " of sample " + std::to_string(sample), description);
      if (!good) return;
      for (int part = 0; part < 2; ++part) {
        for (int head = 0; head < groups; ++head) {
          for (int i = 0; i < dim; ++i) {
            float want = 0.0f;
            if (real && chunk >= first && chunk < end) {
              want = decode(content.host.data(), (chunk * 2 + part) * groups * dim + head * dim + i, content_type);
              if (quantized) want *= scales.as<float>()[chunk * 2 + part];
            }
            encode(number_of.data(), 0, output_type, want);
            want = decode(number_of.data(), 0, output_type);
            Buffer& result = part ? values : keys;
            const float got =
                decode(result.host.data(), ((int64_t{sample} * groups + head) * width + r) * dim + i, output_type);
            if (!(got == want)) {
              expect(false, std::string(part ? "value" : "key") + " of row " + std::to_string(r) + ", number " +
                                std::to_string(head * dim + i) + ": got " + std::to_string(got) + ", want " +
                                std::to_string(want), description);
              return;
            }
          }
        }
      }
    }
  }
  CHECK_CUDA(cudaFreeHost(pinned));
  CHECK_CUDA(cudaFreeHost(pinned_scales));
}

#ifndef MSA_HF_EMULATE

// Milliseconds per call, median of `repeats`: each is a row of calls that together read more than the second cache.
template <typename Call>
double time_ms(int calls, int repeats, Call&& call) {
  cudaEvent_t start, stop;
  CHECK_CUDA(cudaEventCreate(&start));
  CHECK_CUDA(cudaEventCreate(&stop));
  for (int i = 0; i < std::min(calls, 3); ++i) CHECK_CUDA(call(i));
  std::vector<float> times;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    CHECK_CUDA(call(calls - 1));  // while it runs the next are launched: the device never waits for the host
    CHECK_CUDA(cudaEventRecord(start));
    for (int i = 0; i < calls; ++i) CHECK_CUDA(call(i));
    CHECK_CUDA(cudaEventRecord(stop));
    CHECK_CUDA(cudaEventSynchronize(stop));
    float ms;
    CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
    times.push_back(ms / calls);
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  CHECK_CUDA(cudaEventDestroy(start));
  CHECK_CUDA(cudaEventDestroy(stop));
  return times[repeats / 2];
}

__global__ void fill_kernel(uint16_t* numbers, int64_t count, unsigned seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    unsigned x = static_cast<unsigned>(i) * 2654435761u + seed;
    x ^= x >> 15;
    x *= 2246822519u;
    x ^= x >> 13;
    // bfloat16 from -2 to 2.
    numbers[i] = static_cast<uint16_t>((x & 0x807f) | 0x3f00 | (x >> 8 & 0x80));
  }
}

void* random_bfloat16(int64_t count) {
  void* data;
  CHECK_CUDA(cudaMalloc(&data, count * 2));
  fill_kernel<<<1024, 256>>>(static_cast<uint16_t*>(data), count, static_cast<unsigned>(generator()));
  CHECK_CUDA(cudaGetLastError());
  return data;
}

void print_row(const std::string& what, double ms, double bytes, double ceiling, double goal, const char* unit) {
  const double rate = bytes / ms / 1e6;
  std::printf("%-62s %9.4f ms %9.2f MB %8.1f GB/s  share %.3f", what.c_str(), ms, bytes / 1e6, rate, rate / ceiling);
  if (goal > 0) {
    const double reached = std::string(unit) == "share" ? rate / ceiling : rate;
    std::printf("  goal %.2f %s: %s", goal, unit, reached >= goal ? "reached" : "MISSED");
  }
  std::printf("\n");
}

void time_pool(double copy) {
  constexpr int kGroups = 8, kDim = 128, kWidth = kGroups * kDim, kChunk = 64, kDocument = 1024;
  std::printf("pool_chunks: bfloat16, G=8, D=128, P=64, documents of 1024 tokens; read once, written once\n");
  for (int64_t tokens : {4096, 16384, 65536, 262144}) {
    const int64_t documents = tokens / kDocument, chunks = tokens / kChunk;
    const int sets = static_cast<int>(std::max<int64_t>(2, 400'000'000 / (tokens * kWidth * 6) + 1));
    const int calls_each = std::max(2 * sets, 12);
    std::vector<PoolForward> calls[3];  // packed; padded and transposed; fp8 routing keys
    std::vector<PoolBackward> backs;
    std::vector<void*> memory;
    auto keep = [&](void* data) { return memory.push_back(data), data; };
    auto empty = [&](size_t bytes) {
      void* data;
      CHECK_CUDA(cudaMalloc(&data, bytes));
      return keep(data);
    };
    std::vector<int64_t> offsets(documents + 1);
    for (int64_t i = 0; i <= documents; ++i) offsets[i] = i * kDocument;
    auto* tokens_at = static_cast<int64_t*>(empty(offsets.size() * 8));
    auto* chunks_at = static_cast<int64_t*>(empty(offsets.size() * 8));
    CHECK_CUDA(cudaMemcpy(tokens_at, offsets.data(), offsets.size() * 8, cudaMemcpyHostToDevice));
    CHECK_CUDA(find_chunk_offsets(tokens_at, chunks_at, documents, kChunk, nullptr));
    for (int set = 0; set < sets; ++set) {
      PoolForward call;
      // As the operator does.
      const int64_t* counted = documents > kFewDocuments ? chunks_at : nullptr;
      call.chunking = {tokens_at, counted, documents, chunks, kChunk, kGroups, kDim, tokens};
      TokenStates* parts[3] = {&call.keys, &call.values, &call.router_keys};
      for (TokenStates* part : parts) *part = {keep(random_bfloat16(tokens * kWidth)), 0, kWidth, kDim, true};
      call.input = call.content_type = call.routing_type = Type::bf16;
      call.content = empty(chunks * kWidth * 4);
      call.routing = empty(chunks * kWidth * 2);
      call.normalize = true;
      calls[0].push_back(call);
      PoolForward padded = call;
      for (TokenStates* part : {&padded.keys, &padded.values}) {
        *part = {part->data, int64_t{kGroups} * kDocument * kDim, kDim, int64_t{kDocument} * kDim, false};
      }
      calls[1].push_back(padded);
      PoolForward quantized = call;
      quantized.routing_type = Type::e4m3;
      quantized.scales = static_cast<float*>(empty(chunks * 4));
      calls[2].push_back(quantized);
      PoolBackward back;
      back.chunking = call.chunking;
      back.input = back.grad_content_type = back.grad_routing_type = Type::bf16;
      back.router_keys = call.router_keys;
      back.grad_content = call.content;
      back.grad_routing = call.routing;
      back.normalize = true;
      TokenStates* grads[3] = {&back.grad_keys, &back.grad_values, &back.grad_router_keys};
      for (TokenStates* grad : grads) *grad = {empty(tokens * kWidth * 2), 0, kWidth, kDim, true};
      backs.push_back(back);
    }
    const double bytes = 6.0 * kWidth * (tokens + chunks);
    const std::string label = std::to_string(tokens) + " tokens";
    const double goal = tokens >= 16384 ? 0.80 : 0.0;
    const char* kinds[3] = {", packed", ", content padded [N, G, L, D]", ", fp8 routing keys"};
    auto bytes_of_kind = [&](int kind) { return bytes - (kind == 2 ? kWidth * chunks - 4.0 * chunks : 0); };
    for (int kind = 0; kind < 3; ++kind) {
      const double ms =
          time_ms(calls_each, 9, [&](int i) { return pool_chunks_forward(calls[kind][i % sets], nullptr); });
      print_row("forward  " + label + kinds[kind], ms, bytes_of_kind(kind), copy, goal, "share");
    }
    for (int kind = 0; kind < 3 && (tokens == 16384 || tokens == 262144); ++kind) {
      for (const Variant& variant : kVariants) {
        if (!variant.fits(calls[kind][0])) continue;
        const double ms = time_ms(calls_each, 9, [&](int i) { return variant.launch(calls[kind][i % sets], nullptr); });
        print_row("  " + label + kinds[kind] + ": " + variant.name, ms, bytes_of_kind(kind), copy, 0.0, "share");
      }
    }
    const double ms = time_ms(calls_each, 9, [&](int i) { return pool_chunks_backward(backs[i % sets], nullptr); });
    print_row("backward " + label + ", through the norm", ms, bytes + 2.0 * kWidth * tokens, copy, 0.0, "share");
    for (void* data : memory) CHECK_CUDA(cudaFree(data));
  }
  std::printf("\n");
}

void time_gather(double copy, double bus) {
  constexpr int kGroups = 8, kDim = 128, kWidth = kGroups * kDim, kDocuments = 16384, kPerDocument = 16;
  constexpr int64_t kRow = 2 * kWidth, kChunks = int64_t{kDocuments} * kPerDocument;  // 1.07 GB of bfloat16
  std::printf("gather_documents: bfloat16, G=8, D=128, documents of 16 chunks, a bank of %.2f GB\n", kChunks * kRow * 2e-9);
  void* on_device = random_bfloat16(kChunks * kRow);
  void *pinned, *plain = std::malloc(kChunks * kRow * 2);
  CHECK_CUDA(cudaHostAlloc(&pinned, kChunks * kRow * 2, 0));
  CHECK_CUDA(cudaMemcpy(pinned, on_device, kChunks * kRow * 2, cudaMemcpyDeviceToHost));
  std::memcpy(plain, pinned, kChunks * kRow * 2);
  std::vector<int64_t> offsets(kDocuments + 1);
  for (int64_t i = 0; i <= kDocuments; ++i) offsets[i] = i * kPerDocument;
  int64_t* offsets_at;
  CHECK_CUDA(cudaMalloc(&offsets_at, offsets.size() * 8));
  CHECK_CUDA(cudaMemcpy(offsets_at, offsets.data(), offsets.size() * 8, cudaMemcpyHostToDevice));
  std::vector<float> ones(kChunks * 2, 1.0f);
  float* scales;
  CHECK_CUDA(cudaMalloc(&scales, ones.size() * 4));
  CHECK_CUDA(cudaMemcpy(scales, ones.data(), ones.size() * 4, cudaMemcpyHostToDevice));
  StagingRing ring(4, 4);
  for (int batch : {1, 16}) {
    constexpr int k = 16, kSets = 64;
    const int64_t width = k * kPerDocument, rows = batch * width;
    std::vector<int64_t> chosen(static_cast<size_t>(kSets) * batch * k);
    for (int64_t& document : chosen) document = draw(0, kDocuments - 1);
    int64_t* chosen_at;
    CHECK_CUDA(cudaMalloc(&chosen_at, chosen.size() * 8));
    CHECK_CUDA(cudaMemcpy(chosen_at, chosen.data(), chosen.size() * 8, cudaMemcpyHostToDevice));
    GatherCall call;
    call.offsets = offsets_at;
    call.num_documents = kDocuments;
    call.chunks = kChunks;
    call.batch = batch;
    call.k = k;
    call.width = int(width);
    call.groups = kGroups;
    call.dim = kDim;
    call.content_type = call.output_type = Type::bf16;
    CHECK_CUDA(cudaMalloc(&call.keys, rows * kWidth * 2));
    CHECK_CUDA(cudaMalloc(&call.values, rows * kWidth * 2));
    CHECK_CUDA(cudaMalloc(&call.valid, rows));
    CHECK_CUDA(cudaMalloc(&call.slots, rows * 8));
    auto gather = [&](const void* content, int i) {
      GatherCall one = call;
      one.documents = chosen_at + static_cast<int64_t>(i % kSets) * batch * k;
      one.content = content;
      return gather_documents(one, nullptr);
    };
    const double bytes = rows * kRow * 2.0;
    const std::string label = std::to_string(rows) + " chunks";
    print_row(label + " from device memory (read + written)",
              time_ms(kSets, 9, [&](int i) { return gather(on_device, i); }), 2 * bytes, copy, 0.0, "");
    print_row(label + " from pinned host memory", time_ms(kSets, 9, [&](int i) { return gather(pinned, i); }), bytes, bus,
              batch == 1 ? 35.0 : 45.0, "GB/s");
    // One call alone, from an idle device: what a layer of a single question waits for.
    print_row(label + " from pinned host memory, one call at a time", time_ms(1, 31, [&](int) {
                static int turn = 0;
                return gather(pinned, turn++);
              }),
              bytes, bus, 0.0, "GB/s");
    auto quantized = [&](const void* content, int i) {
      GatherCall one = call;
      one.documents = chosen_at + static_cast<int64_t>(i % kSets) * batch * k;
      one.content = content;
      one.content_type = Type::e4m3;
      one.scales = scales;
      return gather_documents(one, nullptr);
    };
    print_row(label + " of fp8 from device memory (read + written)",
              time_ms(kSets, 9, [&](int i) { return quantized(on_device, i); }), 1.5 * bytes, copy, 0.0, "");
    print_row(label + " of fp8 from pinned host memory (bytes read)",
              time_ms(kSets, 9, [&](int i) { return quantized(pinned, i); }), bytes / 2, bus, 0.0, "");
    auto staged = [&](int i) {
      GatherCall one = call;
      one.documents = chosen_at + static_cast<int64_t>(i % kSets) * batch * k;
      one.content = plain;
      return ring.gather(one, nullptr, nullptr);
    };
    print_row(label + " from pageable host memory, staged", time_ms(kSets, 5, staged), bytes, bus, 0.0, "");
    const auto before = std::chrono::steady_clock::now();
    for (int i = 0; i < kSets; ++i) CHECK_CUDA(staged(i));
    const std::chrono::duration<double, std::micro> asked = std::chrono::steady_clock::now() - before;
    CHECK_CUDA(cudaDeviceSynchronize());
    const std::chrono::duration<double, std::micro> through = std::chrono::steady_clock::now() - before;
    std::printf("  staged: the caller is busy %.1f us per call, the device %.1f us\n", asked.count() / kSets,
                through.count() / kSets);
    // A graph replayed: what remains without launches from the host.
    for (const void* content : {static_cast<const void*>(on_device), static_cast<const void*>(pinned)}) {
      cudaStream_t stream;
      cudaGraph_t graph;
      cudaGraphExec_t replay;
      CHECK_CUDA(cudaStreamCreate(&stream));
      CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      for (int i = 0; i < kSets; ++i) {
        GatherCall one = call;
        one.documents = chosen_at + static_cast<int64_t>(i % kSets) * batch * k;
        one.content = content;
        CHECK_CUDA(gather_documents(one, stream));
      }
      CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
      CHECK_CUDA(cudaGraphInstantiate(&replay, graph, 0));
      const double ms = time_ms(1, 9, [&](int) { return cudaGraphLaunch(replay, nullptr); }) / kSets;
      const bool host = content == pinned;
      print_row(label + (host ? " from pinned host memory, in a graph" : " from device memory, in a graph"), ms,
                host ? bytes : 2 * bytes, host ? bus : copy, 0.0, "");
      CHECK_CUDA(cudaGraphExecDestroy(replay));
      CHECK_CUDA(cudaGraphDestroy(graph));
      CHECK_CUDA(cudaStreamDestroy(stream));
    }
    for (void* data : {static_cast<void*>(chosen_at), call.keys, call.values, static_cast<void*>(call.valid),
                       static_cast<void*>(call.slots)}) {
      CHECK_CUDA(cudaFree(data));
    }
  }
  CHECK_CUDA(cudaFreeHost(pinned));
  CHECK_CUDA(cudaFree(on_device));
  CHECK_CUDA(cudaFree(offsets_at));
  CHECK_CUDA(cudaFree(scales));
  std::free(plain);
}

void time_all() {
  cudaDeviceProp properties;
  CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, %d multiprocessors, %.0f MB second cache\n", properties.name, properties.multiProcessorCount,
              properties.l2CacheSize / 1e6);
  constexpr size_t kBytes = size_t{2} << 30, kBus = size_t{256} << 20;
  void* from = random_bfloat16(kBytes / 2);
  void *to, *host;
  CHECK_CUDA(cudaMalloc(&to, kBytes));
  const double copy_ms = time_ms(3, 9, [&](int) { return cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice); });
  const double copy = 2.0 * kBytes / copy_ms / 1e6;
  CHECK_CUDA(cudaHostAlloc(&host, kBus, 0));
  std::memset(host, 7, kBus);
  const double bus_ms = time_ms(2, 7, [&](int) { return cudaMemcpyAsync(to, host, kBus, cudaMemcpyHostToDevice); });
  const double bus = kBus / bus_ms / 1e6;
  for (size_t bytes : {size_t{1} << 20, size_t{16} << 20}) {
    const double ms = time_ms(8, 9, [&](int i) {
      return cudaMemcpyAsync(to, static_cast<char*>(host) + i * bytes, bytes, cudaMemcpyHostToDevice);
    });
    std::printf("pinned copy of %zu MB in one piece: %.1f GB/s\n", bytes >> 20, bytes / ms / 1e6);
  }
  std::printf("device copy %.0f GB/s (read + written), pinned host to device %.1f GB/s\n\n", copy, bus);
  CHECK_CUDA(cudaFree(from));
  CHECK_CUDA(cudaFree(to));
  CHECK_CUDA(cudaFreeHost(host));
  time_pool(copy);
  time_gather(copy, bus);
}
#endif

}  // namespace trial

int main(int count, char** arguments) {
#ifdef MSA_HF_EMULATE
  emulated::shared_limit = 99 * 1024;  // what every device from compute capability 8.0 on has
#endif
  using namespace trial;
  bool check_only = false;
  int cases = 150;
  for (int i = 1; i < count; ++i) {
    if (std::string(arguments[i]) == "--check") check_only = true;
    if (std::string(arguments[i]) == "--cases" && i + 1 < count) cases = std::atoi(arguments[++i]);
    if (std::string(arguments[i]) == "--seed" && i + 1 < count) generator.seed(std::atoi(arguments[++i]));
  }
  const auto before = std::chrono::steady_clock::now();
  for (int i = 0; i < cases; ++i) check_pool(i);
  check_many_documents(150);
  check_many_documents(2500);
  StagingRing ring(3, 3);
  for (int i = 0; i < cases; ++i) check_gather(i, ring);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - before;
  if (failures > 0) {
    std::printf("%d checks FAILED; nothing is timed\n", failures);
    return 1;
  }
  std::printf("%d cases of pool_chunks and %d of gather_documents agree with plain loops (%.1f s)\n", cases, cases,
              took.count());
  std::printf("%d runs of other kernels of pool_chunks gave the same bits\n", compared);
#ifndef MSA_HF_EMULATE
  if (!check_only) time_all();
#else
  (void)check_only;
#endif
  return 0;
}
