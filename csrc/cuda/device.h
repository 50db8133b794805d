// What bindings need of the CUDA runtime beside kernels.
#pragma once

namespace llmos {

// Makes a device current for this thread; a cudaError_t. torch has done so in its copy of the CUDA
// runtime, but the extension is linked with a copy of its own.
int cuda_set_device(int device);

// In *has, whether the current device multiplies by warpgroups (warpgroup.cuh) and the extension
// was compiled for them, with 9.0a among its architectures; a cudaError_t.
int cuda_has_warpgroups(bool* has);

const char* cuda_error_name(int error);

}  // namespace llmos
