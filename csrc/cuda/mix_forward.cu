#include "mix_forward.cuh"

namespace red {
namespace cuda {

template void run_mix_forward<float>(const Launch&, bool, const MixForward&);
template void run_mix_forward<BFloat16>(const Launch&, bool, const MixForward&);
template void run_mix_forward<Float16>(const Launch&, bool, const MixForward&);

}  // namespace cuda
}  // namespace red
