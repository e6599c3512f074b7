// The operations with a node of autograd for each, as in red_kernels/ops/autograd.py and handover.py.
#pragma once

#include "nodes.h"

namespace red {

// Whether a kernel can read them together; otherwise a sum is left to the caller.
bool fits(const Tensor& x, const Maybe& residual);

// The public operations; see red_kernels/backends/nodes.py.
Tensor edit(const Operators& run, const Tensor& x, const Maybe& residual, const Edit& e);
std::tuple<Tensor, Tensor> edit_norm(const Operators& run, const Tensor& x, const Maybe& residual, const Edit& e,
                                     const Norm& n, bool need_z);
std::tuple<Tensor, Tensor> sum_norm(const Operators& run, const Tensor& x, const Maybe& residual, const Edit& e,
                                    const Norm& n);
Tensor norm_of_sum(const Operators& run, const Tensor& z, const Norm& n);
Tensor norm_edit(const Operators& run, const Tensor& x, const Norm& n, const Edit& e);

}  // namespace red
