#include "norm_forward.cuh"

namespace red {
namespace cuda {

template void run_norm_forward<Float16>(const Launch&, int, bool, ForwardKind, const NormForward&);

}  // namespace cuda
}  // namespace red
