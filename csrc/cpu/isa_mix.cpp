// The kernels of mixes for one instruction set, compiled like isa.cpp.
#include "mix_norm.h"

namespace red {
namespace RED_ISA {

#if defined(RED_BFLOAT16_ONLY)  // see isa.cpp
#define RED_TYPES(kernel) {nullptr, kernel<BFloat16>, nullptr}
#define RED_NORMS(kernel) {{nullptr, nullptr}, {kernel<BFloat16, false>, kernel<BFloat16, true>}, {nullptr, nullptr}}
#else
#define RED_TYPES(kernel) {kernel<float>, kernel<BFloat16>, kernel<Float16>}
#define RED_NORMS(kernel)                              \
  {{kernel<float, false>, kernel<float, true>},        \
   {kernel<BFloat16, false>, kernel<BFloat16, true>},  \
   {kernel<Float16, false>, kernel<Float16, true>}}
#endif

extern const MixKernels mixes;
const MixKernels mixes = {
    RED_TYPES(mix_forward),
    RED_TYPES(mix_backward),
    RED_NORMS(mix_norm_forward),
    RED_NORMS(mix_norm_backward),
};

}  // namespace RED_ISA
}  // namespace red
