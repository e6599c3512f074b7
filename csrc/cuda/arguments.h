// What the host hands to each kernel. Plain structs, passed by value.
#pragma once

#include "../types.h"

namespace red {
namespace cuda {

// fp32 vectors (wide) or vectors of the activations' type: one, or one for each edit. Null where absent.
struct Vectors {
  const void* data = nullptr;
  bool wide = true;
};

// An element is kept, and multiplied by `factor`, if its random word is at least `threshold`. No seed: no dropout.
struct Dropout {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
  float factor = 1.0f;
};

// The edit that is applied to `x` before the residual is added.
struct Edit {
  Vectors scale, bias;
  const int64_t* ids = nullptr;  // the edit of each row, null where all rows have the same
  int64_t edits = 1;             // how many there are; an id beyond them makes NaN
  int64_t stride = 0;            // elements from one edit's vector to the next
  Dropout dropout;
};

// How the rows are dealt to workers for the column sums. Plainly each worker takes every so many rows. With `order` (the
// rows sorted by their ids) a worker has the places from `length` times its number on, and sums each edit by itself.
//
// Column sums are fp32 lines of d. Plainly there is one for each block. With `order` there is one for each edit, for
// those that begin and end within a worker, and behind them two for each worker: for its first and its last edit, which
// its neighbours may share; `owners` says whose these are, -1 for none.
struct Deal {
  const int64_t* order = nullptr;
  const int64_t* sorted = nullptr;  // the id at each place of the order
  int64_t* owners = nullptr;
  int64_t length = 0;
};

struct EditForward {
  int64_t rows, d;
  bool aligned;  // all rows and vectors begin on 16 bytes, and d fills its vectors of 16 bytes
  int lanes;     // threads for each row of a slab
  Rows x, residual;
  Edit edit;
  void* z;
};

// The gradients of EditForward; and with `averages` those of a norm behind the edit, or before it, column by column.
struct SlabBackward {
  int64_t rows, d;
  bool aligned, edit_last;
  int lanes;
  Rows dy, dz, z, x, residual;  // without a norm: dy is the gradient of z, and x is there for that of the scale
  Edit edit;
  Deal deal;
  Vectors weight, norm_bias;
  float weight_offset;
  const float *mean, *rstd, *averages;  // averages: of g * normed and of g, for each row, g the weighted gradient
  void *dx, *dresidual;
  float* lines[4];  // of dscale, dbias, dweight and dnorm_bias; null for those not asked for
};

struct NormForward {
  int64_t rows, d;
  bool aligned, edit_last;  // edit_last: x is normed, and then edited
  int cluster;              // blocks that share a row
  Rows x, residual;
  Edit edit;
  Vectors weight, norm_bias;
  float weight_offset, eps;
  void *y, *z;  // z null: not kept; the norm sees it as rounded all the same
  float *mean, *rstd;
};

struct NormBackward {
  int64_t rows, d;
  bool aligned, edit_last;  // edit_last: z is what was normed, its result was edited, and dx is the gradient of z
  int cluster, stages, arrays;
  Rows dy, dz, z, x, residual;  // z absent: made again from x and residual
  Edit edit;
  Deal deal;
  Vectors weight, norm_bias;
  float weight_offset;
  const float *mean, *rstd;
  void *dx, *dresidual;
  float* lines[4];
};

// A mix in the place of the edit: a rotation (blocks = 0) or reflections, with vectors in fp32. Its first vector is the
// edit's scale. Without a norm y is null, and so are the statistics.
struct MixForward : NormForward {
  Vectors second;
  int64_t blocks;
  int lanes;  // threads for each block of columns, in the kernel of one pass
};

// The gradients of MixForward, but for those of the norm's vectors; the lines are of dfirst, dsecond and dbias. Without a
// norm dy is the gradient of z, and z is absent. x is there for dfirst and dsecond.
struct MixBackward : NormBackward {
  Vectors second;
  int64_t blocks;
  int lanes;
};

// The averages over each row that SlabBackward needs: (2, rows).
struct RowAverages {
  int64_t rows, d;
  bool aligned, edit_last;
  Rows dy, z, x, residual;
  Edit edit;
  Vectors weight;
  float weight_offset;
  const float *mean, *rstd;
  float* averages;
};

// Adds up `count` lines for each of `sums` sums; or with edits, for each edit those that are its own.
struct AddLines {
  int64_t d, count;
  const float* lines[4];
  float* out[4];
  // for edits
  int64_t rows, edits;
  Deal deal;
};

}  // namespace cuda
}  // namespace red
