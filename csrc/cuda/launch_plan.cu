#include "cuda/launch_plan.h"

#include <cuda_runtime.h>

#include "cuda/fragments.h"
#include "cuda/quant_matmul_plan.h"

namespace llmos {

namespace {

// Blocks of the kernel that the current device runs at a time.
cudaError_t count_slots(const KernelResources& kernel, int* slots) {
  int device, processors, blocks;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads,
                                                          kernel.shared_bytes);
  if (error != cudaSuccess) return error;
  *slots = processors * blocks;
  return blocks > 0 ? cudaSuccess : cudaErrorLaunchOutOfResources;
}

}  // namespace

int plan_launch(const KernelResources& kernel, uint32_t tiles, uint32_t rows,
                const WeightShape& weight, QuantMatmulPlan* plan) {
  cudaError_t error = cudaFuncSetAttribute(
      kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
  int slots = 0;
  if (error == cudaSuccess) error = count_slots(kernel, &slots);
  if (error != cudaSuccess) return error;
  plan->tiles = tiles;
  plan->splits = choose_splits(tiles, stages(weight), slots, rows);
  plan->workspace_bytes = partial_bytes(tiles, rows, plan->splits);
  return cudaSuccess;
}

}  // namespace llmos
