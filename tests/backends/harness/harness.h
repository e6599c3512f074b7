// What the harness and the conversions of each instruction set agree on.
#pragma once

#include <cstdint>

namespace red {

// Of one instruction set: `count` halves (a multiple of 8) to fp32 and back, by fours or by eights.
struct Conversions {
  void (*widen)(int type, bool by_eights, const uint16_t* from, float* to, int64_t count);
  void (*narrow)(int type, bool by_eights, const float* from, uint16_t* to, int64_t count);
};

}  // namespace red
