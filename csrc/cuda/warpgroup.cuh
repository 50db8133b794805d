// Hopper's products of a warpgroup, four warps that together multiply 64 rows (wgmma). The left
// operand comes from registers, as mma.sync has it, the right one from shared memory. They run
// while the threads go on: a product's operands and sums belong to it until wait_for_products.
//
// ptxas before 13.3 is known to reuse registers of a left operand too early (triton #9433). What it
// made of these kernels is looked at by tests/csrc/test_cuda_gate.py; a self-test asks the GPU.
#pragma once

#include "cuda/primitives.cuh"

namespace llmos {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;  // such kernels are there, but must not be launched
#endif

// wgmma's matrix descriptor of a right operand: rows of kBytes, swizzled as fragments.h says, whose
// k lies along them. They begin at a multiple of 8 kBytes in shared memory, or at one of their
// pieces.
template <uint32_t kBytes>
__device__ inline uint64_t right_operand(const void* shared) {
  constexpr uint64_t kSwizzle = kBytes == 32 ? 3 : 2;
  constexpr uint64_t kEightRows = 8 * kBytes / 16;
  return shared_address(shared) / 16 | uint64_t{1} << 16 | kEightRows << 32 | kSwizzle << 62;
}

// Before a product that reads what this thread has copied to shared memory: then a barrier.
__device__ inline void show_copies_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Between a warpgroup's last change of registers and the products that use them.
__device__ inline void show_registers_to_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a group of products.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for the warpgroup's groups but the newest kPending.
template <int kPending>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Holds sums in their registers here: the compiler neither zeroes them later nor reads them before.
template <uint32_t kCount>
__device__ inline void hold(int32_t (&sums)[kCount][4]) {
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i)
    asm volatile("" : "+r"(sums[i][0]), "+r"(sums[i][1]), "+r"(sums[i][2]), "+r"(sums[i][3]));
}

template <uint32_t kCount>
__device__ inline void hold(float (&sums)[kCount][4]) {
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i)
    asm volatile("" : "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3]));
}

#define LLMOS_FOUR_SUMS(kind, i) \
  "+" kind(sums[i][0]), "+" kind(sums[i][1]), "+" kind(sums[i][2]), "+" kind(sums[i][3])
#define LLMOS_128_COLUMNS(kind)                                               \
  LLMOS_FOUR_SUMS(kind, kFirst), LLMOS_FOUR_SUMS(kind, kFirst + 2),           \
      LLMOS_FOUR_SUMS(kind, kFirst + 4), LLMOS_FOUR_SUMS(kind, kFirst + 6),   \
      LLMOS_FOUR_SUMS(kind, kFirst + 8), LLMOS_FOUR_SUMS(kind, kFirst + 10),  \
      LLMOS_FOUR_SUMS(kind, kFirst + 12), LLMOS_FOUR_SUMS(kind, kFirst + 14), \
      LLMOS_FOUR_SUMS(kind, kFirst + 16), LLMOS_FOUR_SUMS(kind, kFirst + 18), \
      LLMOS_FOUR_SUMS(kind, kFirst + 20), LLMOS_FOUR_SUMS(kind, kFirst + 22), \
      LLMOS_FOUR_SUMS(kind, kFirst + 24), LLMOS_FOUR_SUMS(kind, kFirst + 26), \
      LLMOS_FOUR_SUMS(kind, kFirst + 28), LLMOS_FOUR_SUMS(kind, kFirst + 30)
#define LLMOS_WGMMA(shape_and_types, signs)                                                  \
  "wgmma.mma_async.sync.aligned." shape_and_types                                            \
  " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45," \
  "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "               \
  "{%64,%65,%66,%67}, %68, 1" signs ";"

// sums[2 i + kFirst] += a b for a (64, 32) in the fragments of PTX's mma.m16n8k32, 16 rows in each
// warp, b (32, 128), and i-th columns 8 i .. 8 i + 7.
template <uint32_t kFirst>
__device__ inline void multiply_warpgroup(int32_t (&sums)[32][4], const uint32_t (&a)[4],
                                          uint64_t b) {
  asm volatile(LLMOS_WGMMA("m64n128k32.s32.s8.s8", "")
               : LLMOS_128_COLUMNS("r")
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// For a (64, 16) and b (16, 128) in bf16 or fp16, in the fragments of mma.m16n8k16.
template <FloatType kType, uint32_t kFirst>
__device__ inline void multiply_warpgroup(float (&sums)[32][4], const uint32_t (&a)[4],
                                          uint64_t b) {
  if constexpr (kType == FloatType::kBf16)
    asm volatile(LLMOS_WGMMA("m64n128k16.f32.bf16.bf16", ", 1, 1, 0")
                 : LLMOS_128_COLUMNS("f")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile(LLMOS_WGMMA("m64n128k16.f32.f16.f16", ", 1, 1, 0")
                 : LLMOS_128_COLUMNS("f")
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef LLMOS_FOUR_SUMS
#undef LLMOS_128_COLUMNS
#undef LLMOS_WGMMA

}  // namespace llmos
