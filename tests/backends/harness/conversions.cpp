// The conversions of neon.h, compiled with the flags of an instruction set.
#include "harness.h"

#include "../../../csrc/cpu/neon.h"

namespace red {
namespace RED_ISA {
namespace {

template <class To, class From>
To load(const From* p) {
  To to;
  __builtin_memcpy(&to, p, sizeof to);
  return to;
}

template <class T>
void widen_all(bool by_eights, const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    F4 low, high;
    if (by_eights) {
      widen2(T{}, load<H8>(from + i), low, high);
    } else {
      low = widen(T{}, load<H4>(from + i));
      high = widen(T{}, load<H4>(from + i + 4));
    }
    __builtin_memcpy(to + i, &low, sizeof low);
    __builtin_memcpy(to + i + 4, &high, sizeof high);
  }
}

template <class T>
void narrow_all(bool by_eights, const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i += 8) {
    const F4 low = load<F4>(from + i), high = load<F4>(from + i + 4);
    if (by_eights) {
      const H8 both = narrow2(T{}, low, high);
      __builtin_memcpy(to + i, &both, sizeof both);
    } else {
      const H4 first = narrow(T{}, low), second = narrow(T{}, high);
      __builtin_memcpy(to + i, &first, sizeof first);
      __builtin_memcpy(to + i + 4, &second, sizeof second);
    }
  }
}

}  // namespace

extern const Conversions conversions;
const Conversions conversions = {
    [](int type, bool by_eights, const uint16_t* from, float* to, int64_t count) {
      (type == kBFloat16 ? widen_all<BFloat16> : widen_all<Float16>)(by_eights, from, to, count);
    },
    [](int type, bool by_eights, const float* from, uint16_t* to, int64_t count) {
      (type == kBFloat16 ? narrow_all<BFloat16> : narrow_all<Float16>)(by_eights, from, to, count);
    },
};

}  // namespace RED_ISA
}  // namespace red
