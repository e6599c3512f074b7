// The operators of mixes on the CPU, as in launch.cpp.
#include "columns.h"

namespace red {
namespace cpu {
namespace {

// The arguments of a mix beyond an edit's: its second vector, and its blocks.
class Mixing {
 public:
  Mixing(const Shape& shape, const EditIds& ids, const OptionalTensor& second, int64_t blocks)
      : blocks(blocks), values_(shape, second, ids.edits(), 0.0f, 0.0f, "second") {
    STD_TORCH_CHECK(blocks >= 0 && shape.d % (blocks > 0 ? blocks : 64) == 0, "red_kernels: blocks is ", blocks,
                    ", and the width of x no multiple of ", blocks > 0 ? blocks : 64);
    STD_TORCH_CHECK(blocks > 0 || second.has_value(), "red_kernels: a rotation needs second");
    if (second.has_value()) this->second = ids.vectors(values_);
    // Blocks are swept separately, and stores past the cache need register bounds in all of them.
    aligned_ = blocks == 0 || shape.d / blocks % 16 == 0;
  }
  bool streams(const Shape& shape, int outputs) const { return aligned_ && cpu::streams(shape, outputs); }

  Vectors second;
  int64_t blocks;

 private:
  Vector values_;
  bool aligned_;
};

// A bias that is absent costs nothing.
Vectors added(const OptionalTensor& bias, const EditIds& ids, const Vector& values) {
  return bias.has_value() ? ids.vectors(values) : Vectors();
}

}  // namespace

Tensor mix_forward(Tensor x, OptionalTensor residual, Tensor first, OptionalTensor second, OptionalTensor bias,
                   OptionalTensor edit_ids, OptionalTensor seed, double dropout_p, int64_t blocks) {
  const Shape shape(x);
  const Activation xs(shape, x, "x"), residuals(shape, residual, "residual");
  const EditIds ids(shape, edit_ids, count_edits(first, bias));
  const Vector firsts(shape, first, ids.edits(), 1.0f, 0.0f, "first");
  const Vector biases(shape, bias, ids.edits(), -0.0f, 0.0f, "bias");
  const Mixing mix(shape, ids, second, blocks);
  Tensor z = make_like(shape);
  const MixForward arguments{{shape.d, xs.rows, residuals.rows, ids.vectors(firsts), added(bias, ids, biases),
                              dropout_of(seed, dropout_p), mix.streams(shape, 1), z.mutable_data_ptr()},
                             mix.second, mix.blocks};
  const auto kernel = kernels().mixes->forward[shape.type];
  for_rows(shape, [&](int64_t begin, int64_t end, float* scratch) { kernel(arguments, begin, end, scratch); });
  return z;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_backward(Tensor dz, OptionalTensor x, Tensor first,
                                                        OptionalTensor second, OptionalTensor edit_ids,
                                                        OptionalTensor seed, double dropout_p, int64_t blocks,
                                                        int64_t n_edits, int64_t needs) {
  const Shape shape(dz);
  STD_TORCH_CHECK(x.has_value() || !(needed(needs, 1) || needed(needs, 2)),
                  "red_kernels: the gradients of first and second need x");
  const Activation dzs(shape, dz, "dz"), xs(shape, x, "x");
  const EditIds ids(shape, edit_ids, n_edits);
  const Vector firsts(shape, first, n_edits, 1.0f, 0.0f, "first");
  const Mixing mix(shape, ids, second, blocks);
  STD_TORCH_CHECK(second.has_value() || !needed(needs, 2), "red_kernels: no second, and its gradient is asked for");
  Tensor dx = needed(needs, 0) ? make_like(shape) : Tensor();
  const MixBackward arguments{{shape.d, dzs.rows, xs.rows, ids.vectors(firsts), dropout_of(seed, dropout_p),
                               mix.streams(shape, 1), needed(needs, 0) ? dx.mutable_data_ptr() : nullptr},
                              mix.second, mix.blocks};
  ColumnSums sums(shape, ids);
  for (int k = 0; k < 3; ++k) sums.ask(k, needed(needs, 1 + k), true);
  const auto kernel = kernels().mixes->backward[shape.type];
  sums.run([&](const Chunk& chunk, float** sum, float* scratch) {
    kernel(arguments, chunk, {sum[0], sum[2], nullptr, nullptr, sum[1]}, scratch);
  });
  return {dx, sums.total(0), sums.total(1), sums.total(2)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mix_norm_forward(
    Tensor x, OptionalTensor residual, Tensor first, OptionalTensor second, OptionalTensor bias, OptionalTensor weight,
    OptionalTensor norm_bias, OptionalTensor edit_ids, OptionalTensor seed, double dropout_p, double eps,
    double weight_offset, bool centered, int64_t blocks) {
  const Shape shape(x);
  const Activation xs(shape, x, "x"), residuals(shape, residual, "residual");
  const EditIds ids(shape, edit_ids, count_edits(first, bias));
  const Vector firsts(shape, first, ids.edits(), 1.0f, 0.0f, "first");
  const Vector biases(shape, bias, ids.edits(), -0.0f, 0.0f, "bias");
  const Mixing mix(shape, ids, second, blocks);
  const Vector weights(shape, weight, 1, 1.0f, static_cast<float>(weight_offset), "weight");
  const Vector norm_biases(shape, norm_bias, 1, -0.0f, 0.0f, "norm_bias");
  Tensor y = make_like(shape), z = make_like(shape);
  Tensor mean = centered ? make_statistic(shape) : Tensor(), rstd = make_statistic(shape);
  const MixNormForward arguments{
      {shape.d, xs.rows, residuals.rows, ids.vectors(firsts), added(bias, ids, biases), weights.data, norm_biases.data,
       dropout_of(seed, dropout_p), static_cast<float>(eps), mix.streams(shape, 2), y.mutable_data_ptr(),
       z.mutable_data_ptr(), centered ? floats(mean) : nullptr, floats(rstd)},
      mix.second, mix.blocks};
  const auto kernel = kernels().mixes->norm_forward[shape.type][centered];
  for_rows(shape, [&](int64_t begin, int64_t end, float* scratch) { kernel(arguments, begin, end, scratch); });
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mix_norm_backward(
    Tensor dy, OptionalTensor dz, Tensor z, OptionalTensor x, Tensor first, OptionalTensor second,
    OptionalTensor weight, OptionalTensor edit_ids, OptionalTensor seed, OptionalTensor mean, Tensor rstd,
    double dropout_p, double weight_offset, int64_t blocks, int64_t n_edits, int64_t needs) {
  const Shape shape(dy);
  STD_TORCH_CHECK(x.has_value() || !(needed(needs, 2) || needed(needs, 3)),
                  "red_kernels: the gradients of first and second need x");
  const Activation dys(shape, dy, "dy"), dzs(shape, dz, "dz"), zs(shape, z, "z"), xs(shape, x, "x");
  const EditIds ids(shape, edit_ids, n_edits);
  const Vector firsts(shape, first, n_edits, 1.0f, 0.0f, "first");
  const Mixing mix(shape, ids, second, blocks);
  STD_TORCH_CHECK(second.has_value() || !needed(needs, 3), "red_kernels: no second, and its gradient is asked for");
  const Vector weights(shape, weight, 1, 1.0f, static_cast<float>(weight_offset), "weight");
  const bool need_dx = needed(needs, 0), need_dresidual = needed(needs, 1);
  Tensor dx = need_dx ? make_like(shape) : Tensor(), dresidual = need_dresidual ? make_like(shape) : Tensor();
  const MixNormBackward arguments{
      {shape.d, dys.rows, dzs.rows, zs.rows, xs.rows, {}, ids.vectors(firsts), {}, weights.data,
       dropout_of(seed, dropout_p), mix.streams(shape, need_dx + need_dresidual), statistic(shape, mean, "mean"),
       statistic(shape, rstd, "rstd"), need_dx ? dx.mutable_data_ptr() : nullptr,
       need_dresidual ? dresidual.mutable_data_ptr() : nullptr},
      mix.second, mix.blocks};
  ColumnSums sums(shape, ids);
  for (int k = 0; k < 5; ++k) sums.ask(k, needed(needs, 2 + k), k < 3);
  const auto kernel = kernels().mixes->norm_backward[shape.type][mean.has_value()];
  sums.run([&](const Chunk& chunk, float** sum, float* scratch) {
    kernel(arguments, chunk, {sum[0], sum[2], sum[3], sum[4], sum[1]}, scratch);
  });
  return {dx, dresidual, sums.total(0), sums.total(1), sums.total(2), sums.total(3), sums.total(4)};
}

}  // namespace cpu
}  // namespace red
