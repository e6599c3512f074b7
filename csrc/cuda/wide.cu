#include "wide.cuh"

namespace red {
namespace cuda {

template void run_wide_forward<float>(const Launch&, const NormForward&);
template void run_wide_forward<BFloat16>(const Launch&, const NormForward&);
template void run_wide_forward<Float16>(const Launch&, const NormForward&);
template void run_row_averages<float>(const Launch&, const RowAverages&);
template void run_row_averages<BFloat16>(const Launch&, const RowAverages&);
template void run_row_averages<Float16>(const Launch&, const RowAverages&);

}  // namespace cuda
}  // namespace red
