#include "cuda/dequantize.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace llmos {

namespace {

constexpr int kThreads = 256;

__device__ void store(float* target, float value) { *target = value; }
__device__ void store(__nv_bfloat16* target, float value) { *target = __float2bfloat16_rn(value); }
__device__ void store(__half* target, float value) { *target = __float2half_rn(value); }

// One thread writes two neighbouring weights: they share a byte of the 4-bit formats, and a warp
// writes 64 weights side by side. Blocks of y walk over rows, as grids are short in y.
template <typename T>
__global__ void dequantize_kernel(WeightShape shape, const uint8_t* __restrict__ packed,
                                  const float* __restrict__ scales,
                                  const uint8_t* __restrict__ zeros, T* __restrict__ out) {
  const int64_t begin = 2 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  for (int64_t row = blockIdx.y; row < shape.n; row += gridDim.y)
    for (int64_t column = begin; column < begin + 2 && column < shape.k; ++column) {
      const int64_t index = scale_index(shape, row, column);
      const int zero = zeros == nullptr ? 0 : zeros[index];
      const float level = level_of(shape.format, code_at(shape, packed, row, column), zero);
      store(&out[row * shape.k + column], level * scales[index]);
    }
}

template <typename T>
void launch(const WeightShape& shape, const uint8_t* packed, const float* scales,
            const uint8_t* zeros, void* out, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((shape.k + 2 * kThreads - 1) / (2 * kThreads)),
                  static_cast<unsigned>(shape.n < 65535 ? shape.n : 65535));
  dequantize_kernel<<<grid, kThreads, 0, stream>>>(shape, packed, scales, zeros,
                                                   static_cast<T*>(out));
}

}  // namespace

int cuda_dequantize(const WeightShape& shape, const uint8_t* packed, const float* scales,
                    const uint8_t* zeros, FloatType type, void* out, void* stream) {
  if (shape.n == 0 || shape.k == 0) return cudaSuccess;
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == FloatType::kFp32)
    launch<float>(shape, packed, scales, zeros, out, on);
  else if (type == FloatType::kBf16)
    launch<__nv_bfloat16>(shape, packed, scales, zeros, out, on);
  else
    launch<__half>(shape, packed, scales, zeros, out, on);
  return cudaGetLastError();
}

const char* cuda_error_name(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace llmos
