#include "cuda/device.h"

#include <cuda_runtime.h>

namespace llmos {

int cuda_set_device(int device) { return cudaSetDevice(device); }

int cuda_has_warpgroups(bool* has) {
  *has = false;
#ifdef LLMOS_FAST_SM_90A
  int device, major, minor;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return error;
  *has = major == 9 && minor == 0;
#endif
  return cudaSuccess;
}

const char* cuda_error_name(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace llmos
