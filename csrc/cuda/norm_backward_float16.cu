#include "norm_backward.cuh"

namespace red {
namespace cuda {

template void run_norm_backward<Float16>(const Launch&, int, bool, bool, const NormBackward&);

}  // namespace cuda
}  // namespace red
