#include "cuda/device.h"

#include <cuda_runtime.h>

namespace llmos {

int cuda_set_device(int device) { return cudaSetDevice(device); }

const char* cuda_error_name(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace llmos
