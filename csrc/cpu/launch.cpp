// The operators on the CPU: tensors in, kernels of the chosen instruction set over torch's threads, tensors out.
#include "columns.h"

namespace red {
namespace cpu {

bool streams(const Shape& shape, int outputs) {
  constexpr int64_t kCached = int64_t{8} << 20;
  return outputs * shape.bytes() >= kCached && shape.d % 16 == 0;
}

Tensor edit_forward(Tensor x, OptionalTensor residual, OptionalTensor scale, OptionalTensor bias,
                    OptionalTensor edit_ids, OptionalTensor seed, double dropout_p) {
  const Shape shape(x);
  const Activation xs(shape, x, "x"), residuals(shape, residual, "residual");
  const EditIds ids(shape, edit_ids, count_edits(scale, bias));
  const Vector scales(shape, scale, ids.edits(), 1.0f, 0.0f, "scale"), biases(shape, bias, ids.edits(), -0.0f, 0.0f, "bias");
  Tensor z = make_like(shape);
  const EditForward arguments{shape.d, xs.rows, residuals.rows, ids.vectors(scales), ids.vectors(biases),
                              dropout_of(seed, dropout_p), streams(shape, 1), z.mutable_data_ptr()};
  const auto kernel = kernels().edit_forward[shape.type];
  for_rows(shape, [&](int64_t begin, int64_t end, float* scratch) { kernel(arguments, begin, end, scratch); });
  return z;
}

std::tuple<Tensor, Tensor, Tensor> edit_backward(Tensor dz, OptionalTensor x, OptionalTensor scale,
                                                 OptionalTensor edit_ids, OptionalTensor seed, double dropout_p,
                                                 int64_t n_edits, int64_t needs) {
  const Shape shape(dz);
  STD_TORCH_CHECK(x.has_value() || !needed(needs, 1), "red_kernels: the gradient of scale needs x");
  const Activation dzs(shape, dz, "dz"), xs(shape, x, "x");
  const EditIds ids(shape, edit_ids, n_edits);
  const Vector scales(shape, scale, n_edits, 1.0f, 0.0f, "scale");
  Tensor dx = needed(needs, 0) ? make_like(shape) : Tensor();
  const EditBackward arguments{shape.d, dzs.rows, xs.rows, ids.vectors(scales), dropout_of(seed, dropout_p),
                               streams(shape, 1), needed(needs, 0) ? dx.mutable_data_ptr() : nullptr};
  ColumnSums sums(shape, ids);
  sums.ask(0, needed(needs, 1), true);
  sums.ask(1, needed(needs, 2), true);
  const auto kernel = kernels().edit_backward[shape.type];
  sums.run([&](const Chunk& chunk, float** sum, float* scratch) {
    kernel(arguments, chunk, {sum[0], sum[1], nullptr, nullptr}, scratch);
  });
  return {dx, sums.total(0), sums.total(1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> edit_norm_forward(
    Tensor x, OptionalTensor residual, OptionalTensor scale, OptionalTensor bias, OptionalTensor weight,
    OptionalTensor norm_bias, OptionalTensor edit_ids, OptionalTensor seed, double dropout_p, double eps,
    double weight_offset, bool centered, bool keep_z) {
  const Shape shape(x);
  const Activation xs(shape, x, "x"), residuals(shape, residual, "residual");
  const EditIds ids(shape, edit_ids, count_edits(scale, bias));
  const Vector scales(shape, scale, ids.edits(), 1.0f, 0.0f, "scale"), biases(shape, bias, ids.edits(), -0.0f, 0.0f, "bias");
  const Vector weights(shape, weight, 1, 1.0f, static_cast<float>(weight_offset), "weight");
  const Vector norm_biases(shape, norm_bias, 1, -0.0f, 0.0f, "norm_bias");
  Tensor y = make_like(shape), z = keep_z ? make_like(shape) : Tensor();
  Tensor mean = centered ? make_statistic(shape) : Tensor(), rstd = make_statistic(shape);
  const EditNormForward arguments{
      shape.d, xs.rows, residuals.rows, ids.vectors(scales), ids.vectors(biases), weights.data, norm_biases.data,
      dropout_of(seed, dropout_p), static_cast<float>(eps), streams(shape, keep_z ? 2 : 1), y.mutable_data_ptr(),
      keep_z ? z.mutable_data_ptr() : nullptr, centered ? floats(mean) : nullptr, floats(rstd)};
  const auto kernel = kernels().edit_norm_forward[shape.type][centered];
  for_rows(shape, [&](int64_t begin, int64_t end, float* scratch) { kernel(arguments, begin, end, scratch); });
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edit_norm_backward(
    Tensor dy, OptionalTensor dz, OptionalTensor z, OptionalTensor x, OptionalTensor residual, OptionalTensor scale,
    OptionalTensor bias, OptionalTensor weight, OptionalTensor edit_ids, OptionalTensor seed, OptionalTensor mean,
    Tensor rstd, double dropout_p, double weight_offset, int64_t n_edits, int64_t needs) {
  const Shape shape(dy);
  STD_TORCH_CHECK(x.has_value() || (z.has_value() && !needed(needs, 2)),
                  "red_kernels: the gradient of scale needs x, and so does a z that was not kept");
  const Activation dys(shape, dy, "dy"), dzs(shape, dz, "dz"), zs(shape, z, "z"), xs(shape, x, "x");
  const Activation residuals(shape, residual, "residual");
  const EditIds ids(shape, edit_ids, n_edits);
  const Vector scales(shape, scale, n_edits, 1.0f, 0.0f, "scale"), biases(shape, bias, n_edits, -0.0f, 0.0f, "bias");
  const Vector weights(shape, weight, 1, 1.0f, static_cast<float>(weight_offset), "weight");
  const bool need_dx = needed(needs, 0), need_dresidual = needed(needs, 1);
  Tensor dx = need_dx ? make_like(shape) : Tensor(), dresidual = need_dresidual ? make_like(shape) : Tensor();
  const EditNormBackward arguments{
      shape.d, dys.rows, dzs.rows, zs.rows, xs.rows, residuals.rows, ids.vectors(scales), ids.vectors(biases),
      weights.data, dropout_of(seed, dropout_p), streams(shape, need_dx + need_dresidual),
      statistic(shape, mean, "mean"), statistic(shape, rstd, "rstd"), need_dx ? dx.mutable_data_ptr() : nullptr,
      need_dresidual ? dresidual.mutable_data_ptr() : nullptr};
  ColumnSums sums(shape, ids);
  sums.ask(0, needed(needs, 2), true);
  sums.ask(1, needed(needs, 3), true);
  sums.ask(2, needed(needs, 4), false);
  sums.ask(3, needed(needs, 5), false);
  const auto kernel = kernels().edit_norm_backward[shape.type][mean.has_value()];
  sums.run([&](const Chunk& chunk, float** sum, float* scratch) {
    kernel(arguments, chunk, {sum[0], sum[1], sum[2], sum[3]}, scratch);
  });
  return {dx, dresidual, sums.total(0), sums.total(1), sums.total(2), sums.total(3)};
}

std::tuple<Tensor, Tensor, Tensor> norm_edit_forward(Tensor x, OptionalTensor weight, OptionalTensor norm_bias,
                                                     OptionalTensor scale, OptionalTensor bias,
                                                     OptionalTensor edit_ids, double eps, double weight_offset,
                                                     bool centered) {
  const Shape shape(x);
  const Activation xs(shape, x, "x");
  const EditIds ids(shape, edit_ids, count_edits(scale, bias));
  const Vector scales(shape, scale, ids.edits(), 1.0f, 0.0f, "scale"), biases(shape, bias, ids.edits(), -0.0f, 0.0f, "bias");
  const Vector weights(shape, weight, 1, 1.0f, static_cast<float>(weight_offset), "weight");
  const Vector norm_biases(shape, norm_bias, 1, -0.0f, 0.0f, "norm_bias");
  Tensor y = make_like(shape);
  Tensor mean = centered ? make_statistic(shape) : Tensor(), rstd = make_statistic(shape);
  const NormEditForward arguments{shape.d, xs.rows, ids.vectors(scales), ids.vectors(biases), weights.data,
                                  norm_biases.data, static_cast<float>(eps), streams(shape, 1), y.mutable_data_ptr(),
                                  centered ? floats(mean) : nullptr, floats(rstd)};
  const auto kernel = kernels().norm_edit_forward[shape.type][centered];
  for_rows(shape, [&](int64_t begin, int64_t end, float* scratch) { kernel(arguments, begin, end, scratch); });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_edit_backward(
    Tensor dy, Tensor x, OptionalTensor weight, OptionalTensor norm_bias, OptionalTensor scale,
    OptionalTensor edit_ids, OptionalTensor mean, Tensor rstd, double weight_offset, int64_t n_edits, int64_t needs) {
  const Shape shape(dy);
  const Activation dys(shape, dy, "dy"), xs(shape, x, "x");
  const EditIds ids(shape, edit_ids, n_edits);
  const Vector scales(shape, scale, n_edits, 1.0f, 0.0f, "scale");
  const Vector weights(shape, weight, 1, 1.0f, static_cast<float>(weight_offset), "weight");
  const Vector norm_biases(shape, norm_bias, 1, -0.0f, 0.0f, "norm_bias");
  Tensor dx = needed(needs, 0) ? make_like(shape) : Tensor();
  const NormEditBackward arguments{shape.d, dys.rows, xs.rows, ids.vectors(scales), weights.data, norm_biases.data,
                                   streams(shape, 1), statistic(shape, mean, "mean"), statistic(shape, rstd, "rstd"),
                                   needed(needs, 0) ? dx.mutable_data_ptr() : nullptr};
  ColumnSums sums(shape, ids);
  sums.ask(0, needed(needs, 3), true);
  sums.ask(1, needed(needs, 4), true);
  sums.ask(2, needed(needs, 1), false);
  sums.ask(3, needed(needs, 2), false);
  const auto kernel = kernels().norm_edit_backward[shape.type][mean.has_value()];
  sums.run([&](const Chunk& chunk, float** sum, float* scratch) {
    kernel(arguments, chunk, {sum[0], sum[1], sum[2], sum[3]}, scratch);
  });
  return {dx, sums.total(2), sums.total(3), sums.total(0), sums.total(1)};
}

}  // namespace cpu
}  // namespace red
