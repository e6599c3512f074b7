// Starting kernels: on a GPU, or in the emulator. Every launch is checked.
#pragma once

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

#include "rules.h"

#if !defined(RED_EMULATED)
#include <cuda_runtime.h>
#endif

namespace red {
namespace cuda {

constexpr int kDevices = 64;  // of a machine at most

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// A launch, and what is said of it if it fails.
struct Launch {
  const char* name;
  Type type;
  int64_t rows, d;
  const Device* device;
  void* stream;
  Grid grid;
  int threads_x, threads_y = 1;
  int cluster = 1;
  int64_t shared = 0;
  bool early = false;  // may start before the kernel before it has ended: it calls wait_for_previous
};

inline std::string described(const Launch& l, const std::string& error) {
  static const char* const types[] = {"float32", "bfloat16", "float16"};
  const auto n = [](int64_t v) { return std::to_string(v); };
  return "red_kernels: " + std::string(l.name) + " of " + types[l.type] + " " + n(l.rows) + " x " + n(l.d) +
         " failed on device " + n(l.device->index) + " (compute capability " + n(l.device->capability / 10) + "." +
         n(l.device->capability % 10) + "), grid " + n(l.grid.x) + " x " + n(l.grid.y) + " x " + n(l.grid.z) +
         ", block " + n(l.threads_x) + " x " + n(l.threads_y) + ", cluster " + n(l.cluster) + ", " + n(l.shared) +
         " bytes of shared memory: " + error;
}

inline void check_grid(const Launch& l) {
  if (l.grid.x > 0x7fffffff || l.grid.y > 65535 || l.grid.z > 65535)
    throw std::runtime_error(described(l, "the grid is larger than a GPU takes"));
}

#if defined(RED_EMULATED)

void emulate(const Launch& l, void (*run)(const void*), const void* arguments);

template <class A, void (*KERNEL)(const A)>
void start(const Launch& l, const A& arguments) {
  check_grid(l);
  emulate(l, [](const void* a) { KERNEL(*static_cast<const A*>(a)); }, &arguments);
}

template <class A, void (*KERNEL)(const A)>
int max_clusters(const Launch& l) {
  return l.device->multiprocessors / l.cluster + 1;  // one at least
}

#else

using LaunchAttributes = std::array<cudaLaunchAttribute, 2>;

// What CUDA is told of a launch of this kernel.
template <class A, void (*KERNEL)(const A)>
cudaLaunchConfig_t configured(const Launch& l, LaunchAttributes& attributes) {
  check_grid(l);
  constexpr int64_t kPlain = 48 << 10;  // more has to be asked for, once on each device
  static std::atomic<bool> asked[kDevices] = {};
  if (l.shared > kPlain && !asked[l.device->index].load(std::memory_order_acquire)) {
    const cudaError_t status = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(KERNEL), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(l.device->shared));
    if (status != cudaSuccess) throw std::runtime_error(described(l, cudaGetErrorString(status)));
    asked[l.device->index].store(true, std::memory_order_release);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(l.grid.x), static_cast<unsigned>(l.grid.y), static_cast<unsigned>(l.grid.z));
  config.blockDim = dim3(l.threads_x, l.threads_y, 1);
  config.dynamicSmemBytes = static_cast<size_t>(l.shared);
  config.stream = static_cast<cudaStream_t>(l.stream);
  attributes = {};
  config.attrs = attributes.data();
  if (l.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = l.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (l.early && l.device->early) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return config;
}

// How many clusters of the launch the device can run at once.
template <class A, void (*KERNEL)(const A)>
int max_clusters(const Launch& l) {
  // Asked once, while nothing of it changes: the answer takes as long as a launch.
  static thread_local std::array<int64_t, 5> asked_for = {};
  static thread_local int answer = 0;
  const std::array<int64_t, 5> wanted = {l.device->index, l.threads_x, l.threads_y, l.cluster, l.shared};
  if (asked_for != wanted) {
    LaunchAttributes attributes;
    const cudaLaunchConfig_t config = configured<A, KERNEL>(l, attributes);
    const cudaError_t status = cudaOccupancyMaxActiveClusters(&answer, KERNEL, &config);
    if (status != cudaSuccess) throw std::runtime_error(described(l, cudaGetErrorString(status)));
    asked_for = wanted;
  }
  return answer;
}

template <class A, void (*KERNEL)(const A)>
void start(const Launch& l, const A& arguments) {
  LaunchAttributes attributes;
  const cudaLaunchConfig_t config = configured<A, KERNEL>(l, attributes);
  const cudaError_t status = cudaLaunchKernelEx(&config, KERNEL, arguments);
  if (status != cudaSuccess)
    throw std::runtime_error(described(l, std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status)));
}

#endif

// A compiled kernel, as those see it who choose among many: how it is started, and how many of its clusters run at once.
template <class A>
struct Kernel {
  void (*start)(const Launch&, const A&) = nullptr;
  int (*max_clusters)(const Launch&) = nullptr;
};
template <class A, void (*KERNEL)(const A)>
constexpr Kernel<A> kernel_of() {
  return {start<A, KERNEL>, max_clusters<A, KERNEL>};
}

}  // namespace cuda
}  // namespace red
