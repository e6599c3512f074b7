#include "edit.cuh"

namespace red {
namespace cuda {

template void run_edit_forward<float>(const Launch&, bool, const EditForward&);
template void run_edit_forward<BFloat16>(const Launch&, bool, const EditForward&);
template void run_edit_forward<Float16>(const Launch&, bool, const EditForward&);
template void run_slab_backward<float>(const Launch&, bool, const SlabBackward&);
template void run_slab_backward<BFloat16>(const Launch&, bool, const SlabBackward&);
template void run_slab_backward<Float16>(const Launch&, bool, const SlabBackward&);

}  // namespace cuda
}  // namespace red
