// A ring of stages in shared memory, which copies fill while tensor cores empty it.
#pragma once

#include "cuda/primitives.cuh"

namespace llmos {

// For number = 0 .. count - 1: copy(number) begins a stage's copies, kDepth - 1 stages ahead of
// multiply(number), which uses them. Stage `number` lies in slot number % kDepth.
template <uint32_t kDepth, typename Copy, typename Multiply>
__device__ inline void run_pipeline(uint32_t count, Copy copy, Multiply multiply) {
  const auto copy_number = [&](uint32_t number) {
    if (number < count) copy(number);
    commit_copies();  // an empty group beyond the last one
  };
  for (uint32_t number = 0; number < kDepth - 1; ++number) copy_number(number);
  for (uint32_t number = 0; number < count; ++number) {
    wait_for_copies<kDepth - 2>();
    // all threads' copies have landed, and nobody reads the slot that is filled next any more
    synchronize_block();
    copy_number(number + kDepth - 1);
    multiply(number);
  }
}

}  // namespace llmos
