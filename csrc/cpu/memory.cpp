#include "memory.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <pthread.h>
#include <unistd.h>

namespace red {
namespace {

// For pages of 4 KiB. With pages of 16 or 64 KiB a huge one has 32 or 512 MiB, and most blocks get none.
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kAlignment = 64;

// The memory available to this process: the machine's, or its control group's limit.
size_t memory() {
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
  size_t bytes = pages > 0 && size > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(size) : size_t{8} << 30;
  size_t allowed = 0;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> allowed && allowed > 0) bytes = std::min(bytes, allowed);
  return bytes;
}

size_t limit() {
  const char* text = std::getenv("RED_KERNELS_CPU_POOL_MB");
  if (text == nullptr || *text == '\0') return memory() / 8;
  for (const char* digit = text; *digit; ++digit)
    if (*digit < '0' || *digit > '9')
      throw std::runtime_error("RED_KERNELS_CPU_POOL_MB is '" + std::string(text) + "', expected a number of MiB");
  return std::strtoull(text, nullptr, 10) << 20;
}

// Sizes within an eighth share blocks.
size_t size_class(size_t bytes) {
  size_t step = kPooledBytes / 8;
  while (step * 16 <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

class Pool {
 public:
  void* acquire(size_t bytes) {
    bytes = size_class(bytes);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!limit_) limit_ = limit();
      live_ += bytes;
      peak_ = std::max(peak_, live_);
      for (size_t k = free_.size(); k-- > 0;)  // the last released is the warmest
        if (free_[k].bytes == bytes) {
          void* block = free_[k].block;
          free_.erase(free_.begin() + static_cast<std::ptrdiff_t>(k));
          kept_ -= bytes;
          return block;
        }
    }
    const bool huge = bytes >= kHugePage;
    void* block = nullptr;
    if (posix_memalign(&block, huge ? kHugePage : kAlignment, bytes) != 0) {
      trim();
      if (posix_memalign(&block, kAlignment, bytes) != 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        live_ -= bytes;
        return nullptr;
      }
    }
#if defined(__linux__)
    if (huge) madvise(block, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    std::lock_guard<std::mutex> lock(mutex_);
    sizes_[block] = bytes;
    return block;
  }

  void release(void* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = sizes_.at(block);
    live_ -= bytes;
    kept_ += bytes;
    free_.push_back({block, bytes});
    drop_to(std::min(limit_.value_or(0), peak_));
  }

  size_t trim() {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t before = kept_;
    drop_to(0);
    peak_ = live_;
    return before;
  }

  size_t kept() {
    std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Block {
    void* block;
    size_t bytes;
  };

  // Frees the blocks released longest ago until at most `bytes` are kept.
  void drop_to(size_t bytes) {
    size_t dropped = 0;
    for (; kept_ > bytes; ++dropped) {
      kept_ -= free_[dropped].bytes;
      sizes_.erase(free_[dropped].block);
      std::free(free_[dropped].block);
    }
    free_.erase(free_.begin(), free_.begin() + static_cast<std::ptrdiff_t>(dropped));
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // in the order of release
  std::unordered_map<void*, size_t> sizes_;
  size_t live_ = 0, peak_ = 0, kept_ = 0;
  std::optional<size_t> limit_;  // read at the first use: loading a library must not fail
};


// Created when the library is loaded, since a fork during its creation would leave it incomplete; never destroyed,
// since tensors may outlive static destructors.
Pool* const pool = new Pool;

// A child has only the forking thread: a lock of another thread would stay locked in it.
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { pool->lock(); }, [] { pool->unlock(); }, [] { pool->unlock(); });

std::atomic<bool> in_use{true};

}  // namespace

void* acquire(size_t bytes) { return pool->acquire(bytes); }
void release(void* block) { pool->release(block); }
size_t trim() { return pool->trim(); }
size_t kept() { return pool->kept(); }
bool use_pool(bool on) { return in_use.exchange(on); }
bool pool_in_use() { return in_use.load(std::memory_order_relaxed); }

}  // namespace red
