// The schemas of the operators, the same on every device. red_kernels/backends/schemas.py has them for Python.
#pragma once

namespace red {

template <class Library>
void define_operators(Library& library) {
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
  library.def(
      "mix_forward(Tensor x, Tensor? residual, Tensor first, Tensor? second, Tensor? bias, Tensor? edit_ids, "
      "Tensor? seed, float dropout_p, int blocks) -> Tensor");
  library.def(
      "mix_backward(Tensor dz, Tensor? x, Tensor first, Tensor? second, Tensor? edit_ids, Tensor? seed, "
      "float dropout_p, int blocks, int n_edits, int needs) "
      "-> (Tensor dx, Tensor dfirst, Tensor dsecond, Tensor dbias)");
  library.def(
      "mix_norm_forward(Tensor x, Tensor? residual, Tensor first, Tensor? second, Tensor? bias, Tensor? weight, "
      "Tensor? norm_bias, Tensor? edit_ids, Tensor? seed, float dropout_p, float eps, float weight_offset, "
      "bool centered, int blocks) -> (Tensor y, Tensor z, Tensor mean, Tensor rstd)");
  library.def(
      "mix_norm_backward(Tensor dy, Tensor? dz, Tensor z, Tensor? x, Tensor first, Tensor? second, Tensor? weight, "
      "Tensor? edit_ids, Tensor? seed, Tensor? mean, Tensor rstd, float dropout_p, float weight_offset, int blocks, "
      "int n_edits, int needs) -> (Tensor dx, Tensor dresidual, Tensor dfirst, Tensor dsecond, Tensor dbias, "
      "Tensor dweight, Tensor dnorm_bias)");
}

// Registers the operators of a namespace for its device.
#define RED_IMPLEMENT_OPERATORS(library, where)                                    \
  library.impl("edit_forward", TORCH_BOX(&where::edit_forward));                   \
  library.impl("edit_backward", TORCH_BOX(&where::edit_backward));                 \
  library.impl("edit_norm_forward", TORCH_BOX(&where::edit_norm_forward));         \
  library.impl("edit_norm_backward", TORCH_BOX(&where::edit_norm_backward));       \
  library.impl("norm_edit_forward", TORCH_BOX(&where::norm_edit_forward));         \
  library.impl("norm_edit_backward", TORCH_BOX(&where::norm_edit_backward));

#define RED_IMPLEMENT_MIXES(library, where)                                        \
  library.impl("mix_forward", TORCH_BOX(&where::mix_forward));                     \
  library.impl("mix_backward", TORCH_BOX(&where::mix_backward));                   \
  library.impl("mix_norm_forward", TORCH_BOX(&where::mix_norm_forward));           \
  library.impl("mix_norm_backward", TORCH_BOX(&where::mix_norm_backward));

}  // namespace red
