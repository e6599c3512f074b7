#include "norm_backward.cuh"

namespace red {
namespace cuda {

template void run_norm_backward<Float16>(const Launch&, int, bool, BackwardKind, const NormBackward&);

}  // namespace cuda
}  // namespace red
