// Column sums over all rows, for the gradients of vectors: each chunk adds up its own, and the chunks are added in
// order. Sums of few rows, then sums of those, then fp64: a plain fp32 sum of 64 rows loses more digits than eager
// PyTorch does.
#pragma once

#include "tensors.h"

namespace red {
namespace cpu {

class ColumnSums {
 public:
  // `asked[k]` and `of_edits[k]`: whether the k-th sum is requested, and whether it is separate for each edit.
  static constexpr int kSums = 5;
  static constexpr int64_t kRows = 16;  // rows added up in one chain

  ColumnSums(const Shape& shape, const EditIds& ids) : shape_(shape), edits_(ids.edits()), sorted_(ids.data != nullptr),
                                                       plan_(plan_chunks(shape.rows, ids.data, ids.edits())) {}

  // Requests the k-th sum; with `of_edits` it is separate for each edit.
  void ask(int k, bool wanted, bool of_edits) {
    if (wanted) place_[k] = count_++;
    of_edits_[k] = of_edits && sorted_;
  }

  // Runs body(chunk, sums, scratch) for every chunk, where sums[k] is the chunk's own row of zeros or null.
  template <class Body>
  void run(const Body& body) {
    const int64_t d = shape_.d, width = padded(d);
    const int64_t chunks = static_cast<int64_t>(plan_.chunks.size()), lines = chunks * count_ * width;
    partial_ = make({&lines, 1}, ScalarType::Float, 4);
    const int64_t grain = std::max<int64_t>(1, 16384 / d / 64);
    in_parallel(chunks, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(scratch_floats(d) + 16), block(count_ * width + 16);
      float* few = align(block.data());
      for (int64_t c = begin; c < end; ++c) {
        const Chunk& chunk = plan_.chunks[c];
        float* total = partial(c, 0);
        std::fill(total, total + count_ * width, 0.0f);
        for (int64_t k = chunk.begin; k < chunk.end; k += kRows) {
          std::fill(few, few + count_ * width, 0.0f);
          float* sums[kSums];
          for (int s = 0; s < kSums; ++s) sums[s] = place_[s] < 0 ? nullptr : few + place_[s] * width;
          body(Chunk{k, std::min(k + kRows, chunk.end), chunk.edit, chunk.order}, sums, align(scratch.data()));
          for (int64_t j = 0; j < count_ * width; ++j) total[j] += few[j];
        }
      }
    });
  }

  // The k-th sum over all rows: (d,), or (n, d) for edits chosen by ids; undefined if not requested.
  Tensor total(int k) {
    if (place_[k] < 0) return Tensor();
    const int64_t d = shape_.d, n = of_edits_[k] ? edits_ : 1;
    const int64_t sizes[2] = {n, d};
    Tensor sum = make({sizes + (of_edits_[k] ? 0 : 1), static_cast<size_t>(of_edits_[k] ? 2 : 1)}, ScalarType::Float, 4);
    float* out = floats(sum);
    constexpr int64_t block = 256;  // columns that a thread adds up at a time
    in_parallel((d + block - 1) / block, 8, [&](int64_t first, int64_t last) {
      for (int64_t begin = first * block; begin < std::min(last * block, d); begin += block) {
        const int64_t end = std::min(begin + block, d);
        double sums[block];
        size_t c = 0;
        for (int64_t e = 0; e < n; ++e) {
          std::fill(sums, sums + block, 0.0);
          for (; c < plan_.chunks.size() && (!of_edits_[k] || plan_.chunks[c].edit == e); ++c) {
            const float* from = partial(static_cast<int64_t>(c), place_[k]);
            for (int64_t j = begin; j < end; ++j) sums[j - begin] += from[j];
          }
          for (int64_t j = begin; j < end; ++j) out[e * d + j] = static_cast<float>(sums[j - begin]);
        }
      }
    });
    return sum;
  }

 private:
  float* partial(int64_t chunk, int place) const {
    return floats(partial_) + (chunk * count_ + place) * padded(shape_.d);
  }

  const Shape& shape_;
  int64_t edits_;
  bool sorted_;
  Plan plan_;
  int count_ = 0;
  int place_[kSums] = {-1, -1, -1, -1, -1};
  bool of_edits_[kSums] = {};
  Tensor partial_;  // a line of each sum for each chunk
};

}  // namespace cpu
}  // namespace red
