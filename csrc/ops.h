// The operators, as declared in every library that implements them. Shapes, dtypes and results: see the functions of
// the same names in red_kernels/backends/reference.py. Results that were not requested are undefined tensors (None in
// Python).
#pragma once

// The library of autograd's nodes compiles them for its own tensors, and bypasses torch's dispatcher.
#if defined(RED_ATEN)
#include "aten.h"
#else
#include "stable.h"
#endif

#include <optional>
#include <tuple>

// The namespace of the implementation: that of the device.
#if !defined(RED_TARGET)
#define RED_TARGET cpu
#endif

namespace red {

using OptionalTensor = std::optional<Tensor>;

// `needs` has a bit for each result, the first result lowest.
constexpr bool needed(int64_t needs, int result) { return (needs >> result) & 1; }

namespace RED_TARGET {

Tensor edit_forward(Tensor x, OptionalTensor residual, OptionalTensor scale, OptionalTensor bias,
                    OptionalTensor edit_ids, OptionalTensor seed, double dropout_p);

std::tuple<Tensor, Tensor, Tensor> edit_backward(Tensor dz, OptionalTensor x, OptionalTensor scale,
                                                 OptionalTensor edit_ids, OptionalTensor seed, double dropout_p,
                                                 int64_t n_edits, int64_t needs);

std::tuple<Tensor, Tensor, Tensor, Tensor> edit_norm_forward(
    Tensor x, OptionalTensor residual, OptionalTensor scale, OptionalTensor bias, OptionalTensor weight,
    OptionalTensor norm_bias, OptionalTensor edit_ids, OptionalTensor seed, double dropout_p, double eps,
    double weight_offset, bool centered, bool keep_z);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edit_norm_backward(
    Tensor dy, OptionalTensor dz, OptionalTensor z, OptionalTensor x, OptionalTensor residual, OptionalTensor scale,
    OptionalTensor bias, OptionalTensor weight, OptionalTensor edit_ids, OptionalTensor seed, OptionalTensor mean,
    Tensor rstd, double dropout_p, double weight_offset, int64_t n_edits, int64_t needs);

std::tuple<Tensor, Tensor, Tensor> norm_edit_forward(Tensor x, OptionalTensor weight, OptionalTensor norm_bias,
                                                     OptionalTensor scale, OptionalTensor bias,
                                                     OptionalTensor edit_ids, double eps, double weight_offset,
                                                     bool centered);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_edit_backward(
    Tensor dy, Tensor x, OptionalTensor weight, OptionalTensor norm_bias, OptionalTensor scale,
    OptionalTensor edit_ids, OptionalTensor mean, Tensor rstd, double weight_offset, int64_t n_edits, int64_t needs);

// Mixes: rotations of pairs of columns (blocks = 0), or reflections of this number of blocks of columns.
Tensor mix_forward(Tensor x, OptionalTensor residual, Tensor first, OptionalTensor second, OptionalTensor bias,
                   OptionalTensor edit_ids, OptionalTensor seed, double dropout_p, int64_t blocks);

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_backward(Tensor dz, OptionalTensor x, Tensor first,
                                                        OptionalTensor second, OptionalTensor edit_ids,
                                                        OptionalTensor seed, double dropout_p, int64_t blocks,
                                                        int64_t n_edits, int64_t needs);

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_norm_forward(
    Tensor x, OptionalTensor residual, Tensor first, OptionalTensor second, OptionalTensor bias, OptionalTensor weight,
    OptionalTensor norm_bias, OptionalTensor edit_ids, OptionalTensor seed, double dropout_p, double eps,
    double weight_offset, bool centered, int64_t blocks);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mix_norm_backward(
    Tensor dy, OptionalTensor dz, Tensor z, OptionalTensor x, Tensor first, OptionalTensor second,
    OptionalTensor weight, OptionalTensor edit_ids, OptionalTensor seed, OptionalTensor mean, Tensor rstd,
    double dropout_p, double weight_offset, int64_t blocks, int64_t n_edits, int64_t needs);

}  // namespace RED_TARGET
}  // namespace red
