// Common definitions of the kernels of all devices: the types of activations. No torch here.
#pragma once

#include <cstdint>

namespace red {

enum Type { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kTypes = 3 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// An activation's rows; the stride between them is in elements, the columns are adjacent. Null if absent.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
#if defined(__CUDACC__)
  __host__ __device__
#endif
  explicit operator bool() const {
    return data != nullptr;
  }
};

}  // namespace red
