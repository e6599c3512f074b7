#include "norm_forward.cuh"

namespace red {
namespace cuda {

template void run_norm_forward<float>(const Launch&, int, bool, ForwardKind, const NormForward&);

}  // namespace cuda
}  // namespace red
