// gather_documents: the rows of chosen documents, in ascending order of documents, then padding.

#include <algorithm>
#include <cstring>
#include <vector>

#include "core.h"
#include "numbers.h"

namespace msa_hf::cpu {

namespace {

// Rows that one task takes.
constexpr int64_t kRows = 64;

}  // namespace

void gather_documents(const Gather& gather, const Threads& threads) {
  const int64_t pieces = gather.width / kRows + (gather.width % kRows != 0);
  const int64_t source_bytes = gather.dim * size_of(gather.content_type), bytes = gather.dim * size_of(gather.type);
  const bool copies = gather.content_type == gather.type;
  threads.each(gather.samples * pieces, [&](int64_t task) {
    const int64_t sample = task / pieces, first = task % pieces * kRows;
    const int64_t stop = std::min(first + kRows, gather.width);
    const int64_t* documents = gather.documents + sample * gather.k;
    std::vector<float> numbers(copies ? 0 : gather.dim);
    std::vector<int64_t> slots;  // columns of documents, ascending by document
    for (int64_t slot = 0; slot < gather.k; ++slot) {
      if (documents[slot] >= 0) slots.push_back(slot);
    }
    std::stable_sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) { return documents[a] < documents[b]; });

    size_t turn = 0;
    int64_t row = 0, begin = 0, end = 0;  // chunks begin .. end of the document whose turn it is start at `row`
    auto enter = [&] {
      begin = turn < slots.size() ? gather.offsets[documents[slots[turn]]] : 0;
      end = turn < slots.size() ? gather.offsets[documents[slots[turn]] + 1] : 0;
    };
    enter();
    for (int64_t place = first; place < stop; ++place) {
      while (turn < slots.size() && place >= row + (end - begin)) {
        row += end - begin;
        ++turn;
        enter();
      }
      const bool valid = turn < slots.size();
      gather.valid[sample * gather.width + place] = valid;
      gather.slots[sample * gather.width + place] = valid ? slots[turn] : 0;
      const int64_t chunk = begin + place - row - gather.first;
      const bool here = valid && chunk >= 0 && chunk < gather.chunks;
      for (int part = 0; part < 2; ++part) {
        char* target = static_cast<char*>(part == 0 ? gather.keys : gather.values);
        for (int64_t group = 0; group < gather.groups; ++group) {
          char* to = target + ((sample * gather.groups + group) * gather.width + place) * bytes;
          if (!here) {
            std::memset(to, 0, bytes);
            continue;
          }
          const char* from = static_cast<const char*>(gather.content) +
                             ((chunk * 2 + part) * gather.groups + group) * source_bytes;
          if (copies) {
            std::memcpy(to, from, bytes);
            continue;
          }
          widen(from, gather.content_type, gather.dim, numbers.data());
          if (gather.scales != nullptr) {
            const float scale = gather.scales[chunk * 2 + part];
            for (float& number : numbers) number *= scale;
          }
          narrow(numbers.data(), gather.dim, gather.type, to);
        }
      }
    }
  });
}

}  // namespace msa_hf::cpu
