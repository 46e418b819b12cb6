// Gathering from host memory that the device cannot read: a memory-mapped file, or memory that is not pinned.
//
// A ring of pinned buffers. Per call, all in stream order and nothing of it waited for by the caller: a kernel lists the
// runs of chunks wanted, into pinned memory; a host function, with some threads to help, copies them from the content to
// the buffer, one piece per document; the gather kernel reads the buffer. A buffer is used again once the call that used
// it before is through, on whatever stream that was.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "gather_documents.h"

namespace msa_hf {

// Threads that copy memory together.
class CopyCrew {
 public:
  struct Copy {
    char* to;
    const char* from;
    size_t bytes;
  };

  explicit CopyCrew(int helpers);
  ~CopyCrew();
  CopyCrew(const CopyCrew&) = delete;
  CopyCrew& operator=(const CopyCrew&) = delete;

  // Returns when all is copied; the caller helps. One call at a time.
  void run(const std::vector<Copy>& copies);

 private:
  void help();
  void work();

  std::vector<Copy> pieces_;
  std::atomic<size_t> next_{0};
  size_t busy_ = 0;
  size_t round_ = 0;
  bool stop_ = false;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> helpers_;
};

class StagingRing {
 public:
  // One per device; made and used with that device current.
  StagingRing(int slots, int helpers);
  ~StagingRing();
  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  // As gather_documents, of content and scales anywhere in host memory. `owner` keeps them alive until they were read.
  cudaError_t gather(GatherCall call, std::shared_ptr<void> owner, cudaStream_t stream);

 private:
  struct Slot {
    char* rows = nullptr;
    char* scales = nullptr;
    int64_t* runs = nullptr;
    size_t rows_bytes = 0, scales_bytes = 0, runs_bytes = 0;
    cudaEvent_t done = nullptr;
    bool used = false;
  };
  struct Job;

  cudaError_t reserve(Slot& slot, size_t rows, size_t scales, size_t runs);
  static void copy_runs(void* job);

  std::vector<Slot> slots_;
  size_t next_ = 0;
  CopyCrew crew_;
  std::mutex mutex_;  // of callers
  std::mutex copying_;  // of host functions: streams may run several at once
  std::mutex finished_mutex_;
  std::vector<std::unique_ptr<Job>> finished_;  // owners are let go by callers: a host function must not call CUDA
};

}  // namespace msa_hf
