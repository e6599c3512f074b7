// Memory for large outputs, kept for the next output of the same size. A fresh mapping costs a page fault for every
// page written (4 KiB mostly), as long as writing them takes; a training step asks for the same sizes again and again.
#pragma once

#include <cstddef>

namespace red {

// Outputs of at least this many bytes come from here; smaller ones from torch.
constexpr size_t kPooledBytes = size_t{1} << 17;

// At least `bytes` bytes, aligned to 64 bytes; null if the system has none left. Throws std::runtime_error where
// RED_KERNELS_CPU_POOL_MB is no number.
void* acquire(size_t bytes);
// Takes back what `acquire` gave and keeps it for reuse: no more than was in use at once at the peak, nor than
// RED_KERNELS_CPU_POOL_MB (default: an eighth of the memory). What was released longest ago is given up first.
void release(void* block);
// Gives all kept memory back to the system; returns how many bytes that was.
size_t trim();
// Bytes kept for reuse.
size_t kept();
// Whether large outputs come from here, which they do unless it was switched off: then they are torch's own, and its
// profiler counts them. Returns what was the case before.
bool use_pool(bool on);
bool pool_in_use();

}  // namespace red
