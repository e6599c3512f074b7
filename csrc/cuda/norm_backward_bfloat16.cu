#include "norm_backward.cuh"

namespace red {
namespace cuda {

template Kernel<NormBackward> norm_backward_kernel<BFloat16>(const Launch&, int, bool, BackwardKind);

}  // namespace cuda
}  // namespace red
