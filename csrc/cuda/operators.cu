// The operators on a GPU: tensors in, kernels, tensors out. Nothing here waits for the device, and every size is known from
// shapes, so that CUDA graphs can capture it.
#include "operators.h"

namespace red {
namespace cuda {

namespace {

// Both forwards with a norm.
void norm_forward(const Call& call, NormForward a) {
  a.rows = call.shape.rows;
  a.d = call.shape.d;
  a.aligned = call.aligned;
  a.cluster = 1;
  if (a.rows == 0) return;
  const RowLayout layout = call.aligned ? norm_forward_layout(a.d, call.shape.type, *call.on.device) : RowLayout{};
  if (layout) {
    a.cluster = layout.cluster;
    const bool plain = !a.edit_last && a.residual && usual_edit(a.edit) && usual_bias(a.edit) &&
                       usual_weight(call, a.weight);
    const bool there = a.z != nullptr && a.x.stride == a.d && a.residual.stride == a.d && a.weight_offset == 0.0f &&
                       (a.norm_bias.data != nullptr) == (a.mean != nullptr);
    const bool easy = plain && there && layout.cluster == 1 && exact(layout, a.d, call.shape.type);
    const ForwardKind kind = easy ? kExactForward : plain ? kPlainForward : kAnyForward;
    const int64_t blocks = layout.cluster > 1 ? a.rows * layout.cluster : divide_up(a.rows, layout.groups);
    Launch l = call.launch(kind == kExactForward ? "norm_forward_exact" : "norm_forward", {blocks}, 32 * layout.warps,
                           layout.groups);
    l.cluster = layout.cluster;
    l.shared = kGroupBytes;
    call.dispatch([&](auto type) { run_norm_forward<decltype(type)>(l, layout.n, a.mean != nullptr, kind, a); });
  } else {
    Launch l = call.launch("wide_forward", {a.rows}, wide_threads(a.d, call.shape.type));
    l.shared = kGroupBytes;
    call.dispatch([&](auto type) { run_wide_forward<decltype(type)>(l, a); });
  }
}

// The backwards in which every column is by itself.
void slab_backward(const Call& call, SlabBackward a, ColumnSums& sums) {
  const bool norm = a.averages != nullptr;
  a.rows = call.shape.rows;
  a.d = call.shape.d;
  a.aligned = call.aligned;
  a.lanes = slab_lanes(a.d, call.shape.type);
  const int64_t slots = kSlabThreads / a.lanes, slabs = divide_up(a.d, a.lanes * vector_size(call.shape.type));
  const int64_t most = blocks_of_slab(slab_blocks(norm) * int64_t{call.on.device->multiprocessors}, slabs);
  const int64_t blocks = programs(call, slots, most, sums.sorted());
  sums.prepare(blocks, blocks * slots, a.deal, a.lines);
  Launch l = call.launch(norm ? "slab_backward with a norm" : "slab_backward", {blocks, slabs}, kSlabThreads);
  l.shared = kSlabThreads * vector_size(call.shape.type) * static_cast<int64_t>(sizeof(float));
  call.dispatch([&](auto type) { run_slab_backward<decltype(type)>(l, norm, a); });
}

}  // namespace

// What kExact asks of the tensors: none is missing, and their rows lie one behind the other.
static bool all_there(const NormBackward& a) {
  for (const Rows* rows : {&a.dy, &a.dz, &a.z, &a.x})
    if (!*rows || rows->stride != a.d) return false;
  return a.dx != nullptr && a.dresidual != nullptr && a.weight_offset == 0.0f && a.rows < 1 << 30;
}

void norm_backward(const Call& call, NormBackward a, ColumnSums& sums) {
  a.rows = call.shape.rows;
  a.d = call.shape.d;
  a.aligned = call.aligned;
  const Type type = call.shape.type;
  const Device& device = *call.on.device;
  a.arrays = 0;
  for (const Rows* rows : {&a.dy, &a.dz, &a.z, &a.x, &a.residual}) a.arrays += bool(*rows);
  const bool more = usual_scale(a.edit) && usual_weight(call, a.weight) && (a.z || (a.residual && usual_bias(a.edit)));
  const bool plain = more && a.z && usual_edit(a.edit);
  BackwardKind kind = a.edit_last || sums.norm_wanted() ? kFull : plain ? kPlain : more ? kMore : kOptions;
  RowLayout layout;
  if (call.aligned && kind == kPlain && a.arrays == 4) {
    // For both kernels, so that results have the same bits wherever the rows lie.
    layout = norm_backward_layout(a.d, type, device, kExact, a.arrays);
    if (layout && all_there(a) && sums.edit_wanted()) kind = kExact;
  }
  if (call.aligned && !layout) layout = norm_backward_layout(a.d, type, device, kind, a.arrays);
  const char* name = kind == kExact ? "norm_backward_exact" : kind == kMore ? "norm_backward_more" : "norm_backward";
  Launch l = call.launch(name, {layout.cluster}, 32 * layout.warps, layout.groups);
  Kernel<NormBackward> kernel;
  int64_t most = device.multiprocessors;
  if (layout) {
    while (layout.groups > 1 && divide_up(a.rows, layout.groups) < device.multiprocessors) layout.groups /= 2;
    a.cluster = l.cluster = layout.cluster;
    a.stages = layout.stages;
    l.threads_y = layout.groups;
    l.shared = kGroupBytes + norm_backward_shared(layout, type, a.arrays);
    call.dispatch([&](auto t) { kernel = norm_backward_kernel<decltype(t)>(l, layout.n, a.mean != nullptr, kind); });
    if (layout.cluster > 1) {  // a cluster lies within one part of a GPU: fewer fit than there are multiprocessors for
      most = std::min<int64_t>(std::max<int64_t>(1, most / layout.cluster), kernel.max_clusters(l));
      if (most == 0) layout = {};
    }
  }
  if (layout) {
    const int64_t blocks = programs(call, layout.groups, most, sums.sorted());
    sums.prepare(blocks, blocks * layout.groups, a.deal, a.lines);
    l.grid.x = blocks * layout.cluster;
    kernel.start(l, a);
    return;
  }
  const Tensor averages = call.make_floats({2, a.rows});
  RowAverages row = {};
  row.rows = a.rows, row.d = a.d, row.aligned = a.aligned, row.edit_last = a.edit_last;
  row.dy = a.dy, row.z = a.z, row.x = a.x, row.residual = a.residual;
  row.edit = a.edit, row.weight = a.weight, row.weight_offset = a.weight_offset;
  row.mean = a.mean, row.rstd = a.rstd;
  row.averages = static_cast<float*>(averages.mutable_data_ptr());
  Launch first = call.launch("row_averages", {a.rows}, wide_threads(a.d, type));
  first.shared = kGroupBytes;
  call.dispatch([&](auto t) { run_row_averages<decltype(t)>(first, row); });
  SlabBackward slab = {};
  slab.edit_last = a.edit_last;
  slab.dy = a.dy, slab.dz = a.dz, slab.z = a.z, slab.x = a.x, slab.residual = a.residual;
  slab.edit = a.edit, slab.weight = a.weight, slab.norm_bias = a.norm_bias, slab.weight_offset = a.weight_offset;
  slab.mean = a.mean, slab.rstd = a.rstd, slab.averages = row.averages;
  slab.dx = a.dx, slab.dresidual = a.dresidual;
  slab_backward(call, slab, sums);
}

Tensor edit_forward(Tensor x, OptionalTensor residual, OptionalTensor scale, OptionalTensor bias,
                    OptionalTensor edit_ids, OptionalTensor seed, double dropout_p) {
  const Call call(x);
  const int64_t edits = count_edits(scale, bias);
  const Input xs(call, x, "x"), residuals(call, residual, "residual");
  const Ids ids(call, edit_ids);
  const Parameter scales(call, scale, edits, "scale"), biases(call, bias, edits, "bias");
  Tensor z = call.make_like();
  if (call.shape.rows == 0) return z;
  EditForward a = {};
  a.rows = call.shape.rows, a.d = call.shape.d, a.aligned = call.aligned;
  a.lanes = slab_lanes(a.d, call.shape.type);
  a.x = xs.rows, a.residual = residuals.rows;
  a.edit = edit_of(call, scales, biases, ids, edits, dropout_of(call, seed, dropout_p));
  a.z = data_of(z);
  const Launch l = call.launch("edit_forward",
                               {divide_up(a.rows, kSlabThreads / a.lanes * kEditRows),
                                divide_up(a.d, a.lanes * vector_size(call.shape.type))},
                               kSlabThreads);
  const bool plain = usual_edit(a.edit) && usual_bias(a.edit);
  call.dispatch([&](auto type) { run_edit_forward<decltype(type)>(l, plain, a); });
  return z;
}

std::tuple<Tensor, Tensor, Tensor> edit_backward(Tensor dz, OptionalTensor x, OptionalTensor scale,
                                                 OptionalTensor edit_ids, OptionalTensor seed, double dropout_p,
                                                 int64_t n_edits, int64_t needs) {
  const Call call(dz);
  STD_TORCH_CHECK(x.has_value() || !needed(needs, 1), "red_kernels: the gradient of scale needs x");
  if (!needed(needs, 0)) scale.reset();
  if (!needed(needs, 1)) x.reset();
  const Input dzs(call, dz, "dz"), xs(call, x, "x");
  const Ids ids(call, edit_ids);
  const Parameter scales(call, scale, n_edits, "scale"), none(call, std::nullopt, 0, "");
  Tensor dx = needed(needs, 0) ? call.make_like() : Tensor();
  ColumnSums sums(call, ids, n_edits, {needed(needs, 1), needed(needs, 2), false, false});
  if (call.shape.rows > 0) {
    SlabBackward a = {};
    a.dy = dzs.rows, a.x = xs.rows;
    a.edit = edit_of(call, scales, none, ids, n_edits, dropout_of(call, seed, dropout_p));
    a.dx = data_of(dx, needed(needs, 0));
    slab_backward(call, a, sums);
  }
  auto found = sums.finish();
  return {dx, found[0], found[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> edit_norm_forward(
    Tensor x, OptionalTensor residual, OptionalTensor scale, OptionalTensor bias, OptionalTensor weight,
    OptionalTensor norm_bias, OptionalTensor edit_ids, OptionalTensor seed, double dropout_p, double eps,
    double weight_offset, bool centered, bool keep_z) {
  const Call call(x);
  const int64_t edits = count_edits(scale, bias);
  const Input xs(call, x, "x"), residuals(call, residual, "residual");
  const Ids ids(call, edit_ids);
  const Parameter scales(call, scale, edits, "scale"), biases(call, bias, edits, "bias");
  const Parameter weights(call, weight, 1, "weight"), norm_biases(call, norm_bias, 1, "norm_bias");
  Tensor y = call.make_like(), z = keep_z ? call.make_like() : Tensor();
  Tensor mean = centered ? call.make_statistic() : Tensor(), rstd = call.make_statistic();
  NormForward a = {};
  a.x = xs.rows, a.residual = residuals.rows;
  a.edit = edit_of(call, scales, biases, ids, edits, dropout_of(call, seed, dropout_p));
  a.weight = weights.vectors, a.norm_bias = norm_biases.vectors;
  a.weight_offset = offset_of(weight_offset), a.eps = static_cast<float>(eps);
  a.y = data_of(y), a.z = data_of(z, keep_z);
  a.mean = static_cast<float*>(data_of(mean, centered)), a.rstd = static_cast<float*>(data_of(rstd));
  norm_forward(call, a);
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edit_norm_backward(
    Tensor dy, OptionalTensor dz, OptionalTensor z, OptionalTensor x, OptionalTensor residual, OptionalTensor scale,
    OptionalTensor bias, OptionalTensor weight, OptionalTensor edit_ids, OptionalTensor seed, OptionalTensor mean,
    Tensor rstd, double dropout_p, double weight_offset, int64_t n_edits, int64_t needs) {
  const Call call(dy);
  const bool again = !z.has_value();  // then z is made again from what it was made of
  STD_TORCH_CHECK(x.has_value() || (!again && !needed(needs, 2)),
                  "red_kernels: the gradient of scale needs x, and so does a z that was not kept");
  if (!again) {
    residual.reset();
    bias.reset();
    if (!needed(needs, 0)) scale.reset();
    if (!needed(needs, 2)) x.reset();
    if (!scale.has_value() && !needed(needs, 2) && !needed(needs, 3)) edit_ids.reset();
  }
  const Input dys(call, dy, "dy"), dzs(call, dz, "dz"), zs(call, z, "z"), xs(call, x, "x");
  const Input residuals(call, residual, "residual");
  const Ids ids(call, edit_ids);
  const Parameter scales(call, scale, n_edits, "scale"), biases(call, bias, n_edits, "bias");
  const Parameter weights(call, weight, 1, "weight");
  const bool need_dx = needed(needs, 0), need_dresidual = needed(needs, 1);
  Tensor dx = need_dx ? call.make_like() : Tensor(), dresidual = need_dresidual ? call.make_like() : Tensor();
  ColumnSums sums(call, ids, n_edits, {needed(needs, 2), needed(needs, 3), needed(needs, 4), needed(needs, 5)});
  if (call.shape.rows > 0) {
    NormBackward a = {};
    a.dy = dys.rows, a.dz = dzs.rows, a.z = zs.rows, a.x = xs.rows, a.residual = residuals.rows;
    a.edit = edit_of(call, scales, biases, ids, n_edits, dropout_of(call, seed, dropout_p));
    a.weight = weights.vectors, a.weight_offset = offset_of(weight_offset);
    a.mean = statistic(call, mean, "mean"), a.rstd = statistic(call, rstd, "rstd");
    a.dx = data_of(dx, need_dx), a.dresidual = data_of(dresidual, need_dresidual);
    norm_backward(call, a, sums);
  }
  auto found = sums.finish();
  return {dx, dresidual, found[0], found[1], found[2], found[3]};
}

std::tuple<Tensor, Tensor, Tensor> norm_edit_forward(Tensor x, OptionalTensor weight, OptionalTensor norm_bias,
                                                     OptionalTensor scale, OptionalTensor bias,
                                                     OptionalTensor edit_ids, double eps, double weight_offset,
                                                     bool centered) {
  const Call call(x);
  const int64_t edits = count_edits(scale, bias);
  const Input xs(call, x, "x");
  const Ids ids(call, edit_ids);
  const Parameter scales(call, scale, edits, "scale"), biases(call, bias, edits, "bias");
  const Parameter weights(call, weight, 1, "weight"), norm_biases(call, norm_bias, 1, "norm_bias");
  Tensor y = call.make_like();
  Tensor mean = centered ? call.make_statistic() : Tensor(), rstd = call.make_statistic();
  NormForward a = {};
  a.edit_last = true;
  a.x = xs.rows;
  a.edit = edit_of(call, scales, biases, ids, edits, {});
  a.weight = weights.vectors, a.norm_bias = norm_biases.vectors;
  a.weight_offset = offset_of(weight_offset), a.eps = static_cast<float>(eps);
  a.y = data_of(y);
  a.mean = static_cast<float*>(data_of(mean, centered)), a.rstd = static_cast<float*>(data_of(rstd));
  norm_forward(call, a);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_edit_backward(
    Tensor dy, Tensor x, OptionalTensor weight, OptionalTensor norm_bias, OptionalTensor scale,
    OptionalTensor edit_ids, OptionalTensor mean, Tensor rstd, double weight_offset, int64_t n_edits, int64_t needs) {
  const Call call(dy);
  const Input dys(call, dy, "dy"), xs(call, x, "x");
  const Ids ids(call, edit_ids);
  const Parameter scales(call, scale, n_edits, "scale"), none(call, std::nullopt, 0, "");
  const Parameter weights(call, weight, 1, "weight"), norm_biases(call, norm_bias, 1, "norm_bias");
  const bool need_dx = needed(needs, 0);
  Tensor dx = need_dx ? call.make_like() : Tensor();
  ColumnSums sums(call, ids, n_edits, {needed(needs, 3), needed(needs, 4), needed(needs, 1), needed(needs, 2)});
  if (call.shape.rows > 0) {
    NormBackward a = {};
    a.edit_last = true;
    a.dy = dys.rows, a.z = xs.rows;
    a.edit = edit_of(call, scales, none, ids, n_edits, {});
    a.weight = weights.vectors, a.norm_bias = norm_biases.vectors, a.weight_offset = offset_of(weight_offset);
    a.mean = statistic(call, mean, "mean"), a.rstd = statistic(call, rstd, "rstd");
    a.dx = data_of(dx, need_dx);
    norm_backward(call, a, sums);
  }
  auto found = sums.finish();
  return {dx, found[2], found[3], found[0], found[1]};
}

}  // namespace cuda
}  // namespace red
