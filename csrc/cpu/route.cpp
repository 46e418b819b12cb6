// route_documents: blocks of keys, each read once and scored against all routing tokens; then the best documents.
//
// Per thread there is one block of keys as the kernels want it and its scores [samples, block]; for all of them together,
// the scores of the documents [samples, documents] and the queries. Nothing is ever tokens x chunks.

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "core.h"
#include "kernels.h"
#include "numbers.h"

namespace msa_hf::cpu {

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
// Bytes that a block of keys may take, so that it stays in the processor's second cache beside a panel of queries;
// processors with a matrix unit have caches of 2 MB.
constexpr int64_t kBlockBytes = 192 << 10, kTileBlockBytes = 512 << 10;
// Tasks per thread, so that none waits long for the last one.
constexpr int64_t kTasks = 4;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class Number>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    constexpr int64_t most = std::numeric_limits<int64_t>::max() / static_cast<int64_t>(sizeof(Number));
    if (count < 0 || count > most) throw std::bad_alloc();
    data_ = static_cast<Number*>(::operator new(std::max<int64_t>(count, 1) * sizeof(Number), kAlignment));
  }
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Number* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  Number* data_ = nullptr;
};

// --- scoring a block of keys ---------------------------------------------------------------------------------------------

// Scores chunks first .. first + count: best [samples][stride], the largest product over a sample's tokens, is raised.
class Scorer {
 public:
  virtual ~Scorer() = default;
  virtual int64_t block() const = 0;          // chunks to be scored at once
  virtual int64_t scratch_bytes() const = 0;  // that a thread must hold
  virtual void begin(void*) const {}          // once per thread, with 64 bytes to remember things in
  virtual void end(const void*) const {}
  virtual void score(int64_t first, int64_t count, void* scratch, float* best, int64_t stride) const = 0;
};

// Chunks per block: what fits, no more than leaves several for every thread, a multiple of `unit`.
int64_t block_of(int64_t fitting, int64_t unit, int64_t chunks, int64_t threads) {
  const int64_t share = (chunks + threads * kTasks - 1) / (threads * kTasks);
  return round_up(std::clamp<int64_t>(std::min({fitting / unit * unit, share, int64_t(1024)}), 1, 1024), unit);
}

const void* key_at(const Route& route, int64_t chunk) {
  return static_cast<const char*>(route.keys) + chunk * route.key_stride * size_of(route.key_type);
}

class FloatScorer final : public Scorer {
 public:
  FloatScorer(const Route& route, const FloatKernels& kernels, const Threads& threads) : route_(route), kernels_(kernels) {
    const int64_t lanes = kernels.lanes;
    width_ = round_up(route.width, lanes);
    for (int64_t sample = 0; sample < route.samples; ++sample) {
      int64_t token = route.starts[sample];
      const int64_t stop = route.starts[sample + 1];
      // A panel has room for `lanes` tokens; one that is three quarters full is filled up with its last token.
      for (; stop - token >= lanes - lanes / 4; token += lanes) panels_.push_back({sample, token, stop - 1});
      for (; token < stop; ++token) lone_.push_back({sample, token});
    }
    queries_ = std::make_unique<Buffer<float>>(static_cast<int64_t>(panels_.size()) * route.width * lanes +
                                               static_cast<int64_t>(lone_.size()) * width_);
    threads.each(static_cast<int64_t>(panels_.size()), [&](int64_t panel) {
      float* target = queries_->get() + panel * route.width * lanes;
      for (int64_t start = 0; start < route.width; start += 16) {  // a few lines of the cache at a time
        const int64_t stop = std::min(start + 16, route.width);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const float* query = route.queries + std::min(panels_[panel].token + lane, panels_[panel].last) * route.width;
          for (int64_t e = start; e < stop; ++e) target[e * lanes + lane] = query[e];
        }
      }
    });
    float* target = queries_->get() + static_cast<int64_t>(panels_.size()) * route.width * lanes;
    lone_queries_ = target;
    for (const auto& [sample, token] : lone_) {
      std::memcpy(target, route.queries + token * route.width, route.width * sizeof(float));
      std::fill(target + route.width, target + width_, 0.0f);
      target += width_;
    }
    in_place_ = route.key_type == Type::f32 && (lone_.empty() || width_ == route.width);
    // Rows that lie a multiple of 4 kB apart would compete for the same places of the first cache.
    stride_ = in_place_ ? route.key_stride : width_ + 16;
    block_ = block_of(kBlockBytes / std::max<int64_t>(width_ * 4, 1), kernels.unit, route.chunks, threads.count);
  }

  int64_t block() const override { return block_; }
  int64_t scratch_bytes() const override { return in_place_ ? 0 : block_ * stride_ * 4; }

  void score(int64_t first, int64_t count, void* scratch, float* best, int64_t best_stride) const override {
    const float* keys = static_cast<const float*>(key_at(route_, first));
    if (!in_place_) {
      float* rows = static_cast<float*>(scratch);
      for (int64_t row = 0; row < count; ++row) {
        kernels_.widen(key_at(route_, first + row), route_.key_type, route_.width, rows + row * stride_);
        std::fill(rows + row * stride_ + route_.width, rows + row * stride_ + width_, 0.0f);
      }
      keys = rows;
    }
    float* targets[8];
    const int64_t panels = static_cast<int64_t>(panels_.size());
    for (int64_t panel = 0; panel < panels; panel += kernels_.panels) {
      int together = static_cast<int>(std::min<int64_t>(kernels_.panels, panels - panel));
      for (int i = 0; i < together; ++i) targets[i] = best + panels_[panel + i].sample * best_stride;
      kernels_.panel(queries_->get() + panel * route_.width * kernels_.lanes, together, keys, stride_, route_.width,
                     count, targets);
    }
    LoneToken tokens[8];
    const int64_t lone = static_cast<int64_t>(lone_.size());
    for (int64_t token = 0; token < lone; token += kernels_.tokens) {
      int together = static_cast<int>(std::min<int64_t>(kernels_.tokens, lone - token));
      for (int i = 0; i < together; ++i) {
        tokens[i] = {lone_queries_ + (token + i) * width_, best + lone_[token + i].first * best_stride};
      }
      kernels_.lone(tokens, together, keys, stride_, width_, count);
    }
  }

 private:
  struct Panel {
    int64_t sample, token, last;
  };
  const Route& route_;
  const FloatKernels& kernels_;
  std::vector<Panel> panels_;
  std::vector<std::pair<int64_t, int64_t>> lone_;  // sample and token
  std::unique_ptr<Buffer<float>> queries_;
  const float* lone_queries_ = nullptr;
  int64_t width_ = 0, stride_ = 0, block_ = 0;
  bool in_place_ = false;
};

class TileScorer final : public Scorer {
 public:
  static bool takes(const Route& route) {
    return route.key_type == Type::bf16 || route.key_type == Type::i8 || route.key_type == Type::e4m3;
  }

  TileScorer(const Route& route, const TileKernels& kernels, const Threads& threads) : route_(route), kernels_(kernels) {
    steps_ = (route.width + kNumbers - 1) / kNumbers;
    std::vector<Group> mixed;
    Group rest;
    for (int64_t sample = 0; sample < route.samples; ++sample) {
      int64_t token = route.starts[sample];
      const int64_t stop = route.starts[sample + 1];
      // Tokens of one sample in groups of 16; what is left of a sample, where it is few, shares a group with others'.
      for (; stop - token > (route.samples > 1 ? 8 : 0); token += kTokens) {
        Group group;
        for (int64_t i = 0; i < kTokens; ++i) group.tokens.push_back({sample, std::min(token + i, stop - 1)});
        groups_.push_back(std::move(group));
      }
      for (; token < stop; ++token) {
        rest.tokens.push_back({sample, token});
        if (rest.tokens.size() == kTokens) mixed.push_back(std::exchange(rest, {}));
      }
    }
    if (!rest.tokens.empty()) mixed.push_back(std::move(rest));
    uniform_ = static_cast<int64_t>(groups_.size());
    groups_.insert(groups_.end(), std::make_move_iterator(mixed.begin()), std::make_move_iterator(mixed.end()));
    parts_ = parts_needed(route.queries, route.starts[route.samples] * route.width);
    queries_ = std::make_unique<Buffer<uint16_t>>(static_cast<int64_t>(groups_.size()) * parts_ * steps_ * kTile);
    threads.each(static_cast<int64_t>(groups_.size()), [&](int64_t group) {
      const float* rows[kTokens] = {};
      for (size_t column = 0; column < groups_[group].tokens.size(); ++column) {
        rows[column] = route.queries + groups_[group].tokens[column].second * route.width;
      }
      kernels.pack_queries(rows, route.width, static_cast<int>(parts_),
                           queries_->get() + group * parts_ * steps_ * kTile);
    });
    // With few tokens the copy of a block costs more than it saves.
    in_place_ = route.key_type == Type::bf16 && route.width % kNumbers == 0 && groups_.size() <= 4;
    block_ = block_of(kTileBlockBytes / std::max<int64_t>(steps_ * kNumbers * 2, 1), 2 * kKeys, route.chunks, threads.count);
  }

  int64_t block() const override { return block_; }
  int64_t scratch_bytes() const override { return block_ / kKeys * steps_ * kTile * 2 + 2 * block_ * kTokens * 4; }
  void begin(void* memory) const override { kernels_.begin(memory); }
  void end(const void* memory) const override { kernels_.end(memory); }

  void score(int64_t first, int64_t count, void* scratch, float* best, int64_t stride) const override {
    uint16_t* packed = static_cast<uint16_t*>(scratch);
    float* products = reinterpret_cast<float*>(packed + block_ / kKeys * steps_ * kTile);
    const int64_t blocks = (count + kKeys - 1) / kKeys;
    TileKeys keys{packed, steps_ * kTile, kTile, kNumbers};
    if (in_place_ && count % kKeys == 0) {
      keys = {static_cast<const uint16_t*>(key_at(route_, first)), kKeys * route_.key_stride, kNumbers, route_.key_stride};
    } else {
      for (int64_t block = 0; block < blocks; ++block) {
        kernels_.pack_keys(key_at(route_, first + block * kKeys), route_.key_type, route_.key_stride,
                           std::min(kKeys, count - block * kKeys), route_.width, packed + block * steps_ * kTile);
      }
    }
    const int64_t groups = static_cast<int64_t>(groups_.size());
    for (int64_t group = 0; group < groups;) {
      const bool uniform = group < uniform_;
      const int64_t together = std::min<int64_t>(2, (uniform ? uniform_ : groups) - group);
      float* targets[2];
      for (int64_t i = 0; i < together; ++i) {
        targets[i] =
            uniform ? best + groups_[group + i].tokens[0].first * stride : products + i * block_ * kTokens;
      }
      kernels_.multiply(queries_->get() + group * parts_ * steps_ * kTile, static_cast<int>(together),
                        static_cast<int>(parts_), keys, blocks, steps_, uniform, targets);
      for (int64_t i = 0; !uniform && i < together; ++i) {
        for (size_t column = 0; column < groups_[group + i].tokens.size(); ++column) {
          float* row = best + groups_[group + i].tokens[column].first * stride;
          const float* product = targets[i] + column;
          for (int64_t chunk = 0; chunk < count; ++chunk) {
            if (product[chunk * kTokens] > row[chunk]) row[chunk] = product[chunk * kTokens];
          }
        }
      }
      group += together;
    }
  }

 private:
  static constexpr int64_t kKeys = 16, kTokens = 16, kNumbers = 32, kTile = 16 * 32;

  struct Group {
    std::vector<std::pair<int64_t, int64_t>> tokens;  // sample and token; of one sample alone in the first ones
  };

  // To the nearest bfloat16, for finite numbers; without a branch, so that the loop below is vectorized.
  static float rounded(float value) {
    const uint32_t bits = as_bits(value);
    return as_float((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
  }

  // How many bfloat16 numbers together make up each query: float32 has 24 bits, bfloat16 has 8.
  static int64_t parts_needed(const float* queries, int64_t count) {
    uint32_t second = 0, third = 0;  // bits of what the parts before leave, but for the sign of zero
    for (int64_t i = 0; i < count; ++i) {
      const float left = queries[i] - rounded(queries[i]);
      second |= as_bits(left) << 1;
      third |= as_bits(left - rounded(left)) << 1;
    }
    return third != 0 ? 3 : second != 0 ? 2 : 1;
  }

  const Route& route_;
  const TileKernels& kernels_;
  std::vector<Group> groups_;
  bool in_place_ = false;
  int64_t uniform_ = 0, parts_ = 0, steps_ = 0, block_ = 0;
  std::unique_ptr<Buffer<uint16_t>> queries_;
};

// --- from chunks to documents ----------------------------------------------------------------------------------------------

void raise(float* place, float value) {
  uint32_t seen = __atomic_load_n(reinterpret_cast<uint32_t*>(place), __ATOMIC_RELAXED);
  while (value > as_float(seen) &&
         !__atomic_compare_exchange_n(reinterpret_cast<uint32_t*>(place), &seen, as_bits(value), true, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED)) {
  }
}

// Scores of chunks first .. first + count of one sample into those of its documents, which start as -inf. `single`: every
// document is one chunk.
void fold(const Route& route, bool single, int64_t first, int64_t count, const float* chunks, float* documents) {
  const int64_t stop = first + count;
  auto scaled = [&](int64_t chunk) {
    float score = chunks[chunk - first];
    // Adding zero makes -0.0 equal to 0.0 in every bit, in whatever order they come.
    return (route.scales != nullptr ? score * route.scales[chunk] : score) + 0.0f;
  };
  if (single) {
    for (int64_t chunk = first; chunk < stop; ++chunk) documents[chunk] = scaled(chunk);
    return;
  }
  int64_t document = std::upper_bound(route.offsets, route.offsets + route.count + 1, first) - route.offsets - 1;
  for (; document < route.count && route.offsets[document] < stop; ++document) {
    const int64_t from = route.offsets[document], to = route.offsets[document + 1];
    float best = kNone;
    for (int64_t chunk = std::max(from, first); chunk < std::min(to, stop); ++chunk) {
      float score = scaled(chunk);
      if (score > best) best = score;
    }
    if (from >= first && to <= stop) {
      documents[document] = best;
    } else {  // another block has chunks of it
      raise(documents + document, best);
    }
  }
}

// The k best of [count] scores above -inf, best first, equal ones by the lower index; then -1 and -inf.
void choose(const float* scores, int64_t count, int64_t k, int64_t* documents, float* best) {
  typedef std::pair<float, int64_t> Entry;
  // Whether a is the better: at the front of the heap stands the worst.
  auto better = [](const Entry& a, const Entry& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
  };
  if (k == 0) return;
  std::vector<Entry> heap;
  heap.reserve(static_cast<size_t>(std::min(k, count)));
  constexpr int64_t kStretch = 64;
  float worst = kNone;
  for (int64_t start = 0; start < count; start += kStretch) {
    const int64_t stop = std::min(start + kStretch, count);
    bool any = false;
    for (int64_t i = start; i < stop; ++i) any |= scores[i] > worst;
    if (!any) continue;
    for (int64_t i = start; i < stop; ++i) {
      if (!(scores[i] > worst)) continue;
      if (static_cast<int64_t>(heap.size()) == k) {
        std::pop_heap(heap.begin(), heap.end(), better);
        heap.back() = {scores[i], i};
      } else {
        heap.push_back({scores[i], i});
      }
      std::push_heap(heap.begin(), heap.end(), better);
      if (static_cast<int64_t>(heap.size()) == k) worst = heap.front().first;
    }
  }
  std::sort(heap.begin(), heap.end(), better);
  const int64_t found = static_cast<int64_t>(heap.size());
  for (int64_t i = 0; i < k; ++i) {
    documents[i] = i < found ? heap[i].second : -1;
    best[i] = i < found ? heap[i].first : kNone;
  }
}

const FloatKernels* float_kernels(Level level) {
  if (level >= Level::avx512 && avx512_kernels() != nullptr) return avx512_kernels();
  if (level >= Level::avx2 && avx2_kernels() != nullptr) return avx2_kernels();
  return generic_kernels();
}

}  // namespace

bool has_level(Level level) {
  switch (level) {
    case Level::amx: return amx_kernels() != nullptr;
    case Level::avx512: return avx512_kernels() != nullptr;
    case Level::avx2: return avx2_kernels() != nullptr;
    default: return true;
  }
}

Level best_level() {
  for (Level level : {Level::amx, Level::avx512, Level::avx2}) {
    if (has_level(level)) return level;
  }
  return Level::generic;
}

const char* level_name(Level level) {
  switch (level) {
    case Level::amx: return "amx";
    case Level::avx512: return "avx512";
    case Level::avx2: return "avx2";
    default: return "generic";
  }
}

void route_documents(const Route& route, Level level, const Threads& threads) {
  Buffer<float> scores(route.samples * route.count);
  std::fill(scores.get(), scores.get() + route.samples * route.count, kNone);

  if (route.starts[route.samples] > 0 && route.chunks > 0) {
    std::unique_ptr<Scorer> scorer;
    if (level == Level::amx && amx_kernels() != nullptr && TileScorer::takes(route)) {
      scorer = std::make_unique<TileScorer>(route, *amx_kernels(), threads);
    } else {
      scorer = std::make_unique<FloatScorer>(route, *float_kernels(level), threads);
    }
    const int64_t block = scorer->block();
    bool single = route.count == route.chunks;
    for (int64_t i = 0; single && i <= route.count; ++i) single = route.offsets[i] == i;
    threads.workers((route.chunks + block - 1) / block, [&](auto take) {
      Buffer<char> scratch(scorer->scratch_bytes());
      Buffer<float> best(route.samples * block);
      alignas(64) char memory[64];
      scorer->begin(memory);
      for (int64_t task = take(); task >= 0; task = take()) {
        const int64_t first = task * block, count = std::min(block, route.chunks - first);
        std::fill(best.get(), best.get() + route.samples * block, kNone);
        scorer->score(first, count, scratch.get(), best.get(), block);
        for (int64_t sample = 0; sample < route.samples; ++sample) {
          fold(route, single, first, count, best.get() + sample * block, scores.get() + sample * route.count);
        }
      }
      scorer->end(memory);
    });
  }

  threads.each(route.samples, [&](int64_t sample) {
    float* row = scores.get() + sample * route.count;
    const int64_t tokens = route.starts[sample + 1] - route.starts[sample];
    const float* queries = route.queries + route.starts[sample] * route.width;
    uint32_t infinite = 0;
    for (int64_t i = 0; i < tokens * route.width; ++i) infinite |= (as_bits(queries[i]) & 0x7F800000u) == 0x7F800000u;
    if (infinite != 0) std::fill(row, row + route.count, kNone);
    for (int64_t i = 0; route.alive != nullptr && i < route.count; ++i) row[i] = route.alive[i] != 0 ? row[i] : kNone;
    choose(row, route.count, route.k, route.documents + sample * route.k, route.scores + sample * route.k);
  });
}

}  // namespace msa_hf::cpu
