#include "cuda/dequantize.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/dequantize_kernel.cuh"

namespace llmos {

namespace {

template <WeightFormat kFormat, FloatType kType>
void launch(const Dequantize& call, cudaStream_t stream) {
  const int64_t panels = (call.weight.n + kPanel - 1) / kPanel;
  // grids are short in y
  const dim3 grid(dequantize_blocks(call.weight),
                  static_cast<uint32_t>(std::min<int64_t>(panels, 65535)));
  dequantize_kernel<kFormat, kType>
      <<<grid, kDequantizeThreads, kDequantizeSharedBytes, stream>>>(call);
}

template <WeightFormat kFormat>
void launch(const Dequantize& call, FloatType type, cudaStream_t stream) {
  if (type == FloatType::kFp32)
    launch<kFormat, FloatType::kFp32>(call, stream);
  else if (type == FloatType::kBf16)
    launch<kFormat, FloatType::kBf16>(call, stream);
  else
    launch<kFormat, FloatType::kFp16>(call, stream);
}

}  // namespace

int cuda_dequantize(const Dequantize& call, FloatType type, void* stream) {
  if (call.weight.n == 0 || call.weight.k == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (call.weight.format) {
    case WeightFormat::kInt8:
      launch<WeightFormat::kInt8>(call, type, on);
      break;
    case WeightFormat::kInt4:
      launch<WeightFormat::kInt4>(call, type, on);
      break;
    case WeightFormat::kInt4Asym:
      launch<WeightFormat::kInt4Asym>(call, type, on);
      break;
    case WeightFormat::kNf4:
      launch<WeightFormat::kNf4>(call, type, on);
      break;
    case WeightFormat::kFp8:
      return cudaErrorInvalidValue;  // lies in rows
  }
  return cudaGetLastError();
}

}  // namespace llmos
