// Mixes for every other row: wide ones, blocks of columns that do not begin on 16 bytes, and many blocks. Element by
// element, as blocks may begin anywhere. A row is one block of threads, which goes over it several times, mostly
// through the cache. The sums over so many blocks of columns as fit into shared memory are made together.
#pragma once

#include "mix.cuh"
#include "sorted.h"

namespace red {
namespace cuda {

template <class T>
RED_DEVICE float element(const T* row, int64_t column) {
  return widen(row[column]);
}
template <class T>
RED_DEVICE void store_element(void* data, int64_t at, float v) {
  if constexpr (sizeof(T) == 4)
    static_cast<T*>(data)[at] = v;
  else
    static_cast<T*>(data)[at] = T{static_cast<uint16_t>(narrow_two(v, 0.0f, T{}) & 0xffffu)};
}
template <class T>
RED_DEVICE float element_of(const Vectors& vectors, int64_t at) {
  return vectors.wide ? static_cast<const float*>(vectors.data)[at] : widen(static_cast<const T*>(vectors.data)[at]);
}
RED_DEVICE float wide_element(const Vectors& vectors, int64_t at) {
  return static_cast<const float*>(vectors.data)[at];
}
RED_DEVICE float drop_element(const Dropout& dropout, int64_t seed, int64_t row, int64_t column, float v) {
  const Words words = philox(seed, row, static_cast<uint32_t>(column / 4));
  const uint32_t low = column & 1 ? words.w[1] : words.w[0], high = column & 1 ? words.w[3] : words.w[2];
  return product(v, dropped(column & 2 ? high : low, dropout.threshold, dropout.factor));
}

// Calls `mixed` for each column of a row, with the sums of its block of columns over the K values that `terms` makes
// for each column. A thread has the same columns in every row. `dots` holds K values for each of kMixStretch blocks.
template <int K, class Terms, class Mixed>
RED_DEVICE void by_stretches(MixGroup<1>& group, int64_t d, int64_t blocks, float* dots, const Terms& terms,
                             const Mixed& mixed) {
  const int64_t width = d / blocks;
  int lanes = 1;  // for each block of columns, where they are narrow
  while (lanes < kWarp && lanes < width) lanes *= 2;
  for (int64_t first = 0; first < blocks; first += kMixStretch) {
    const int64_t start = first * width;
    const int count = static_cast<int>(blocks - first < kMixStretch ? blocks - first : kMixStretch);
    const auto add = [&](int block, int64_t column, int64_t step, float (&v)[K]) {
      while (column < width) {
        float part[K] = {};  // a sum of a few at a time loses fewer digits
        for (int i = 0; i < 8 && column < width; ++i, column += step) {
          float more[K];
          terms(start + block * width + column, more);
          RED_UNROLL for (int k = 0; k < K; ++k) part[k] += more[k];
        }
        RED_UNROLL for (int k = 0; k < K; ++k) v[k] += part[k];
      }
    };
    if (width > 2 * kWideThreads) {
      for (int block = 0; block < count; ++block) {
        float v[K] = {};
        add(block, group.thread, group.threads, v);
        group.sum(v);
        if (group.thread == 0)
          RED_UNROLL for (int k = 0; k < K; ++k) dots[block * K + k] = v[k];
      }
    } else {
      const int teams = group.threads / lanes;
      for (int round = 0; round < count; round += teams) {  // all threads of a warp come to the sum
        const int block = round + group.thread / lanes;
        float v[K] = {};
        if (block < count) add(block, group.thread % lanes, lanes, v);
        part_sum(v, lanes);
        if (block < count && group.thread % lanes == 0)
          RED_UNROLL for (int k = 0; k < K; ++k) dots[block * K + k] = v[k];
      }
    }
    block_barrier();
    for (int64_t at = group.thread; at < count * width; at += group.threads)
      mixed(start + at, dots + static_cast<uint32_t>(at) / static_cast<uint32_t>(width) * K);
    block_barrier();  // before the next stretch has its own sums there, and other threads read what was stored
  }
}

template <class T>
RED_KERNEL(kWideThreads, 2) mix_wide_forward(RED_ARGUMENT MixForward a) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  MixGroup<1> group(0, shared);
  const int64_t row = blockIdx.x, seed = dropout_seed(a.edit), d = a.d;
  const RowEdit own(a.edit, edit_id(a.edit, row));
  const T *x = row_of<T>(a.x, row), *residual = a.residual ? row_of<T>(a.residual, row) : nullptr;
  const bool two = a.second.data != nullptr;

  const auto finish = [&](int64_t c, float v) {
    if (a.edit.bias.data != nullptr) v += wide_element(a.edit.bias, own.offset + c);
    if (!own.known) v = not_a_number();
    if (a.edit.dropout.seed != nullptr) v = drop_element(a.edit.dropout, seed, row, c, v);
    if (residual != nullptr) v = element(residual, c) + v;
    store_element<T>(a.z, row * d + c, v);
  };
  if (a.blocks == 0) {
    for (int64_t c = group.thread; c < d; c += group.threads) {
      const float one = product(element(x, c), wide_element(a.edit.scale, own.offset + c));
      finish(c, multiply_add(element(x, c ^ kPair), wide_element(a.second, own.offset + c), one));
    }
    block_barrier();
  } else {
    by_stretches<2>(
        group, d, a.blocks, shared + kMixGroupBytes / sizeof(float),
        [&](int64_t c, float (&v)[2]) {
          const float h = element(x, c);
          v[0] = wide_element(a.edit.scale, own.offset + c) * h;
          v[1] = two ? wide_element(a.second, own.offset + c) * h : 0.0f;
        },
        [&](int64_t c, const float* dots) {
          float v = multiply_add(-wide_element(a.edit.scale, own.offset + c), dots[0], element(x, c));
          if (two) v = multiply_add(wide_element(a.second, own.offset + c), dots[1], v);
          finish(c, v);
        });
  }
  if (a.y == nullptr) return;

  // As in wide_forward.
  const T* z = static_cast<const T*>(a.z) + row * d;
  const bool centered = a.mean != nullptr;
  const float width = static_cast<float>(d), origin = centered ? element(z, 0) : 0.0f;
  float s[1] = {0.0f};
  for (int64_t c = group.thread; c < d; c += group.threads) {
    const float v = element(z, c);
    s[0] += centered ? half_distance(v, origin, 1.0f / width) : v * v;
  }
  group.sum(s);
  float mean = 0.0f, variance = s[0] / width;
  if (centered) {
    const float middle = mean_from(origin, s[0]);
    float spread[2] = {0.0f, 0.0f};
    for (int64_t c = group.thread; c < d; c += group.threads) {
      const float away = element(z, c) - middle;
      spread[0] += away;
      spread[1] += away * away;
    }
    group.sum(spread);
    const Moments found = moments(middle, spread[0], spread[1], width);
    mean = found.mean;
    variance = found.variance;
  }
  const float rstd = reciprocal_root(variance + a.eps);
  if (group.first()) {
    if (centered) a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
  for (int64_t c = group.thread; c < d; c += group.threads) {
    const float w = a.weight.data != nullptr ? element_of<T>(a.weight, c) + a.weight_offset : 1.0f;
    const float b = a.norm_bias.data != nullptr ? element_of<T>(a.norm_bias, c) : -0.0f;
    store_element<T>(a.y, row * d + c, affine((element(z, c) - mean) * rstd, w, b));
  }
}

// A block takes one row after the other, and adds to its lines of column sums in memory.
template <class T>
RED_KERNEL(kWideThreads, 2) mix_wide_backward(RED_ARGUMENT MixBackward a) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  MixGroup<1> group(0, shared);
  const int64_t seed = dropout_seed(a.edit), d = a.d, worker = blockIdx.x;
  const bool norm = a.rstd != nullptr, two = a.second.data != nullptr, sorted = a.deal.order != nullptr;
  Places<true> places(a.deal, a.rows, worker, gridDim.x);
  Current current(a.deal, sorted, places, worker, a.edit.edits);
  const int64_t last = sorted && places.more() ? a.deal.sorted[places.end - 1] : -1;
  bool fresh = true;  // the lines hold nothing yet
  for (; places.more(); places.advance(), fresh = false) {
    const int64_t row = places.row(), id = sorted ? a.deal.sorted[places.place] : edit_id(a.edit, row);
    if (sorted && id != current.id) {
      current.next(id);
      fresh = true;
    }
    const int64_t line = !sorted ? worker : id == last ? current.last_line() : current.line();
    const RowEdit own(a.edit, id);
    const T *dy = row_of<T>(a.dy, row), *x = a.x ? row_of<T>(a.x, row) : nullptr;
    const T *z = norm ? row_of<T>(a.z, row) : nullptr, *dz = a.dz ? row_of<T>(a.dz, row) : nullptr;
    const float rstd = norm ? a.rstd[row] : 1.0f, mean = a.mean != nullptr ? a.mean[row] : 0.0f;
    const auto terms = [&](int64_t c, float& normed, float& weighted) {
      const float w = a.weight.data != nullptr ? element_of<T>(a.weight, c) + a.weight_offset : 1.0f;
      normed = (element(z, c) - mean) * rstd;
      weighted = product(element(dy, c), w);
    };
    float s[2] = {0.0f, 0.0f};
    if (norm) {
      for (int64_t c = group.thread; c < d; c += group.threads) {
        float normed, weighted;
        terms(c, normed, weighted);
        s[0] += normed * weighted;
        s[1] += weighted;
      }
      group.sum(s);
    }
    const float c1 = s[0] / static_cast<float>(d), c2 = a.mean != nullptr ? s[1] / static_cast<float>(d) : 0.0f;
    // The gradient of z, and that behind the dropout.
    const auto before = [&](int64_t c) {
      if (!norm) return element(dy, c);
      float normed, weighted;
      terms(c, normed, weighted);
      const float g = norm_gradient(normed, weighted, rstd, c1, c2);
      return dz != nullptr ? g + element(dz, c) : g;
    };
    const auto behind = [&](int64_t c, float g) {
      return a.edit.dropout.seed != nullptr ? drop_element(a.edit.dropout, seed, row, c, g) : g;
    };
    const auto finish = [&](int64_t c, float total, float dx, float dfirst, float dsecond, float dbias) {
      if (a.dresidual != nullptr) store_element<T>(a.dresidual, row * d + c, total);
      if (a.dx != nullptr) store_element<T>(a.dx, row * d + c, own.known ? dx : not_a_number());
      const float values[3] = {dfirst, dsecond, dbias};
      RED_UNROLL for (int k = 0; k < 3; ++k) {
        if (a.lines[k] == nullptr || line < 0) continue;
        float* to = a.lines[k] + line * d + c;
        *to = fresh ? values[k] : *to + values[k];
      }
    };
    if (a.blocks == 0) {
      for (int64_t c = group.thread; c < d; c += group.threads) {
        const int64_t other = c ^ kPair;
        const float total = before(c), g = behind(c, total);
        float dx = 0.0f;
        if (a.dx != nullptr) {
          dx = product(g, wide_element(a.edit.scale, own.offset + c));
          dx = multiply_add(behind(other, before(other)), wide_element(a.second, own.offset + other), dx);
        }
        finish(c, total, dx, x != nullptr ? g * element(x, c) : 0.0f, x != nullptr ? g * element(x, other) : 0.0f, g);
      }
      continue;
    }
    // first . x and second . x, and these of g.
    by_stretches<4>(
        group, d, a.blocks, shared + kMixGroupBytes / sizeof(float),
        [&](int64_t c, float (&v)[4]) {
          const float u = wide_element(a.edit.scale, own.offset + c);
          const float w = two ? wide_element(a.second, own.offset + c) : 0.0f;
          const float h = x != nullptr ? element(x, c) : 0.0f, g = behind(c, before(c));
          v[0] = u * h, v[1] = w * h, v[2] = u * g, v[3] = w * g;
        },
        [&](int64_t c, const float* dots) {
          const float total = before(c), g = behind(c, total), h = x != nullptr ? element(x, c) : 0.0f;
          float dx = multiply_add(-wide_element(a.edit.scale, own.offset + c), dots[2], g);
          if (two) dx = multiply_add(wide_element(a.second, own.offset + c), dots[3], dx);
          finish(c, total, dx, -(dots[0] * g + dots[2] * h), dots[1] * g + dots[3] * h, g);
        });
  }
  if (sorted && group.thread == 0) current.store(a.deal.owners);
}

template <class T>
void run_mix_wide_forward(const Launch& l, const MixForward& a) {
  start<MixForward, mix_wide_forward<T>>(l, a);
}

template <class T>
void run_mix_wide_backward(const Launch& l, const MixBackward& a) {
  start<MixBackward, mix_wide_backward<T>>(l, a);
}

}  // namespace cuda
}  // namespace red
