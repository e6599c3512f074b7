#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

namespace red {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kAlignment = 64;

size_t limit() {
  if (const char* text = std::getenv("RED_KERNELS_CPU_POOL_MB")) return std::strtoull(text, nullptr, 10) << 20;
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
  return pages > 0 && size > 0 ? static_cast<size_t>(pages) / 8 * static_cast<size_t>(size) : size_t{1} << 30;
}

// Sizes that differ by less than an eighth share blocks.
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
      auto& free = free_[bytes];
      if (!free.empty()) {
        void* block = free.back();
        free.pop_back();
        kept_ -= bytes;
        return block;
      }
    }
    const bool huge = bytes >= kHugePage;
    void* block = nullptr;
    if (posix_memalign(&block, huge ? kHugePage : kAlignment, bytes) != 0) {
      trim();
      if (posix_memalign(&block, kAlignment, bytes) != 0) return nullptr;
    }
#if defined(__linux__)
    if (huge) madvise(block, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
    std::lock_guard<std::mutex> lock(mutex_);
    sizes_[block] = bytes;
    return block;
  }

  void release(void* block) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const size_t bytes = sizes_.at(block);
      if (kept_ + bytes <= limit_) {
        free_[bytes].push_back(block);
        kept_ += bytes;
        return;
      }
      sizes_.erase(block);
    }
    std::free(block);
  }

  size_t trim() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [bytes, blocks] : free_)
      for (void* block : blocks) {
        sizes_.erase(block);
        std::free(block);
      }
    free_.clear();
    const size_t freed = kept_;
    kept_ = 0;
    return freed;
  }

  size_t kept() {
    std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> free_;  // by size, the last released on top: it is the warmest
  std::unordered_map<void*, size_t> sizes_;
  size_t kept_ = 0;
  const size_t limit_ = limit();
};

// Never destroyed: tensors may outlive static destructors.
Pool& pool() {
  static Pool* pool = new Pool;
  return *pool;
}

}  // namespace

void* acquire(size_t bytes) { return pool().acquire(bytes); }
void release(void* block) { pool().release(block); }
size_t trim() { return pool().trim(); }
size_t kept() { return pool().kept(); }

}  // namespace red
