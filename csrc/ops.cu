// Registration of the CUDA kernels, and the C function that red_kernels/backends/cuda.py calls through ctypes. In the emulator
// the operators are in a namespace of their own, for tensors on the CPU.
#define RED_TARGET cuda
#include <cstdio>

#include "ops.h"
#include "schemas.h"

#if defined(RED_EMULATED)
#define RED_ARCHITECTURES "emulated"

STABLE_TORCH_LIBRARY(red_kernels_emulated, library) { red::define_operators(library); }

STABLE_TORCH_LIBRARY_IMPL(red_kernels_emulated, CPU, library) { RED_IMPLEMENT_OPERATORS(library, red::cuda) }
#else
STABLE_TORCH_LIBRARY_IMPL(red_kernels, CUDA, library) { RED_IMPLEMENT_OPERATORS(library, red::cuda) }
#endif

// Writes what the kernels are compiled for into `text` (of `size` bytes): "sm_80 sm_90 sm_100 compute_100".
extern "C" __attribute__((visibility("default"))) int red_kernels_cuda_architectures(char* text, size_t size) {
  std::snprintf(text, size, "%s", RED_ARCHITECTURES);
  return 1;
}
