// A ring of stages in shared memory, which copies fill while tensor cores empty it.
#pragma once

#include "cuda/warpgroup.cuh"

namespace llmos {

// For number = 0 .. count - 1: copy(number) begins a stage's copies, some stages ahead of
// multiply(number), which uses them. Stage `number` lies in slot number % kDepth. Products of
// warpgroups may still read a stage's slot during the next stage, but no longer; at the end, none
// run.
template <uint32_t kDepth, bool kWarpgroups, typename Copy, typename Multiply>
__device__ inline void run_pipeline(uint32_t count, Copy copy, Multiply multiply) {
  constexpr uint32_t kAhead = kDepth - (kWarpgroups ? 2 : 1);
  const auto copy_number = [&](uint32_t number) {
    if (number < count) copy(number);
    commit_copies();  // an empty group beyond the last one
  };
  for (uint32_t number = 0; number < kAhead; ++number) copy_number(number);
  for (uint32_t number = 0; number < count; ++number) {
    wait_for_copies<kAhead - 1>();
    if constexpr (kWarpgroups) show_copies_to_products();
    // all threads' copies have landed, and nobody reads the slot that is filled next any more
    synchronize_block();
    copy_number(number + kAhead);
    multiply(number);
  }
  if constexpr (kWarpgroups) wait_for_products<0>();
}

}  // namespace llmos
