// The state of the running thread, as one number; red_kernels/ops/ambient.py names the bits.
#pragma once

#include <cstdint>

namespace red {

enum Ambient : int64_t {
  kGrad = 1,
  kInference = 2,
  kAutocast = 4 + 8,
  kSaved = 16,
  kBackward = 32,
  kTransformed = 64,
  kTraced = 128,
  kTangents = 256,
  kQuiet = kGrad + kInference + kAutocast,
  kPlain = kTransformed + kTraced,
};

int64_t ambient();

}  // namespace red
