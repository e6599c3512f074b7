// Registration of the operators and of their CPU kernels, and the few C functions that red_kernels/backends/cpu.py
// calls through ctypes. No Python headers: one library serves every Python.
#include "ops.h"

#include <cstdio>

#include "cpu/lent.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(red_kernels, library) {
  red::define_operators(library);
}

STABLE_TORCH_LIBRARY_IMPL(red_kernels, CPU, library) {
  RED_IMPLEMENT_OPERATORS(library, red::cpu)
  RED_IMPLEMENT_MIXES(library, red::cpu)
}

#define RED_EXPORT extern "C" __attribute__((visibility("default")))

// Each writes a message or a list into `text` (of `size` bytes) and returns 0 if it is an error message.
RED_EXPORT int red_kernels_cpu_in_use(char* text, size_t size) {
  try {
    std::snprintf(text, size, "%s", red::kernels().name);
    return 1;
  } catch (const std::exception& error) {
    std::snprintf(text, size, "%s", error.what());
    return 0;
  }
}

RED_EXPORT int red_kernels_cpu_use(const char* name, char* text, size_t size) {
  try {
    red::use_kernels(name);
    return 1;
  } catch (const std::exception& error) {
    std::snprintf(text, size, "%s", error.what());
    return 0;
  }
}

RED_EXPORT int red_kernels_cpu_runnable(char* text, size_t size) {
  size_t used = 0;
  for (const char* name : red::runnable())
    if (used < size) used += std::snprintf(text + used, size - used, used ? " %s" : "%s", name);
  return 1;
}

RED_EXPORT size_t red_kernels_cpu_trim() { return red::trim(); }
RED_EXPORT size_t red_kernels_cpu_kept() { return red::kept(); }
RED_EXPORT int red_kernels_cpu_use_pool(int on) { return red::use_pool(on != 0); }

RED_EXPORT const void* red_kernels_cpu_lent() {
  static const red::Lent lent{red::kLentLayout, red::kernels, red::acquire, red::release, red::pool_in_use};
  return &lent;
}
