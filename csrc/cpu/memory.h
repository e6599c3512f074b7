// Memory for large outputs, kept for the next output of the same size. A fresh mapping costs a page fault for every
// written page (usually 4 KiB), as long as writing them takes; a training step requests the same sizes again and again.
#pragma once

#include <cstddef>

namespace red {

// Outputs of at least this many bytes come from here; smaller ones from torch.
constexpr size_t kPooledBytes = size_t{1} << 17;

// At least `bytes` bytes, aligned to 64 bytes; null if the system has none left. Throws std::runtime_error if
// RED_KERNELS_CPU_POOL_MB is not a number.
void* acquire(size_t bytes);
// Takes a block of `acquire` back for reuse: at most the peak of use, and at most RED_KERNELS_CPU_POOL_MB (default: an
// eighth of the memory). The blocks released longest ago are freed first.
void release(void* block);
// Returns all kept memory to the system; returns its size in bytes.
size_t trim();
// Bytes kept for reuse.
size_t kept();
// Whether large outputs come from here; switched off, they are torch's own, and its profiler counts them. Returns the
// former setting.
bool use_pool(bool on);
bool pool_in_use();

}  // namespace red
