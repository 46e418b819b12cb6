// Checks route_documents against plain loops in double, then times the rows of docs/performance.md. No torch.
//
//   csrc/cuda/standalone/route_documents.sh          compiles, checks, times (nvcc and a GPU)
//   csrc/cuda/standalone/route_documents.sh --host   compiles with a C++ compiler, checks on emulated threads
// Options of the program: --check (no times), --bench (no checks), --cases N, --seed N, --cublas PATH, --chunks N

#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#ifdef MSA_HF_EMULATE
#include "../route/route_documents.cu"
#include "../route/mma.cu"
#include "../route/rescore.cu"
#include "../route/select.cu"
#include "../route/wgmma_bf16.cu"
#include "../route/wgmma_e4m3.cu"
#include "../route/wgmma_f16.cu"
#include "../route/wgmma_s8.cu"
#else
#include <dlfcn.h>

#include "../route/score.cuh"
#endif

using namespace msa_hf;
using namespace msa_hf::route;

#define CHECK_CUDA(call)                                                                               \
  do {                                                                                                 \
    const cudaError_t status_ = (call);                                                                \
    if (status_ != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status_)); \
      std::exit(2);                                                                                    \
    }                                                                                                  \
  } while (false)

namespace {

const char* const kTypes[] = {"f32", "bf16", "f16", "e4m3", "s8"};
const char* const kPaths[] = {"automatic", "wgmma", "mma", "plain"};

// Memory of the device, with a guard behind it.
struct Memory {
  static constexpr size_t kGuard = 1024;
  unsigned char* data = nullptr;
  size_t bytes = 0;
  explicit Memory(size_t n, int fill = 0xff) : bytes(n) {  // 0xff: NaN as float, bf16, f16, e4m3; -1
    CHECK_CUDA(cudaMalloc(reinterpret_cast<void**>(&data), n + kGuard));
    CHECK_CUDA(cudaMemset(data, fill, n));
    CHECK_CUDA(cudaMemset(data + n, 0x5a, kGuard));
  }
  template <class T>
  explicit Memory(const std::vector<T>& values) : Memory(values.size() * sizeof(T)) {
    CHECK_CUDA(cudaMemcpy(data, values.data(), bytes, cudaMemcpyHostToDevice));
  }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(data); }
  template <class T>
  std::vector<T> read() const {
    std::vector<T> values(bytes / sizeof(T));
    CHECK_CUDA(cudaMemcpy(values.data(), data, values.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
  bool guard_is_whole() const {
    std::vector<unsigned char> guard(kGuard);
    CHECK_CUDA(cudaMemcpy(guard.data(), data + bytes, kGuard, cudaMemcpyDeviceToHost));
    return std::all_of(guard.begin(), guard.end(), [](unsigned char c) { return c == 0x5a; });
  }
};

template <Type TYPE>
void encode_as(std::vector<unsigned char>& out, const std::vector<float>& values) {
  using T = typename Number<TYPE>::storage;
  out.resize(values.size() * sizeof(T));
  for (size_t i = 0; i < values.size(); i++) {
    const T number = Number<TYPE>::encode(values[i]);
    std::memcpy(&out[i * sizeof(T)], &number, sizeof(T));
  }
}
std::vector<unsigned char> encoded(Type type, const std::vector<float>& values) {
  std::vector<unsigned char> out;
  switch (type) {
    case Type::f32: encode_as<Type::f32>(out, values); break;
    case Type::bf16: encode_as<Type::bf16>(out, values); break;
    case Type::f16: encode_as<Type::f16>(out, values); break;
    case Type::e4m3: encode_as<Type::e4m3>(out, values); break;
    case Type::s8: encode_as<Type::s8>(out, values); break;
  }
  return out;
}
float rounded(Type type, float x) {
  switch (type) {
    case Type::bf16: return Number<Type::bf16>::decode(Number<Type::bf16>::encode(x));
    case Type::f16: return Number<Type::f16>::decode(Number<Type::f16>::encode(x));
    case Type::e4m3: return Number<Type::e4m3>::decode(Number<Type::e4m3>::encode(x));
    case Type::s8: return Number<Type::s8>::decode(Number<Type::s8>::encode(x));
    default: return x;
  }
}

// A call on the host: values as they are after rounding to their types.
struct Case {
  Type query_type, key_type;
  int64_t samples, tokens, width, chunks, documents, k;
  std::vector<float> queries, keys, scales;  // keys without scales
  std::vector<unsigned char> mask, alive;    // alive may be empty: all
  std::vector<int64_t> offsets;
  bool exact;  // every score is a small whole number times one factor: ties must be broken as promised

  std::string name() const {
    char text[300];
    std::snprintf(text, sizeof text, "queries %s [%ld, %ld, %ld], keys %s [%ld], %ld documents, k %ld%s%s",
                  kTypes[int(query_type)], long(samples), long(tokens), long(width), kTypes[int(key_type)], long(chunks),
                  long(documents), long(k), alive.empty() ? "" : ", tombstones", exact ? ", whole numbers" : "");
    return text;
  }
};

struct Random {
  std::mt19937_64 engine;
  explicit Random(uint64_t seed) : engine(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return *(values.begin() + below(static_cast<int64_t>(values.size())));
  }
  float normal() { return std::normal_distribution<float>()(engine); }
};

// How documents divide the chunks.
std::vector<int64_t> some_offsets(Random& random, int64_t chunks) {
  std::vector<int64_t> offsets{0};
  const int kind = static_cast<int>(random.below(5));
  while (offsets.back() < chunks) {
    const int64_t left = chunks - offsets.back();
    int64_t length = kind == 0   ? 1
                     : kind == 1 ? random.between(1, 4)
                     : kind == 2 ? random.between(1, 200)
                     : kind == 3 ? left
                                 : (random.below(8) == 0 ? random.between(1, left) : random.between(1, 3));
    offsets.push_back(offsets.back() + std::min(length, left));
  }
  return offsets;
}

Case some_case(Random& random, Type key_type, bool small) {
  Case c;
  c.key_type = key_type;
  c.query_type = random.one_of({Type::f32, Type::bf16, Type::f16});
  c.exact = random.below(3) == 0;
  // Around the edges of tiles: 128 and 256 chunks, 1,024 chunks a warp of select, 32 to 256 columns, 64 and 128 numbers.
  const int64_t multiple = bytes_of(key_type) == 1 ? 16 : 8;
  const int64_t big = small ? 700 : 20000;
  c.chunks = random.one_of<int64_t>({1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, random.between(1, big)});
  c.width = multiple * random.one_of<int64_t>({1, 3, 4, 5, 8, 9, 16, 17, random.between(1, small ? 20 : 160)});
  if (random.below(8) == 0) c.width = random.between(1, 40);  // mostly one that only the plain kernel takes
  c.samples = random.one_of<int64_t>({1, 1, 2, 3, 5, 16});
  c.tokens = random.one_of<int64_t>({1, 7, 8, 9, 31, 32, 33, 64, 65, 100, 129, 256, 257, random.between(1, small ? 300 : 700)});
  if (c.samples > 3) c.tokens = std::min<int64_t>(c.tokens, small ? 40 : 150);
  if (random.below(small ? 12 : 4) == 0) {  // several blocks of select, little arithmetic
    c.chunks = random.one_of<int64_t>({4095, 4096, 4097, 8192, 8193, random.between(4000, small ? 13000 : 60000)});
    c.width = multiple * random.between(1, 3);
    c.tokens = random.between(1, 20);
    c.samples = random.between(1, 2);
  }
  // What the reference takes in about a tenth of a second.
  while (c.samples * c.tokens * c.chunks * c.width > (small ? 10000000 : 200000000)) {
    int64_t& size = *random.one_of<int64_t*>({&c.tokens, &c.chunks, &c.width, &c.width});
    const int64_t least = &size == &c.width ? multiple : 1;
    size = std::max(size / 2 / least * least, least);
  }
  c.offsets = some_offsets(random, c.chunks);
  c.documents = static_cast<int64_t>(c.offsets.size()) - 1;
  c.k = random.one_of<int64_t>({1, 2, 16, 16, 64, 65, 200, c.documents, c.documents + 3});
  if (small) c.k = std::min<int64_t>(c.k, 300);

  const int64_t rows = c.samples * c.tokens;
  c.mask.assign(rows, 1);
  const int pattern = static_cast<int>(random.below(3));
  for (int64_t b = 0; b < c.samples; b++)
    for (int64_t t = 0; t < c.tokens; t++)
      c.mask[b * c.tokens + t] = pattern == 0 ? 1 : pattern == 1 ? random.below(3) == 0 : t < (b * 7) % (c.tokens + 1);
  if (random.below(2) == 0) {
    c.alive.resize(c.documents);
    for (auto& alive : c.alive) alive = random.below(4) != 0;
  }
  c.queries.resize(rows * c.width);
  c.keys.resize(c.chunks * c.width);
  if (is_quantized(key_type)) c.scales.resize(c.chunks);
  for (float& scale : c.scales) scale = c.exact ? 0.5f : 0.001f * random.between(1, 50);
  if (c.exact) {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < c.width; j++) c.queries[i * c.width + j] = 4.0f * (random.below(3) - 1);
    // Every sample's largest is 4, so that queries are whole after quantization too.
    for (int64_t b = 0; b < c.samples; b++)
      for (int64_t t = 0; t < c.tokens; t++) c.queries[(b * c.tokens + t) * c.width] = 4.0f;
    for (float& x : c.keys) x = static_cast<float>(random.below(3) - 1);
  } else {
    for (float& x : c.queries) x = rounded(c.query_type, random.normal() * 0.05f);
    const float spread = key_type == Type::s8 ? 40.0f : key_type == Type::e4m3 ? 100.0f : 0.1f;
    for (float& x : c.keys) x = rounded(key_type, random.normal() * spread);
  }
  for (int64_t i = 0; i < rows; i++)  // what does not route is NaN
    if (!c.mask[i])
      for (int64_t j = 0; j < c.width; j++) c.queries[i * c.width + j] = NAN;
  return c;
}

// Queries as the tensor cores see them, or as they are.
std::vector<float> effective_queries(const Case& c, bool plain, int terms) {
  std::vector<float> out = c.queries;
  for (int64_t b = 0; b < c.samples; b++) {
    const int64_t begin = b * c.tokens * c.width, end = begin + c.tokens * c.width;
    float most = 0;
    for (int64_t i = begin; i < end; i++)
      if (c.mask[i / c.width]) most = std::max(most, std::fabs(c.queries[i]));
    for (int64_t i = begin; i < end; i++) {
      if (plain) continue;
      if (is_quantized(c.key_type)) {
        const float factor = most > 1e-30f ? largest_of(c.key_type) / most : 0.0f;
        out[i] = rounded(c.key_type, c.queries[i] * factor) * (most * (1.0f / largest_of(c.key_type)));
      } else {
        const float high = rounded(c.key_type, c.queries[i]);
        out[i] = terms == 2 ? high + rounded(c.key_type, c.queries[i] - high) : high;
      }
    }
  }
  return out;
}

// [samples, documents] scores in double, -inf for what cannot be chosen; bound: what rounding of sums may change.
std::vector<double> reference(const Case& c, const std::vector<float>& queries, double* bound) {
  std::vector<double> scores(c.samples * c.documents, -INFINITY);
  double key_norm = 0, query_norm = 0;
  for (int64_t i = 0; i < c.chunks; i++) {
    double sum = 0;
    for (int64_t j = 0; j < c.width; j++) sum += double(c.keys[i * c.width + j]) * c.keys[i * c.width + j];
    key_norm = std::max(key_norm, std::sqrt(sum) * (c.scales.empty() ? 1.0 : c.scales[i]));
  }
  for (int64_t b = 0; b < c.samples; b++) {
    for (int64_t t = 0; t < c.tokens; t++) {
      if (!c.mask[b * c.tokens + t]) continue;
      const float* q = &queries[(b * c.tokens + t) * c.width];
      double sum = 0;
      for (int64_t j = 0; j < c.width; j++) sum += double(q[j]) * q[j];
      query_norm = std::max(query_norm, std::sqrt(sum));
      for (int64_t d = 0; d < c.documents; d++) {
        if (!c.alive.empty() && !c.alive[d]) continue;
        double& best = scores[b * c.documents + d];
        for (int64_t i = c.offsets[d]; i < c.offsets[d + 1]; i++) {
          const float* key = &c.keys[i * c.width];
          float parts[8] = {};
          double product = 0;
          for (int64_t j = 0; j < c.width; j += 256) {  // float in short runs: fast, and good to 2^-20 of the norms
            for (float& part : parts) part = 0;
            const int64_t end = std::min(c.width, j + 256), whole = j + (end - j) / 8 * 8;
            for (int64_t l = j; l < whole; l += 8)
              for (int m = 0; m < 8; m++) parts[m] += q[l + m] * key[l + m];
            for (int64_t l = whole; l < end; l++) parts[0] += q[l] * key[l];
            for (float part : parts) product += part;
          }
          best = std::max(best, product * (c.scales.empty() ? 1.0 : c.scales[i]));
        }
      }
    }
  }
  *bound = key_norm * query_norm;
  return scores;
}

int failures = 0;
void complain(const Case& c, const std::string& how, const char* what, int64_t sample, int64_t place, double a, double b) {
  if (++failures <= 20)
    std::printf("WRONG  %s; %s: %s, sample %ld, place %ld: %.9g against %.9g\n", c.name().c_str(), how.c_str(), what,
                long(sample), long(place), a, b);
}

void compare(
    const Case& c, const std::string& how, const std::vector<double>& scores, double tolerance,
    const std::vector<int64_t>& chosen, const std::vector<float>& chosen_scores) {
  for (int64_t b = 0; b < c.samples; b++) {
    const double* all = &scores[b * c.documents];
    std::vector<int64_t> order;
    for (int64_t d = 0; d < c.documents; d++)
      if (all[d] > -1e30) order.push_back(d);
    const int64_t kept = std::min<int64_t>(c.k, order.size());
    std::partial_sort(order.begin(), order.begin() + kept, order.end(), [&](int64_t x, int64_t y) {
      return all[x] != all[y] ? all[x] > all[y] : x < y;
    });
    std::vector<int64_t> seen;
    for (int64_t i = 0; i < c.k; i++) {
      const int64_t got = chosen[b * c.k + i];
      const float score = chosen_scores[b * c.k + i];
      if (i >= kept) {
        if (got != -1 || score != -INFINITY) complain(c, how, "something behind the last", b, i, double(got), -1);
        continue;
      }
      if (got < 0 || got >= c.documents || !(all[got] > -1e30)) {
        complain(c, how, "no document that may be chosen", b, i, double(got), double(order[i]));
        return;
      }
      seen.push_back(got);
      if (c.exact && got != order[i]) complain(c, how, "document", b, i, double(got), double(order[i]));
      if (std::fabs(score - all[got]) > tolerance) complain(c, how, "score", b, i, score, all[got]);
      if (std::fabs(all[got] - all[order[i]]) > 2 * tolerance) complain(c, how, "rank", b, i, all[got], all[order[i]]);
      if (i > 0) {
        const float before = chosen_scores[b * c.k + i - 1];
        if (before < score || (before == score && chosen[b * c.k + i - 1] >= got))
          complain(c, how, "order", b, i, before, score);
      }
    }
    std::sort(seen.begin(), seen.end());
    if (std::adjacent_find(seen.begin(), seen.end()) != seen.end()) complain(c, how, "a document twice", b, 0, 0, 0);
  }
}

struct OnDevice {
  Memory queries, mask, keys, scales, offsets, alive;
  explicit OnDevice(const Case& c)
      : queries(encoded(c.query_type, c.queries)), mask(c.mask), keys(encoded(c.key_type, c.keys)), scales(c.scales),
        offsets(c.offsets), alive(c.alive) {}
};

Call call_of(const Case& c, const OnDevice& on) {
  Call call;
  call.queries = on.queries.data;
  call.query_type = c.query_type;
  call.mask = reinterpret_cast<const bool*>(on.mask.data);
  call.keys = on.keys.data;
  call.key_type = c.key_type;
  call.scales = c.scales.empty() ? nullptr : reinterpret_cast<const float*>(on.scales.data);
  call.offsets = reinterpret_cast<const int64_t*>(on.offsets.data);
  call.alive = c.alive.empty() ? nullptr : reinterpret_cast<const bool*>(on.alive.data);
  call.samples = c.samples;
  call.tokens = c.tokens;
  call.width = c.width;
  call.chunks = c.chunks;
  call.documents = c.documents;
  call.k = c.k;
  return call;
}

std::string choice_name(const Plan& p) {
  char text[120];
  if (p.path == Path::wgmma) {
    const Shape s = shape_at(p.shape);
    std::snprintf(text, sizeof text, "wgmma %dx%d/%d%s%s", s.chunks, s.columns, s.cluster, s.resident ? " resident" : "",
                  p.terms == 2 ? " 2 terms" : "");
  } else {
    std::snprintf(text, sizeof text, "%s%s", kPaths[int(p.path)], p.terms == 2 ? " 2 terms" : "");
  }
  return text;
}

// Scores as a way should take them, kept for the next way.
struct Expected {
  bool plain = false;
  int terms = 0;
  std::vector<double> scores;
  double bound = 0;
};

// Runs a case in one way; false where this way does not take it.
bool check_way(const Case& c, const OnDevice& on, Choice choice, std::vector<Expected>& known) {
  Call call = call_of(c, on);
  const Plan p = plan(call, choice);
  if (p.error != nullptr) return false;
  const bool plain = p.path == Path::plain;
  const auto same = [&](const Expected& e) { return e.plain == plain && e.terms == p.terms; };
  auto expected = std::find_if(known.begin(), known.end(), same);
  if (expected == known.end()) {
    known.push_back({plain, p.terms, {}, 0});
    expected = known.end() - 1;
    expected->scores = reference(c, effective_queries(c, plain, p.terms), &expected->bound);
  }
  const std::vector<double>& scores = expected->scores;
  const double bound = expected->bound;
  // float32 sums of up to 2048 products: 2^-20 of the norms. Two terms: what they leave out, 2^-16. The 8-bit floating
  // products of sm_90 are summed with fewer bits.
  const bool coarse = c.key_type == Type::e4m3 && !plain;
  const double tolerance = bound * (coarse ? 1.0 / 2048 : 1.0 / (1 << 19)) + 1e-30;

  Memory chosen(c.samples * c.k * 8), chosen_scores(c.samples * c.k * 4), workspace(p.workspace);
  call.chosen = reinterpret_cast<int64_t*>(chosen.data);
  call.chosen_scores = reinterpret_cast<float*>(chosen_scores.data);
  std::vector<int64_t> first;
  for (int repeat = 0; repeat < 2; repeat++) {  // the second time the workspace holds what the first left
    const cudaError_t error = route_documents(call, p, workspace.data, nullptr);
    if (error != cudaSuccess) {
      complain(c, choice_name(p), cudaGetErrorString(error), 0, 0, 0, 0);
      return true;
    }
    CHECK_CUDA(cudaGetLastError());
    CHECK_CUDA(cudaDeviceSynchronize());
    const auto documents = chosen.read<int64_t>();
    if (repeat == 0) {
      compare(c, choice_name(p), scores, tolerance, documents, chosen_scores.read<float>());
      first = documents;
    } else if (documents != first) {
      complain(c, choice_name(p), "not the same the second time", 0, 0, 0, 0);
    }
    if (!chosen.guard_is_whole() || !chosen_scores.guard_is_whole() || !workspace.guard_is_whole())
      complain(c, choice_name(p), "written outside the result or the workspace", 0, 0, 0, 0);
#ifdef MSA_HF_EMULATE
    break;
#endif
  }
  return true;
}

void check_rescore(Random& random, bool small) {
  Case c = some_case(random, random.one_of({Type::f32, Type::bf16, Type::f16}), small);
  if (random.below(2) == 0) {  // queries of the keys' type
    c.query_type = c.key_type;
    for (float& x : c.queries) x = rounded(c.query_type, x);
  }
  const OnDevice on(c);
  const int64_t count = random.one_of<int64_t>({1, 5, 64, 64, 200, 300});
  c.k = std::min<int64_t>(random.one_of<int64_t>({1, 16, 70}), count);
  std::vector<int64_t> candidates(c.samples * count, -1);
  std::vector<unsigned char> offered(c.samples * c.documents, 0);
  for (int64_t b = 0; b < c.samples; b++) {
    std::vector<int64_t> some(c.documents);
    for (int64_t d = 0; d < c.documents; d++) some[d] = d;
    std::shuffle(some.begin(), some.end(), random.engine);
    for (int64_t i = 0; i < std::min(count, c.documents); i++) {
      if (random.below(10) == 0) continue;
      candidates[b * count + i] = some[i];
      offered[b * c.documents + some[i]] = 1;
    }
  }
  c.alive.clear();
  double bound = 0;
  std::vector<double> scores = reference(c, c.queries, &bound);
  for (size_t i = 0; i < scores.size(); i++)
    if (!offered[i]) scores[i] = -INFINITY;
  const Memory given(candidates);
  Rescore call;
  call.queries = on.queries.data;
  call.query_type = c.query_type;
  call.mask = reinterpret_cast<const bool*>(on.mask.data);
  call.keys = on.keys.data;
  call.key_type = c.key_type;
  call.keys_on_host = random.below(2) == 0;  // which says how they are read, wherever they are
  call.offsets = reinterpret_cast<const int64_t*>(on.offsets.data);
  call.candidates = reinterpret_cast<const int64_t*>(given.data);
  call.samples = c.samples;
  call.tokens = c.tokens;
  call.width = c.width;
  call.documents = c.documents;
  call.count = count;
  call.k = c.k;
  Memory chosen(c.samples * c.k * 8), chosen_scores(c.samples * c.k * 4), workspace(rescore_workspace(call));
  call.chosen = reinterpret_cast<int64_t*>(chosen.data);
  call.chosen_scores = reinterpret_cast<float*>(chosen_scores.data);
  CHECK_CUDA(rescore_documents(call, workspace.data, nullptr));
  CHECK_CUDA(cudaGetLastError());
  CHECK_CUDA(cudaDeviceSynchronize());
  compare(c, "rescored", scores, bound / (1 << 19) + 1e-30, chosen.read<int64_t>(), chosen_scores.read<float>());
  if (!chosen.guard_is_whole() || !chosen_scores.guard_is_whole() || !workspace.guard_is_whole())
    complain(c, "rescored", "written outside the result or the workspace", 0, 0, 0, 0);
}

// What must hold whatever the sizes.
void check_edges() {
  Random random(3);
  const auto run = [](const Case& c) {
    const OnDevice on(c);
    std::vector<Expected> known;
    check_way(c, on, {Path::plain, -1}, known);
    check_way(c, on, {}, known);
  };
  Case c = some_case(random, Type::bf16, true);
  c.exact = false;
  const auto resize = [&c](int64_t samples, int64_t tokens, int64_t chunks, int64_t k) {
    c.samples = samples, c.tokens = tokens, c.chunks = chunks, c.k = k, c.width = 16;
    c.queries.assign(samples * tokens * 16, 0.5f);
    c.keys.assign(chunks * 16, 0.25f);
    c.mask.assign(samples * tokens, 1);
    c.alive.clear();
    c.offsets = {0};
    for (int64_t i = 1; i <= chunks; i++) c.offsets.push_back(i);
    c.documents = chunks;
  };
  c.exact = true;
  resize(2, 0, 5, 3), run(c);    // no tokens
  resize(2, 3, 0, 3), run(c);    // no documents
#ifdef MSA_HF_EMULATE
  resize(1, 3, 4200, 40), run(c);  // all scores are equal
  resize(1, 3, 1500, 700), run(c);  // several rounds of select
#else
  resize(1, 3, 9000, 40), run(c);
  resize(1, 3, 5000, 2500), run(c);  // several rounds of select
  resize(1, 3, 300000, 2500), run(c);
  resize(1, 3, 300 * 520, 290), c.offsets = {0}, c.documents = 300;  // long documents
  for (int64_t i = 1; i <= 300; i++) c.offsets.push_back(i * 520);
  for (int64_t i = 0; i < 300; i++) c.keys[(i * 520 + i) * 16] = static_cast<float>(1 + i % 7);
  run(c);
#endif
  // The best of the first round lie in few groups, those of the second in many others.
  resize(1, 3, 2048, 276);
  for (int64_t chunk = 0; chunk < 2048; chunk += chunk < 240 ? 1 : 16)
    c.keys[chunk * 16 + 3] = chunk < 240 ? 100.0f : 2.0f + chunk / 16 % 5;
  run(c);
  resize(1, 3, 4200, 8);  // the best at the edges of runs and tiles
  for (const int64_t chunk : {0, 127, 128, 4094, 4095, 4096, 4097, 4199})
    for (int64_t j = 0; j < 16; j++) c.keys[chunk * 16 + j] = 1.0f + chunk % 7;
  run(c);
  resize(1, 3, 40, 45), c.alive.assign(40, 0), run(c);  // nothing alive
  resize(3, 5, 300, 8);
  std::fill(c.mask.begin() + 5, c.mask.begin() + 10, 0), run(c);  // one sample without routing tokens
  // A NaN in a key: its document is never chosen, others are.
  resize(1, 9, 4100, 16), c.offsets = {0, 7, 4098, 4099, 4100}, c.documents = 4;
  c.keys[4097 * 16 + 3] = NAN;
  {
    const OnDevice on(c);
    for (const Path path : {Path::plain, Path::mma, Path::wgmma}) {
      Call call = call_of(c, on);
      const Plan p = plan(call, {path, -1});
      if (p.error != nullptr) continue;
      Memory chosen(16 * 8), chosen_scores(16 * 4), workspace(p.workspace);
      call.chosen = reinterpret_cast<int64_t*>(chosen.data);
      call.chosen_scores = reinterpret_cast<float*>(chosen_scores.data);
      CHECK_CUDA(route_documents(call, p, workspace.data, nullptr));
      CHECK_CUDA(cudaDeviceSynchronize());
      const auto got = chosen.read<int64_t>();
      if (got[0] != 0 || got[1] != 2 || got[2] != 3 || got[3] != -1)
        complain(c, choice_name(p), "a document with a NaN was chosen", 0, 0, double(got[1]), 2);
    }
  }
}

bool check(int cases, uint64_t seed, bool small) {
  check_edges();
  Random random(seed), other(seed + 1000);
  int runs = 0;
  for (; runs < 8; runs++) check_rescore(other, small);
  std::vector<int> taken(shape_count() + 3, 0);
  for (int i = 0; i < cases; i++) {
    const Type key_type = random.one_of({Type::bf16, Type::bf16, Type::f16, Type::e4m3, Type::s8, Type::f32});
    const Case c = some_case(random, key_type, small);
#ifdef MSA_HF_EMULATE
    emulated::multiprocessors = random.one_of({4, 5, 8});
    emulated::shared_limit = random.one_of({232448, 120000, 80000});  // many and few stages
#endif
    const OnDevice on(c);
    std::vector<Expected> known;
    if (check_way(c, on, {Path::plain, -1}, known)) runs++, taken[shape_count()]++;
    if (check_way(c, on, {Path::mma, -1}, known)) runs++, taken[shape_count() + 1]++;
    if (check_way(c, on, {}, known)) runs++, taken[shape_count() + 2]++;
    for (int shape = 0; shape < shape_count(); shape++) {
      if (small && random.below(3) != 0) continue;
      if (check_way(c, on, {Path::wgmma, shape}, known)) runs++, taken[shape]++;
    }
    if (i % 2 == 0) check_rescore(random, small), runs++;
    if (failures > 20) break;
  }
  std::printf("checks: %d runs, %d wrong; plain %d, mma %d, automatic %d", runs, failures, taken[shape_count()],
              taken[shape_count() + 1], taken[shape_count() + 2]);
  for (int shape = 0; shape < shape_count(); shape++) {
    const Shape s = shape_at(shape);
    std::printf(", %dx%d/%d%s %d", s.chunks, s.columns, s.cluster, s.resident ? "r" : "", taken[shape]);
  }
  std::printf("\n");
  std::fflush(stdout);
  return failures == 0;
}

}  // namespace

#ifndef MSA_HF_EMULATE
#include "route_documents_bench.inc"
#endif

int main(int arguments, char** values) {
  bool checks = true, times = true;
  int cases = 0;
  uint64_t seed = 1;
  std::string cublas;
  int64_t chunks = 1562500;
  for (int i = 1; i < arguments; i++) {
    const std::string option = values[i];
    if (option == "--check") times = false;
    else if (option == "--bench") checks = false;
    else if (option == "--cases" && i + 1 < arguments) cases = std::atoi(values[++i]);
    else if (option == "--seed" && i + 1 < arguments) seed = std::strtoull(values[++i], nullptr, 10);
    else if (option == "--cublas" && i + 1 < arguments) cublas = values[++i];
    else if (option == "--chunks" && i + 1 < arguments) chunks = std::atoll(values[++i]);
    else return std::fprintf(stderr, "unknown option %s\n", option.c_str()), 2;
  }
#ifdef MSA_HF_EMULATE
  (void)checks, (void)times, (void)cublas, (void)chunks;
  return check(cases > 0 ? cases : 25, seed, true) ? 0 : 1;
#else
  if (checks && !check(cases > 0 ? cases : 150, seed, false)) return 1;
  return times ? bench(chunks, cublas) : 0;
#endif
}
