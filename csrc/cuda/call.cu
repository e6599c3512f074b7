#include "call.h"

namespace red {
namespace cuda {

namespace {

// torch's stable sort of a vector: the values and their places.
std::array<Tensor, 2> sort(const Tensor& ids) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(ids), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION) == 0,
                  "red_kernels: torch could not sort edit_ids");
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace

ColumnSums::ColumnSums(const Call& call, const Ids& ids, int64_t edits, std::array<bool, kSums> wanted, int of_edits)
    : call_(call), edit_sums_(of_edits), edits_(edits), wanted_(wanted) {
  const int64_t d = call.shape.d;
  for (int k = 0; k < kSums; ++k) {
    if (!wanted[k]) continue;
    const bool apart = ids.tensor().has_value() && k < of_edits;
    outs_[k] = apart ? call.make_floats({edits, d}) : call.make_floats({d});
    if (call.shape.rows == 0) torch::stable::zero_(outs_[k]);
  }
  if (ids.tensor().has_value() && std::any_of(wanted.begin(), wanted.begin() + of_edits, [](bool w) { return w; }) &&
      call.shape.rows > 0) {
    auto found = sort(torch::stable::view(*ids.tensor(), {call.shape.rows}));
    sorted_ = found[0];
    order_ = found[1];
  }
}

void ColumnSums::prepare(int64_t blocks, int64_t workers, Deal& deal, float* (&lines)[kSums]) {
  const int64_t d = call_.shape.d;
  lines_count_ = blocks;
  edit_lines_count_ = edits_ + 2 * workers;
  if (sorted()) {
    owners_ = make_empty({2 * workers}, ScalarType::Long, call_.shape.like.device());
    deal_.order = static_cast<const int64_t*>(order_->const_data_ptr());
    deal_.sorted = static_cast<const int64_t*>(sorted_->const_data_ptr());
    deal_.owners = static_cast<int64_t*>(owners_->mutable_data_ptr());
    deal_.length = divide_up(call_.shape.rows, workers);
  }
  int64_t total = 0;
  const auto count = [&](int k) { return of_edits(k) ? edit_lines_count_ : lines_count_; };
  const auto direct = [&](int k) { return !of_edits(k) && lines_count_ == 1; };  // the one line is the sum
  for (int k = 0; k < kSums; ++k)
    if (wanted_[k] && !direct(k)) total += count(k) * d;
  if (total > 0) buffer_ = call_.make_floats({total});
  float* next = total > 0 ? static_cast<float*>(buffer_->mutable_data_ptr()) : nullptr;
  for (int k = 0; k < kSums; ++k) {
    lines_[k] = nullptr;
    if (!wanted_[k]) continue;
    if (direct(k)) {
      lines_[k] = static_cast<float*>(outs_[k].mutable_data_ptr());
    } else {
      lines_[k] = next;
      next += count(k) * d;
    }
  }
  deal = deal_;
  std::copy(lines_, lines_ + kSums, lines);
}

std::array<Tensor, ColumnSums::kSums> ColumnSums::finish() {
  if (call_.shape.rows == 0) return outs_;
  AddLines plain = {}, apart = {};
  int64_t plains = 0, aparts = 0;
  for (int k = 0; k < kSums; ++k) {
    if (!wanted_[k] || (!of_edits(k) && lines_count_ == 1)) continue;
    AddLines& to = of_edits(k) ? apart : plain;
    int64_t& place = of_edits(k) ? aparts : plains;
    to.lines[place] = lines_[k];
    to.out[place++] = static_cast<float*>(outs_[k].mutable_data_ptr());
  }
  for (AddLines* a : {&plain, &apart}) {
    a->d = call_.shape.d;
    a->count = lines_count_;
    a->rows = call_.shape.rows;
    a->edits = edits_;
    a->deal = deal_;
  }
  const int64_t pieces = divide_up(call_.shape.d, kSumColumns);
  const auto start = [&](const char* name, Grid grid) {
    Launch l = call_.launch(name, grid, kSumColumns, kSumLines);
    l.shared = kSumColumns * kSumLines * sizeof(float);
    l.early = true;
    return l;
  };
  if (plains > 0) run_add_lines(start("add_lines", {pieces, plains, 1}), plain);
  if (aparts > 0) run_add_edits(start("add_edits", {edits_, pieces, aparts}), apart);
  return outs_;
}

}  // namespace cuda
}  // namespace red
