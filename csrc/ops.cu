// Registration of the CUDA kernels, and the C functions that red_kernels/backends/cuda.py calls through ctypes. In the
// emulator the operators are in a separate namespace, for tensors on the CPU.
#define RED_TARGET cuda
#include <cstdio>
#include <exception>

#include "cuda/kernels.h"
#include "ops.h"
#include "schemas.h"

#define RED_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(RED_EMULATED)
#define RED_ARCHITECTURES "emulated"

STABLE_TORCH_LIBRARY(red_kernels_emulated, library) { red::define_operators(library); }

STABLE_TORCH_LIBRARY_IMPL(red_kernels_emulated, CPU, library) {
  RED_IMPLEMENT_OPERATORS(library, red::cuda)
  RED_IMPLEMENT_MIXES(library, red::cuda)
}
#else
STABLE_TORCH_LIBRARY_IMPL(red_kernels, CUDA, library) {
  RED_IMPLEMENT_OPERATORS(library, red::cuda)
  RED_IMPLEMENT_MIXES(library, red::cuda)
}
#endif

// Each writes into `text` (of `size` bytes) and returns 0 if that is an error message.

// The targets of this compilation: "sm_80 sm_90 sm_100 compute_100".
RED_EXPORT int red_kernels_cuda_architectures(char* text, size_t size) {
  std::snprintf(text, size, "%s", RED_ARCHITECTURES);
  return 1;
}

// Whether they load on a device: its driver may be too old for them.
RED_EXPORT int red_kernels_cuda_check(int device, char* text, size_t size) {
  try {
    red::cuda::device_of(device);
    return 1;
  } catch (const std::exception& error) {
    std::snprintf(text, size, "%s", error.what());
    return 0;
  }
}
