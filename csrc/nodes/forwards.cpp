#include "forwards.h"

#include <Python.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace red {
namespace {

using torch::autograd::collect_next_edges;
using torch::autograd::compute_requires_grad;
using torch::autograd::set_history;

SavedVariable saved(const Maybe& tensor) { return SavedVariable(tensor.value_or(Tensor()), false); }
SavedVariable saved(bool needed, const Maybe& tensor) { return needed ? saved(tensor) : SavedVariable(); }

bool asks(const Maybe& tensor) { return tensor && tensor->requires_grad(); }

// The common start: below autograd, and without the GIL if others could use the time.
class Computing {
 public:
  explicit Computing(const Tensor& x) : thread_(x.numel() < kShort ? nullptr : PyEval_SaveThread()) {}
  ~Computing() {
    if (thread_ != nullptr) PyEval_RestoreThread(thread_);
  }
  Computing(const Computing&) = delete;

 private:
  static constexpr int64_t kShort = 1 << 14;  // elements that take a few microseconds
  PyThreadState* thread_;
  at::AutoDispatchBelowADInplaceOrView guard_;
};

using NormedSum = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // y, z, mean, rstd

NormedSum normed_sum(const Operators& run, const Tensor& x, const Maybe& residual, const Edit& e, const Norm& n,
                     bool keep_z) {
  Computing computing(x);
  return run.edit_norm_forward.call(x, residual, e.scale, e.bias, n.weight, n.bias, e.ids, e.seed, e.p, n.eps, n.offset,
                                    n.centered, keep_z);
}

EditNode* node_of_sum(const Operators& run, const Tensor& z, const Tensor& x, const Maybe& residual, const Edit& e) {
  if (!compute_requires_grad(x, residual, e.scale, e.bias)) return nullptr;
  auto node = make_node<EditNode>();
  node->set_next_edges(collect_next_edges(x, residual, e.scale, e.bias));
  node->operators = &run;
  node->facts = facts_of(&e, nullptr);
  node->x = saved(asks(e.scale), x);
  node->scale = saved(x.requires_grad(), e.scale);
  node->ids = saved(e.ids), node->seed = saved(e.seed);
  set_history(z, node);
  return node.get();
}

void node_of_norm(const Operators& run, EditNode* sum, const Tensor& y, const Tensor& z, const Norm& n,
                  const Tensor& mean, const Tensor& rstd) {
  if (!compute_requires_grad(z, n.weight, n.bias)) return;
  auto node = make_node<NormOfSumNode>();
  node->set_next_edges(collect_next_edges(z, n.weight, n.bias));
  node->operators = &run;
  node->facts = facts_of(nullptr, &n);
  node->z = SavedVariable(z, false), node->weight = saved(n.weight);
  node->mean = SavedVariable(mean, false), node->rstd = SavedVariable(rstd, false);
  node->sum = sum;
  set_history(y, node);
}

}  // namespace

bool fits(const Tensor& x, const Maybe& residual) {
  return x.layout() == at::kStrided &&
         (!residual || (residual->layout() == at::kStrided && residual->scalar_type() == x.scalar_type() &&
                        residual->device() == x.device() && residual->sizes() == x.sizes()));
}

Tensor edit(const Operators& run, const Tensor& x, const Maybe& residual, const Edit& e) {
  Tensor z;
  {
    Computing computing(x);
    z = run.edit_forward.call(x, residual, e.scale, e.bias, e.ids, e.seed, e.p);
  }
  node_of_sum(run, z, x, residual, e);
  return z;
}

std::tuple<Tensor, Tensor> edit_norm(const Operators& run, const Tensor& x, const Maybe& residual, const Edit& e,
                                     const Norm& n, bool need_z) {
  const auto [y, z, mean, rstd] = normed_sum(run, x, residual, e, n, need_z);
  if (compute_requires_grad(x, residual, e.scale, e.bias, n.weight, n.bias)) {
    auto node = make_node<EditNormNode>();
    node->set_next_edges(collect_next_edges(x, residual, e.scale, e.bias, n.weight, n.bias));
    node->operators = &run;
    node->facts = facts_of(&e, &n);
    set_history(y, node);
    set_history(z, node);
    const bool again = !need_z;  // without z, the backward computes the edit again from its inputs
    if (need_z) node->z = SavedVariable(z, true);
    node->x = saved(asks(e.scale) || again, x);
    node->residual = saved(again, residual);
    node->scale = saved(x.requires_grad() || again, e.scale);
    node->bias = saved(again, e.bias);
    node->weight = saved(n.weight), node->ids = saved(e.ids), node->seed = saved(e.seed);
    node->mean = SavedVariable(mean, false), node->rstd = SavedVariable(rstd, false);
  }
  return {y, z};
}

std::tuple<Tensor, Tensor> sum_norm(const Operators& run, const Tensor& x, const Maybe& residual, const Edit& e,
                                    const Norm& n) {
  const auto [y, z, mean, rstd] = normed_sum(run, x, residual, e, n, true);
  node_of_norm(run, node_of_sum(run, z, x, residual, e), y, z, n, mean, rstd);
  return {z, y};
}

Tensor norm_of_sum(const Operators& run, const Tensor& z, const Norm& n) {
  // Of the sum itself: its inputs may have been changed in place since.
  const auto [y, none, mean, rstd] = normed_sum(run, z, Maybe(), Edit(), n, false);
  node_of_norm(run, dynamic_cast<EditNode*>(z.grad_fn().get()), y, z, n, mean, rstd);
  return y;
}

Tensor norm_edit(const Operators& run, const Tensor& x, const Norm& n, const Edit& e) {
  Tensor y, mean, rstd;
  {
    Computing computing(x);
    std::tie(y, mean, rstd) =
        run.norm_edit_forward.call(x, n.weight, n.bias, e.scale, e.bias, e.ids, n.eps, n.offset, n.centered);
  }
  if (compute_requires_grad(x, n.weight, n.bias, e.scale, e.bias)) {
    auto node = make_node<NormEditNode>();
    node->set_next_edges(collect_next_edges(x, n.weight, n.bias, e.scale, e.bias));
    node->operators = &run;
    node->facts = facts_of(&e, &n);
    node->x = saved(x), node->weight = saved(n.weight), node->norm_bias = saved(asks(e.scale), n.bias);
    node->scale = saved(e.scale), node->ids = saved(e.ids);
    node->mean = SavedVariable(mean, false), node->rstd = SavedVariable(rstd, false);
    set_history(y, node);
  }
  return y;
}

}  // namespace red
