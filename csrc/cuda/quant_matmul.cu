#include "cuda/quant_matmul.h"

#include <cuda_runtime.h>

#include "cuda/fragments.h"
#include "cuda/quant_matmul_kernels.h"
#include "cuda/quant_matmul_plan.h"

namespace llmos {

namespace {

QuantMatmulKernel kernel_of(WeightFormat format, FloatType type, int64_t m) {
  switch (format) {
    case WeightFormat::kInt8:
      return int8_kernel(type, m);
    case WeightFormat::kInt4:
      return int4_kernel(type, m);
    case WeightFormat::kInt4Asym:
      return int4_asym_kernel(type, m);
    default:
      return nf4_kernel(type, m);
  }
}

uint32_t tiles(const WeightShape& weight) {
  return static_cast<uint32_t>((weight.n + kTileRows - 1) / kTileRows);
}

// Blocks of the kernel that the current device runs at a time.
cudaError_t count_slots(const QuantMatmulKernel& kernel, int* slots) {
  int device, processors, blocks;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kThreads,
                                                          kernel.shared_bytes);
  if (error != cudaSuccess) return error;
  *slots = processors * blocks;
  return blocks > 0 ? cudaSuccess : cudaErrorLaunchOutOfResources;
}

}  // namespace

int plan_quant_matmul(const WeightShape& weight, int64_t m, FloatType type, QuantMatmulPlan* plan) {
  const QuantMatmulKernel kernel = kernel_of(weight.format, type, m);
  cudaError_t error = cudaFuncSetAttribute(
      kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
  int slots = 0;
  if (error == cudaSuccess) error = count_slots(kernel, &slots);
  if (error != cudaSuccess) return error;
  plan->tiles = tiles(weight);
  const uint32_t rows = kernel.x_tiles * kXTile;
  plan->splits = choose_splits(plan->tiles, stages(weight), slots, rows);
  const int64_t parts = plan->splits > 1 ? int64_t{plan->tiles} * plan->splits : 0;
  plan->partial_floats = parts * kTileRows * rows;
  return cudaSuccess;
}

int cuda_quant_matmul(const CudaQuantMatmul& call, FloatType type, void* stream) {
  const QuantMatmulKernel kernel = kernel_of(call.weight.format, type, call.m);
  const dim3 grid(tiles(call.weight), call.splits);
  kernel.function<<<grid, kThreads, kernel.shared_bytes, static_cast<cudaStream_t>(stream)>>>(call);
  return cudaGetLastError();
}

}  // namespace llmos
