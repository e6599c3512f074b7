// The kernels and structs that this library lends to that of autograd's nodes, which bypasses torch's dispatcher.
#pragma once

#include "dispatch.h"
#include "memory.h"

namespace red {

struct Lent {
  int64_t layout;  // size of the structs of both compilations
  const Kernels& (*kernels)();
  void* (*acquire)(size_t bytes);
  void (*release)(void* block);
  bool (*pool_in_use)();
};

// Changes with the shared structs.
constexpr int64_t kLentLayout =
    static_cast<int64_t>(sizeof(Kernels) ^ sizeof(EditForward) << 10 ^ sizeof(EditBackward) << 20 ^
                         sizeof(EditNormForward) << 30 ^ sizeof(EditNormBackward) << 40 ^ sizeof(NormEditBackward) << 50 ^
                         sizeof(NormEditForward) << 5);

}  // namespace red
