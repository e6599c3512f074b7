#include "mix_backward.cuh"

namespace red {
namespace cuda {

template void run_mix_backward<float>(const Launch&, bool, const MixBackward&);
template void run_mix_backward<BFloat16>(const Launch&, bool, const MixBackward&);
template void run_mix_backward<Float16>(const Launch&, bool, const MixBackward&);

}  // namespace cuda
}  // namespace red
