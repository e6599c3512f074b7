#include "kernels.h"
#include "sums.cuh"

namespace red {
namespace cuda {

void run_add_lines(const Launch& l, const AddLines& a) { start<AddLines, add_lines>(l, a); }
void run_add_edits(const Launch& l, const AddLines& a) { start<AddLines, add_edits>(l, a); }

}  // namespace cuda
}  // namespace red
