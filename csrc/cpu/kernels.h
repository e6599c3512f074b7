// The interface of the dispatcher and the kernels of each instruction set. Plain structs and pointers: no torch, no
// templates, so that no code compiled for a wide instruction set is linked into code that runs everywhere.
#pragma once

#include "../types.h"

namespace red {

// fp32 vectors, one for all rows (ids null) or one for each edit; an absent vector is filled with its neutral value.
struct Vectors {
  const float* data = nullptr;
  int64_t stride = 0;
  const int64_t* ids = nullptr;
  const float* row(int64_t i) const { return ids ? data + ids[i] * stride : data; }
};

struct Dropout {
  bool on = false;
  uint64_t seed = 0;
  uint32_t threshold = 0;  // an element is kept if its random word is at least this
  float factor = 1.0f;     // 1 / (1 - p); 0 for p = 1
};

struct EditForward {
  int64_t d;
  Rows x, residual;
  Vectors scale, bias;
  Dropout dropout;
  bool stream;  // store past the cache: the output exceeds the cache before it is read
  void* z;
};

struct EditBackward {
  int64_t d;
  Rows dz, x;
  Vectors scale;
  Dropout dropout;
  bool stream;
  void* dx;  // null if not requested
};

struct EditNormForward {
  int64_t d;
  Rows x, residual;
  Vectors scale, bias;
  const float *weight, *norm_bias;
  Dropout dropout;
  float eps;
  bool stream;
  void *y, *z;  // z null: not kept; the norm reads it as rounded all the same
  float *mean, *rstd;
};

struct EditNormBackward {
  int64_t d;
  Rows dy, dz, z, x, residual;  // z absent: recomputed from x and residual
  Vectors scale, bias;
  const float* weight;
  Dropout dropout;
  bool stream;
  const float *mean, *rstd;
  void *dx, *dresidual;
};

struct NormEditForward {
  int64_t d;
  Rows x;
  Vectors scale, bias;
  const float *weight, *norm_bias;
  float eps;
  bool stream;
  void* y;
  float *mean, *rstd;
};

struct NormEditBackward {
  int64_t d;
  Rows dy, x;
  Vectors scale;
  const float *weight, *norm_bias;
  bool stream;
  const float *mean, *rstd;
  void* dx;
};

// A mix is an edit with its first vector in place of the scale. `blocks` of columns are reflected, or pairs of columns
// rotate (0); `second` has no data if absent. z is always kept.
struct MixForward : EditForward {
  Vectors second;
  int64_t blocks;
};
struct MixBackward : EditBackward {
  Vectors second;
  int64_t blocks;
};
struct MixNormForward : EditNormForward {
  Vectors second;
  int64_t blocks;
};
struct MixNormBackward : EditNormBackward {
  Vectors second;
  int64_t blocks;
};

// A run of rows whose column sums are added in order. Its extent depends only on the shape and the ids, never on the
// number of threads, so the sums do not either. With `order`, the k-th row is order[k].
struct Chunk {
  int64_t begin, end, edit;
  const int64_t* order;
  int64_t row(int64_t k) const { return order ? order[k] : k; }
};

// A chunk's column sums, each of d floats; null if not requested. A mix's first vector is in place of the scale.
struct Columns {
  float *dscale = nullptr, *dbias = nullptr, *dweight = nullptr, *dnorm_bias = nullptr, *dsecond = nullptr;
};

// Floats of scratch for a row of d: a row in fp32, and one of dropout factors or two of folded vectors, each padded.
constexpr int64_t padded(int64_t d) { return (d + 127) / 64 * 64; }
constexpr int64_t scratch_floats(int64_t d) { return 3 * padded(d); }

// One instruction set's kernels of mixes, as below.
struct MixKernels {
  void (*forward[kTypes])(const MixForward&, int64_t begin, int64_t end, float* scratch);
  void (*backward[kTypes])(const MixBackward&, const Chunk&, const Columns&, float* scratch);
  void (*norm_forward[kTypes][2])(const MixNormForward&, int64_t begin, int64_t end, float* scratch);
  void (*norm_backward[kTypes][2])(const MixNormBackward&, const Chunk&, const Columns&, float* scratch);
};

// One instruction set's kernels, by activation type, and for norms by [centered]: RMSNorm, LayerNorm.
struct Kernels {
  const char* name;
  void (*edit_forward[kTypes])(const EditForward&, int64_t begin, int64_t end, float* scratch);
  void (*edit_backward[kTypes])(const EditBackward&, const Chunk&, const Columns&, float* scratch);
  void (*edit_norm_forward[kTypes][2])(const EditNormForward&, int64_t begin, int64_t end, float* scratch);
  void (*edit_norm_backward[kTypes][2])(const EditNormBackward&, const Chunk&, const Columns&, float* scratch);
  void (*norm_edit_forward[kTypes][2])(const NormEditForward&, int64_t begin, int64_t end, float* scratch);
  void (*norm_edit_backward[kTypes][2])(const NormEditBackward&, const Chunk&, const Columns&, float* scratch);
  const MixKernels* mixes;
};

}  // namespace red
