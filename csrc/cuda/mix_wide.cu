#include "mix_wide.cuh"

namespace red {
namespace cuda {

template void run_mix_wide_forward<float>(const Launch&, const MixForward&);
template void run_mix_wide_forward<BFloat16>(const Launch&, const MixForward&);
template void run_mix_wide_forward<Float16>(const Launch&, const MixForward&);
template void run_mix_wide_backward<float>(const Launch&, const MixBackward&);
template void run_mix_wide_backward<BFloat16>(const Launch&, const MixBackward&);
template void run_mix_wide_backward<Float16>(const Launch&, const MixBackward&);

}  // namespace cuda
}  // namespace red
