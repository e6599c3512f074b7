// The operators of mixes on a GPU; see operators.cu.
#include "operators.h"

namespace red {
namespace cuda {

namespace {

// What both directions of a mix are given.
struct Given {
  Given(const Call& call, const Tensor& first, const OptionalTensor& second, const OptionalTensor& bias,
        const OptionalTensor& edit_ids, const OptionalTensor& seed, double dropout_p, int64_t blocks, int64_t edits)
      : ids(call, edit_ids), firsts(call, first, edits, "first", true), seconds(call, second, edits, "second", true),
        biases(call, bias, edits, "bias", true),
        edit(edit_of(call, firsts, biases, ids, edits, dropout_of(call, seed, dropout_p))) {
    const int64_t d = call.shape.d;
    const bool rotation = blocks == 0 && d % (2 * kPair) == 0 && second.has_value();
    STD_TORCH_CHECK(d <= INT32_MAX && (rotation || (blocks > 0 && d % blocks == 0)),
                    "red_kernels: blocks must divide the width of x, or be 0 for a multiple of 64 and with a second");
  }

  const Ids ids;
  const Parameter firsts, seconds, biases;
  const Edit edit;
};

void forward(const Call& call, MixForward a, const Given& given, int64_t blocks) {
  a.rows = call.shape.rows, a.d = call.shape.d, a.aligned = call.aligned;
  a.edit = given.edit, a.second = given.seconds.vectors, a.blocks = blocks;
  if (a.rows == 0) return;
  const RowLayout layout = call.aligned ? mix_forward_layout(a.d, call.shape.type, blocks) : RowLayout{};
  if (layout) {
    a.lanes = layout.lanes;
    const bool plain = usual_edit(a.edit) && (a.y == nullptr || usual_weight(call, a.weight)) &&
                       mix_exact(a.d, call.shape.type, blocks, kMixForwardColumns);
    Launch l = call.launch("mix_forward", {divide_up(a.rows, layout.groups)}, 32 * layout.warps, layout.groups);
    l.shared = kMixGroupBytes;
    call.dispatch([&](auto type) { run_mix_forward<decltype(type)>(l, plain, a); });
  } else {
    Launch l = call.launch("mix_wide_forward", {a.rows}, wide_threads(a.d, call.shape.type));
    l.shared = kMixGroupBytes + 2 * kMixStretch * static_cast<int64_t>(sizeof(float));
    call.dispatch([&](auto type) { run_mix_wide_forward<decltype(type)>(l, a); });
  }
}

void backward(const Call& call, MixBackward a, const Given& given, int64_t blocks, ColumnSums& sums) {
  a.rows = call.shape.rows, a.d = call.shape.d, a.aligned = call.aligned;
  a.edit = given.edit, a.second = given.seconds.vectors, a.blocks = blocks;
  const Type type = call.shape.type;
  const Device& device = *call.on.device;
  a.arrays = 0;
  for (const Rows* rows : {&a.dy, &a.dz, &a.z, &a.x}) a.arrays += bool(*rows);
  const bool plain = usual_edit(a.edit) && (a.rstd == nullptr || usual_weight(call, a.weight)) &&
                     mix_exact(a.d, type, blocks, kMixBackwardColumns);
  RowLayout layout = call.aligned ? mix_backward_layout(a.d, type, device, blocks, plain, a.arrays) : RowLayout{};
  if (layout) {
    while (layout.groups > 1 && divide_up(a.rows, layout.groups) < device.multiprocessors) layout.groups /= 2;
    a.lanes = layout.lanes, a.stages = layout.stages;
    const int64_t workers = programs(call, layout.groups, device.multiprocessors, sums.sorted());
    sums.prepare(workers, workers * layout.groups, a.deal, a.lines);
    Launch l = call.launch("mix_backward", {workers}, 32 * layout.warps, layout.groups);
    l.shared = kGroupBytes + norm_backward_shared(layout, type, a.arrays);
    call.dispatch([&](auto t) { run_mix_backward<decltype(t)>(l, plain, a); });
  } else {
    const int64_t workers = programs(call, 1, 2 * device.multiprocessors, sums.sorted());
    sums.prepare(workers, workers, a.deal, a.lines);
    Launch l = call.launch("mix_wide_backward", {workers}, wide_threads(a.d, type));
    l.shared = kMixGroupBytes + 4 * kMixStretch * static_cast<int64_t>(sizeof(float));
    call.dispatch([&](auto t) { run_mix_wide_backward<decltype(t)>(l, a); });
  }
}

}  // namespace

Tensor mix_forward(Tensor x, OptionalTensor residual, Tensor first, OptionalTensor second, OptionalTensor bias,
                   OptionalTensor edit_ids, OptionalTensor seed, double dropout_p, int64_t blocks) {
  const Call call(x);
  const Input xs(call, x, "x"), residuals(call, residual, "residual");
  const Given given(call, first, second, bias, edit_ids, seed, dropout_p, blocks, count_edits(first, bias));
  Tensor z = call.make_like();
  MixForward a = {};
  a.x = xs.rows, a.residual = residuals.rows;
  a.z = data_of(z);
  forward(call, a, given, blocks);
  return z;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_backward(Tensor dz, OptionalTensor x, Tensor first,
                                                        OptionalTensor second, OptionalTensor edit_ids,
                                                        OptionalTensor seed, double dropout_p, int64_t blocks,
                                                        int64_t n_edits, int64_t needs) {
  const Call call(dz);
  const bool of_x = needed(needs, 1) || needed(needs, 2);
  STD_TORCH_CHECK(x.has_value() || !of_x, "red_kernels: the gradients of first and second need x");
  if (!of_x) x.reset();
  const Input dzs(call, dz, "dz"), xs(call, x, "x");
  const Given given(call, first, second, std::nullopt, edit_ids, seed, dropout_p, blocks, n_edits);
  Tensor dx = needed(needs, 0) ? call.make_like() : Tensor();
  ColumnSums sums(call, given.ids, n_edits, {needed(needs, 1), needed(needs, 2), needed(needs, 3), false}, 3);
  if (call.shape.rows > 0) {
    MixBackward a = {};
    a.dy = dzs.rows, a.x = xs.rows;
    a.dx = data_of(dx, needed(needs, 0));
    backward(call, a, given, blocks, sums);
  }
  auto found = sums.finish();
  return {dx, found[0], found[1], found[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_norm_forward(
    Tensor x, OptionalTensor residual, Tensor first, OptionalTensor second, OptionalTensor bias, OptionalTensor weight,
    OptionalTensor norm_bias, OptionalTensor edit_ids, OptionalTensor seed, double dropout_p, double eps,
    double weight_offset, bool centered, int64_t blocks) {
  const Call call(x);
  const Input xs(call, x, "x"), residuals(call, residual, "residual");
  const Given given(call, first, second, bias, edit_ids, seed, dropout_p, blocks, count_edits(first, bias));
  const Parameter weights(call, weight, 1, "weight"), norm_biases(call, norm_bias, 1, "norm_bias");
  Tensor y = call.make_like(), z = call.make_like();
  Tensor mean = centered ? call.make_statistic() : Tensor(), rstd = call.make_statistic();
  MixForward a = {};
  a.x = xs.rows, a.residual = residuals.rows;
  a.weight = weights.vectors, a.norm_bias = norm_biases.vectors;
  a.weight_offset = offset_of(weight_offset), a.eps = static_cast<float>(eps);
  a.y = data_of(y), a.z = data_of(z);
  a.mean = static_cast<float*>(data_of(mean, centered)), a.rstd = static_cast<float*>(data_of(rstd));
  forward(call, a, given, blocks);
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mix_norm_backward(
    Tensor dy, OptionalTensor dz, Tensor z, OptionalTensor x, Tensor first, OptionalTensor second,
    OptionalTensor weight, OptionalTensor edit_ids, OptionalTensor seed, OptionalTensor mean, Tensor rstd,
    double dropout_p, double weight_offset, int64_t blocks, int64_t n_edits, int64_t needs) {
  const Call call(dy);
  const bool of_x = needed(needs, 2) || needed(needs, 3);
  STD_TORCH_CHECK(x.has_value() || !of_x, "red_kernels: the gradients of first and second need x");
  if (!of_x) x.reset();
  const Input dys(call, dy, "dy"), dzs(call, dz, "dz"), zs(call, z, "z"), xs(call, x, "x");
  const Given given(call, first, second, std::nullopt, edit_ids, seed, dropout_p, blocks, n_edits);
  const Parameter weights(call, weight, 1, "weight");
  const Ids none(call, std::nullopt);
  const bool need_dx = needed(needs, 0), need_dresidual = needed(needs, 1);
  Tensor dx = need_dx ? call.make_like() : Tensor(), dresidual = need_dresidual ? call.make_like() : Tensor();
  ColumnSums sums(call, given.ids, n_edits, {needed(needs, 2), needed(needs, 3), needed(needs, 4), false}, 3);
  ColumnSums norm_sums(call, none, 1, {false, false, needed(needs, 5), needed(needs, 6)});
  if (call.shape.rows > 0) {
    MixBackward a = {};
    a.dy = dys.rows, a.dz = dzs.rows, a.z = zs.rows, a.x = xs.rows;
    a.weight = weights.vectors, a.weight_offset = offset_of(weight_offset);
    a.mean = statistic(call, mean, "mean"), a.rstd = statistic(call, rstd, "rstd");
    a.dx = data_of(dx, need_dx), a.dresidual = data_of(dresidual, need_dresidual);
    if (needs & 31) backward(call, a, given, blocks, sums);
    if (norm_sums.norm_wanted()) {
      // Seldom asked for: the norm's own kernel reads dy and z once more.
      NormBackward norm = {};
      norm.dy = a.dy, norm.z = a.z, norm.mean = a.mean, norm.rstd = a.rstd;
      norm_backward(call, norm, norm_sums);
    }
  }
  auto found = sums.finish(), of_norm = norm_sums.finish();
  return {dx, dresidual, found[0], found[1], found[2], of_norm[2], of_norm[3]};
}

}  // namespace cuda
}  // namespace red
