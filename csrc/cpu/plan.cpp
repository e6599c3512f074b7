#include <algorithm>

#include "dispatch.h"

namespace red {

Plan plan_chunks(int64_t rows, const int64_t* ids, int64_t edits) {
  Plan plan;
  const int64_t length = std::max<int64_t>(64, (rows + 255) / 256);
  std::vector<int64_t> ends(1, rows);  // the end of each edit's rows
  if (ids != nullptr) {
    ends.assign(edits, 0);
    for (int64_t i = 0; i < rows; ++i) ++ends[ids[i]];
    std::vector<int64_t> next(edits, 0);
    for (int64_t e = 0, before = 0; e < edits; ++e) {
      next[e] = before;
      before += ends[e];
      ends[e] = before;
    }
    plan.order.resize(rows);
    for (int64_t i = 0; i < rows; ++i) plan.order[next[ids[i]]++] = i;
  }
  const int64_t* order = ids != nullptr ? plan.order.data() : nullptr;
  int64_t begin = 0;
  for (int64_t e = 0; e < static_cast<int64_t>(ends.size()); ++e)
    for (; begin < ends[e]; begin = std::min(begin + length, ends[e]))
      plan.chunks.push_back({begin, std::min(begin + length, ends[e]), e, order});
  return plan;
}

}  // namespace red
