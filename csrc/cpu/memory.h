// Memory for large outputs, kept for the next output of the same size. A fresh mapping costs a page fault for every
// 4 KiB written, as long as writing them takes; a training step asks for the same sizes again and again.
#pragma once

#include <cstddef>

namespace red {

// Outputs of at least this many bytes come from here; smaller ones from torch.
constexpr size_t kPooledBytes = size_t{1} << 17;

// At least `bytes` bytes, aligned to a cache line; null if the system has none left.
void* acquire(size_t bytes);
// Takes back what `acquire` gave. Keeps it for reuse, up to RED_KERNELS_CPU_POOL_MB (default: an eighth of the memory).
void release(void* block);
// Gives all kept memory back to the system; returns how many bytes that was.
size_t trim();
// Bytes kept for reuse.
size_t kept();

}  // namespace red
