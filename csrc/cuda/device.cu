// What the rules have to know of a device.
#if !defined(RED_EMULATED)
#include <mutex>

#include "kernels.h"

namespace red {
namespace cuda {

namespace {

__global__ void probe() {}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, which, index);
  if (status != cudaSuccess)
    throw std::runtime_error("red_kernels: device " + std::to_string(index) + " does not say what it is: " +
                             cudaGetErrorString(status));
  return value;
}

Device read(int index) {
  Device device;
  device.index = index;
  device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
                      attribute(cudaDevAttrComputeCapabilityMinor, index);
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  // A device that runs kernels made for an older one, from their PTX, has clusters, but these kernels do not.
  cudaFuncAttributes loaded = {};
  int current = index;
  cudaError_t status = cudaGetDevice(&current);
  if (status == cudaSuccess && current != index) status = cudaSetDevice(index);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&loaded, probe);
  if (current != index) cudaSetDevice(current);
  if (status != cudaSuccess)
    throw std::runtime_error("red_kernels: the CUDA kernels do not load on device " + std::to_string(index) +
                             " (compute capability " + std::to_string(device.capability / 10) + "." +
                             std::to_string(device.capability % 10) + "): " + cudaGetErrorString(status));
  device.clusters = device.capability >= 90 && loaded.ptxVersion >= 90;
  int driver = 0;  // older ones cannot capture such launches into a graph
  device.early = device.clusters && cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030;
  return device;
}

}  // namespace

const Device& device_of(int index) {
  static Device devices[kDevices];
  static std::once_flag once[kDevices];
  if (index < 0 || index >= kDevices)
    throw std::runtime_error("red_kernels: device " + std::to_string(index) + ", expected 0 to 63");
  std::call_once(once[index], [&] { devices[index] = read(index); });
  return devices[index];
}

}  // namespace cuda
}  // namespace red
#endif
