#include "cuda/round_rows.h"

#include <cuda_runtime.h>

#include "cuda/round_rows_kernel.cuh"

namespace llmos {

namespace {

template <FloatType kType>
void launch(const RoundRows& call, cudaStream_t stream) {
  round_rows_kernel<kType>
      <<<static_cast<uint32_t>(call.m), kRoundThreads, kRoundSharedBytes, stream>>>(call);
}

}  // namespace

int cuda_round_rows(const RoundRows& call, FloatType type, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (type == FloatType::kFp32)
    launch<FloatType::kFp32>(call, on);
  else if (type == FloatType::kBf16)
    launch<FloatType::kBf16>(call, on);
  else
    launch<FloatType::kFp16>(call, on);
  return cudaGetLastError();
}

}  // namespace llmos
