// Registration of the operators and of their CPU kernels, and the few C functions that red_kernels/backends/native.py
// calls through ctypes. No Python headers: one library serves every Python.
#include "ops.h"

#include <cstdio>

#include "cpu/dispatch.h"
#include "cpu/memory.h"

STABLE_TORCH_LIBRARY(red_kernels, library) {
  library.def(
      "edit_forward(Tensor x, Tensor? residual, Tensor? scale, Tensor? bias, Tensor? edit_ids, Tensor? seed, "
      "float dropout_p) -> Tensor");
  library.def(
      "edit_backward(Tensor dz, Tensor? x, Tensor? scale, Tensor? edit_ids, Tensor? seed, float dropout_p, "
      "int n_edits, int needs) -> (Tensor dx, Tensor dscale, Tensor dbias)");
  library.def(
      "edit_norm_forward(Tensor x, Tensor? residual, Tensor? scale, Tensor? bias, Tensor? weight, Tensor? norm_bias, "
      "Tensor? edit_ids, Tensor? seed, float dropout_p, float eps, float weight_offset, bool centered, bool keep_z) "
      "-> (Tensor y, Tensor z, Tensor mean, Tensor rstd)");
  library.def(
      "edit_norm_backward(Tensor dy, Tensor? dz, Tensor? z, Tensor? x, Tensor? residual, Tensor? scale, Tensor? bias, "
      "Tensor? weight, Tensor? edit_ids, Tensor? seed, Tensor? mean, Tensor rstd, float dropout_p, "
      "float weight_offset, int n_edits, int needs) "
      "-> (Tensor dx, Tensor dresidual, Tensor dscale, Tensor dbias, Tensor dweight, Tensor dnorm_bias)");
  library.def(
      "norm_edit_forward(Tensor x, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor? bias, Tensor? edit_ids, "
      "float eps, float weight_offset, bool centered) -> (Tensor y, Tensor mean, Tensor rstd)");
  library.def(
      "norm_edit_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? norm_bias, Tensor? scale, Tensor? edit_ids, "
      "Tensor? mean, Tensor rstd, float weight_offset, int n_edits, int needs) "
      "-> (Tensor dx, Tensor dweight, Tensor dnorm_bias, Tensor dscale, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(red_kernels, CPU, library) {
  library.impl("edit_forward", TORCH_BOX(&red::cpu::edit_forward));
  library.impl("edit_backward", TORCH_BOX(&red::cpu::edit_backward));
  library.impl("edit_norm_forward", TORCH_BOX(&red::cpu::edit_norm_forward));
  library.impl("edit_norm_backward", TORCH_BOX(&red::cpu::edit_norm_backward));
  library.impl("norm_edit_forward", TORCH_BOX(&red::cpu::norm_edit_forward));
  library.impl("norm_edit_backward", TORCH_BOX(&red::cpu::norm_edit_backward));
}

#define RED_EXPORT extern "C" __attribute__((visibility("default")))

// Each writes a message or a list into `text` (of `size` bytes) and returns 0 where it is an error message.
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
