// The kernels for one instruction set. build.py compiles this file once for each, with its flags and its name as RED_ISA.
#include "edit_norm.h"
#include "norm_edit.h"

namespace red {
namespace RED_ISA {

extern const MixKernels mixes;  // of isa_mix.cpp

#define RED_NAME_(x) #x
#define RED_NAME(x) RED_NAME_(x)
#if defined(RED_BFLOAT16_ONLY)  // the kernels of other types are those of the set that this one adds to: see dispatch.cpp
#define RED_TYPES(kernel) {nullptr, kernel<BFloat16>, nullptr}
#define RED_NORMS(kernel) {{nullptr, nullptr}, {kernel<BFloat16, false>, kernel<BFloat16, true>}, {nullptr, nullptr}}
#else
#define RED_TYPES(kernel) {kernel<float>, kernel<BFloat16>, kernel<Float16>}
#define RED_NORMS(kernel)                              \
  {{kernel<float, false>, kernel<float, true>},        \
   {kernel<BFloat16, false>, kernel<BFloat16, true>},  \
   {kernel<Float16, false>, kernel<Float16, true>}}
#endif

extern const Kernels kernels;
const Kernels kernels = {
    RED_NAME(RED_ISA),
    RED_TYPES(edit_forward),
    RED_TYPES(edit_backward),
    RED_NORMS(edit_norm_forward),
    RED_NORMS(edit_norm_backward),
    RED_NORMS(norm_edit_forward),
    RED_NORMS(norm_edit_backward),
    &mixes,
};

}  // namespace RED_ISA
}  // namespace red
