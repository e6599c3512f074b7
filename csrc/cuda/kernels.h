// The kernels as the host starts them, by the type of the activations. Defined in the .cuh of each family, compiled in the
// .cu files, one or a few types in each so that a build uses all cores.
#pragma once

#include "arguments.h"
#include "launch.h"

namespace red {
namespace cuda {

template <class T>
void run_edit_forward(const Launch& l, bool plain, const EditForward& a);
template <class T>
void run_slab_backward(const Launch& l, bool norm, const SlabBackward& a);
template <class T>
void run_norm_forward(const Launch& l, int n, bool centered, ForwardKind kind, const NormForward& a);
// The kernel with n vectors for each thread, for the cluster of the launch.
template <class T>
Kernel<NormBackward> norm_backward_kernel(const Launch& l, int n, bool centered, BackwardKind kind);
template <class T>
void run_wide_forward(const Launch& l, const NormForward& a);
template <class T>
void run_row_averages(const Launch& l, const RowAverages& a);
template <class T>
void run_mix_forward(const Launch& l, bool plain, const MixForward& a);
template <class T>
void run_mix_backward(const Launch& l, bool plain, const MixBackward& a);
template <class T>
void run_mix_wide_forward(const Launch& l, const MixForward& a);
template <class T>
void run_mix_wide_backward(const Launch& l, const MixBackward& a);
void run_add_lines(const Launch& l, const AddLines& a);
void run_add_edits(const Launch& l, const AddLines& a);

// The device, its figures read once. In the emulator: what it is set to.
const Device& device_of(int index);

}  // namespace cuda
}  // namespace red
