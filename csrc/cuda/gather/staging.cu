#include "staging.h"

#include <algorithm>
#include <cstring>

namespace msa_hf {
namespace {

constexpr size_t kPiece = 256 * 1024;  // what one thread copies at a time

#define MSA_HF_RETURN_IF_FAILED(call)                  \
  do {                                                 \
    const cudaError_t status = (call);                 \
    if (status != cudaSuccess) return status;          \
  } while (false)

cudaError_t grow(void** memory, size_t& held, size_t wanted) {
  if (wanted <= held) return cudaSuccess;
  if (*memory != nullptr) MSA_HF_RETURN_IF_FAILED(cudaFreeHost(*memory));
  *memory = nullptr;
  held = 0;
  const size_t bytes = wanted + wanted / 2;  // room to grow, so that this is rare
  MSA_HF_RETURN_IF_FAILED(cudaHostAlloc(memory, bytes, cudaHostAllocPortable));
  held = bytes;
  return cudaSuccess;
}

}  // namespace

CopyCrew::CopyCrew(int helpers) {
  for (int i = 0; i < helpers; ++i) helpers_.emplace_back([this] { help(); });
}

CopyCrew::~CopyCrew() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  start_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void CopyCrew::work() {
  for (size_t i = next_.fetch_add(1); i < pieces_.size(); i = next_.fetch_add(1)) {
    std::memcpy(pieces_[i].to, pieces_[i].from, pieces_[i].bytes);
  }
}

void CopyCrew::help() {
  size_t seen = 0;
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
    }
    work();
    std::lock_guard<std::mutex> lock(mutex_);
    if (--busy_ == 0) done_.notify_one();
  }
}

void CopyCrew::run(const std::vector<Copy>& copies) {
  size_t total = 0;
  for (const Copy& copy : copies) total += copy.bytes;
  if (total <= kPiece || helpers_.empty()) {
    for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    pieces_.clear();
    for (const Copy& copy : copies) {
      for (size_t at = 0; at < copy.bytes; at += kPiece) {
        pieces_.push_back({copy.to + at, copy.from + at, std::min(kPiece, copy.bytes - at)});
      }
    }
    next_ = 0;
    busy_ = helpers_.size();
    ++round_;
  }
  start_.notify_all();
  work();
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [&] { return busy_ == 0; });
}

struct StagingRing::Job {
  StagingRing* ring;
  std::shared_ptr<void> owner;
  const char* content;
  const char* scales;
  size_t row_bytes;
  int batch, k, width;
  char* rows;
  char* staged_scales;
  const int64_t* runs;
};

StagingRing::StagingRing(int slots, int helpers) : slots_(slots), crew_(helpers) {}

StagingRing::~StagingRing() {
  for (Slot& slot : slots_) {
    if (slot.used) cudaEventSynchronize(slot.done);
    if (slot.done != nullptr) cudaEventDestroy(slot.done);
    cudaFreeHost(slot.rows);
    cudaFreeHost(slot.scales);
    cudaFreeHost(slot.runs);
  }
}

cudaError_t StagingRing::reserve(Slot& slot, size_t rows, size_t scales, size_t runs) {
  if (slot.done == nullptr) {
    MSA_HF_RETURN_IF_FAILED(cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming));
  }
  if (rows <= slot.rows_bytes && scales <= slot.scales_bytes && runs <= slot.runs_bytes) return cudaSuccess;
  // Larger than ever before: the only case in which the caller waits.
  if (slot.used) MSA_HF_RETURN_IF_FAILED(cudaEventSynchronize(slot.done));
  MSA_HF_RETURN_IF_FAILED(grow(reinterpret_cast<void**>(&slot.rows), slot.rows_bytes, rows));
  MSA_HF_RETURN_IF_FAILED(grow(reinterpret_cast<void**>(&slot.scales), slot.scales_bytes, scales));
  return grow(reinterpret_cast<void**>(&slot.runs), slot.runs_bytes, runs);
}

void StagingRing::copy_runs(void* argument) {
  std::unique_ptr<Job> job(static_cast<Job*>(argument));
  StagingRing& ring = *job->ring;
  std::vector<CopyCrew::Copy> copies;
  constexpr size_t kScales = 2 * sizeof(float);
  for (int sample = 0; sample < job->batch; ++sample) {
    int64_t row = 0;
    for (int i = 0; i < job->k && row < job->width; ++i) {
      const int64_t* run = job->runs + (static_cast<int64_t>(sample) * job->k + i) * 2;
      const int64_t count = std::min<int64_t>(run[1], job->width - row);
      if (count <= 0) continue;
      const int64_t target = static_cast<int64_t>(sample) * job->width + row;
      copies.push_back({job->rows + target * job->row_bytes, job->content + run[0] * job->row_bytes,
                        static_cast<size_t>(count) * job->row_bytes});
      if (job->scales != nullptr) {
        std::memcpy(job->staged_scales + target * kScales, job->scales + run[0] * kScales, count * kScales);
      }
      row += count;
    }
  }
  {
    std::lock_guard<std::mutex> lock(ring.copying_);
    ring.crew_.run(copies);
  }
  std::lock_guard<std::mutex> lock(ring.finished_mutex_);
  ring.finished_.push_back(std::move(job));
}

cudaError_t StagingRing::gather(GatherCall call, std::shared_ptr<void> owner, cudaStream_t stream) {
  if (call.batch == 0 || call.width == 0) return cudaSuccess;
  std::lock_guard<std::mutex> lock(mutex_);
  {
    std::vector<std::unique_ptr<Job>> finished;
    {
      std::lock_guard<std::mutex> finished_lock(finished_mutex_);
      finished.swap(finished_);
    }
  }
  const size_t row_bytes = size_t{2} * call.groups * call.dim * bytes_of(call.content_type);
  const size_t rows = static_cast<size_t>(call.batch) * call.width;
  Slot& slot = slots_[next_];
  next_ = (next_ + 1) % slots_.size();
  const size_t scales_bytes = call.scales == nullptr ? 0 : rows * 2 * sizeof(float);
  const size_t runs_bytes = static_cast<size_t>(call.batch) * call.k * 2 * sizeof(int64_t);
  MSA_HF_RETURN_IF_FAILED(reserve(slot, rows * row_bytes, scales_bytes, runs_bytes));
  if (slot.used) MSA_HF_RETURN_IF_FAILED(cudaStreamWaitEvent(stream, slot.done, 0));

  MSA_HF_RETURN_IF_FAILED(list_runs(call, slot.runs, stream));
  auto job = std::make_unique<Job>(Job{this, std::move(owner), static_cast<const char*>(call.content),
                                       reinterpret_cast<const char*>(call.scales), row_bytes, call.batch, call.k,
                                       call.width, slot.rows, slot.scales, slot.runs});
  MSA_HF_RETURN_IF_FAILED(cudaLaunchHostFunc(stream, copy_runs, job.get()));
  job.release();  // copy_runs owns it
  call.content = slot.rows;
  call.scales = reinterpret_cast<const float*>(call.scales == nullptr ? nullptr : slot.scales);
  call.staged = true;
  const cudaError_t status = gather_documents(call, stream);
  slot.used = true;
  MSA_HF_RETURN_IF_FAILED(cudaEventRecord(slot.done, stream));
  return status;
}

}  // namespace msa_hf
