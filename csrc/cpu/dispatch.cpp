#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(RED_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(RED_AARCH64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace red {

// build.py defines the compiled sets: those of x86-64, those of AArch64, or the one for any other processor.
#if defined(RED_AARCH64)
namespace neon {
extern const Kernels kernels;
}
namespace neon_bf16 {
extern const Kernels kernels;
}
#else
namespace base {
extern const Kernels kernels;
}
#endif
#if defined(RED_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

#if defined(RED_AARCH64)
// Whether the processor converts fp32 to bf16 (FEAT_BF16). If the system does not report it, it does not.
bool converts_to_bfloat16() {
#if defined(__linux__)
  constexpr unsigned long kBFloat16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return (getauxval(AT_HWCAP2) & kBFloat16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

// A set that adds instructions for bf16 to another one has kernels of that type only.
struct WithBFloat16 {
  MixKernels mixes;
  Kernels kernels;

  WithBFloat16(const Kernels& others, const Kernels& own) : mixes(*others.mixes), kernels(others) {
    const auto take = [](auto& to, const auto& from) {
      std::memcpy(&to[kBFloat16], &from[kBFloat16], sizeof to[kBFloat16]);
    };
    take(mixes.forward, own.mixes->forward);
    take(mixes.backward, own.mixes->backward);
    take(mixes.norm_forward, own.mixes->norm_forward);
    take(mixes.norm_backward, own.mixes->norm_backward);
    take(kernels.edit_forward, own.edit_forward);
    take(kernels.edit_backward, own.edit_backward);
    take(kernels.edit_norm_forward, own.edit_norm_forward);
    take(kernels.edit_norm_backward, own.edit_norm_backward);
    take(kernels.norm_edit_forward, own.norm_edit_forward);
    take(kernels.norm_edit_backward, own.norm_edit_backward);
    kernels.name = own.name;
    kernels.mixes = &mixes;
  }
  WithBFloat16(const WithBFloat16&) = delete;
};

std::vector<const Kernels*> found() {
#if defined(RED_AARCH64)
  static const WithBFloat16 with_bfloat16(neon::kernels, neon_bf16::kernels);
  std::vector<const Kernels*> sets{&neon::kernels};
  if (converts_to_bfloat16()) sets.push_back(&with_bfloat16.kernels);
#else
  std::vector<const Kernels*> sets{&base::kernels};
#endif
#if defined(RED_X86)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return sets;
  sets.push_back(&avx2::kernels);
  for (const bool has : {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
                         __builtin_cpu_supports("avx512dq") != 0, __builtin_cpu_supports("avx512vl") != 0})
    if (!has) return sets;
  sets.push_back(&avx512::kernels);
  static const WithBFloat16 with_bfloat16(avx512::kernels, avx512_bf16::kernels);
  if (__builtin_cpu_supports("avx512bf16")) sets.push_back(&with_bfloat16.kernels);
#endif
  return sets;
}

const Kernels* select(const char* name) {
  const auto sets = found();
  if (name == nullptr || *name == '\0') return sets.back();
  std::string names;
  for (const Kernels* set : sets) {
    if (std::strcmp(set->name, name) == 0) return set;
    names += std::string(names.empty() ? "" : ", ") + set->name;
  }
  throw std::runtime_error("RED_KERNELS_CPU is '" + std::string(name) + "', expected one that this processor can run: " +
                           names);
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* set = in_use.load(std::memory_order_acquire);
  if (set == nullptr) {
    set = select(std::getenv("RED_KERNELS_CPU"));
    in_use.store(set, std::memory_order_release);
  }
  return *set;
}

void use_kernels(const char* name) { in_use.store(select(name), std::memory_order_release); }

std::vector<const char*> runnable() {
  std::vector<const char*> names;
  for (const Kernels* set : found()) names.push_back(set->name);
  return names;
}

}  // namespace red
