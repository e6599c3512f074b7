// The choice of an instruction set at run time, and the splitting of work that does not depend on it.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace red {

// The kernels in use: the best set of this processor, or that of RED_KERNELS_CPU. Throws std::runtime_error if that
// names no set that this processor can run.
const Kernels& kernels();
// Uses the instruction set of that name (null: the automatic choice). Throws as above, without changes.
void use_kernels(const char* name);
// The names of the compiled instruction sets that this processor can run, best last.
std::vector<const char*> runnable();

// Rows in runs for the column sums: at most 256 runs of at least 64 rows. With ids (int64, one for each row, checked to
// lie in [0, edits)) the rows are first sorted by id, so that no run mixes edits.
struct Plan {
  std::vector<int64_t> order;
  std::vector<Chunk> chunks;
};
Plan plan_chunks(int64_t rows, const int64_t* ids, int64_t edits);

}  // namespace red
