// The instructions that kernels are made of, each by one name. 16-bit floating point is held as
// uint16_t, or as a pair in a uint32_t with the first one in the low half. tests/csrc/simt has the
// same names for a CPU, where it runs the kernels as they are written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "cuda/float_type.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "llmos_fast needs compute capability 8.0 or newer: see TORCH_CUDA_ARCH_LIST"
#endif

namespace llmos {

extern __shared__ __align__(512) uint8_t dynamic_shared[];

__device__ inline uint8_t* shared_memory() { return dynamic_shared; }

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// A hint for data that nobody reads twice: they leave the L2 cache first.
__device__ inline uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// For data that other blocks read, too.
__device__ inline uint64_t read_again_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes from global to shared memory, past the registers; zeros where nothing `exists`.
__device__ inline void copy_async(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}

__device__ inline void copy_async(void* shared, const void* global, bool exists, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(exists ? 16 : 0), "l"(policy)
               : "memory");
}

// Ends a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the newest kPending.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void synchronize_block() { __syncthreads(); }

__device__ inline uint32_t load_4_bytes(const void* source) {
  return *static_cast<const uint32_t*>(source);
}

__device__ inline void load_8_bytes(const void* source, uint32_t (&words)[2]) {
  const uint2 read = *static_cast<const uint2*>(source);
  words[0] = read.x, words[1] = read.y;
}

template <typename T>
__device__ inline void load_16_bytes(const void* source, T (&words)[4]) {
  static_assert(sizeof words == 16);
  const uint4 read = *static_cast<const uint4*>(source);
  memcpy(words, &read, sizeof words);
}

__device__ inline void store_4_bytes(void* target, uint32_t word) {
  *static_cast<uint32_t*>(target) = word;
}

__device__ inline void store_8_bytes(void* target, const uint32_t (&words)[2]) {
  *static_cast<uint2*>(target) = {words[0], words[1]};
}

template <typename T>
__device__ inline void store_16_bytes(void* target, const T (&words)[4]) {
  static_assert(sizeof words == 16);
  uint4 written;
  memcpy(&written, words, sizeof words);
  *static_cast<uint4*>(target) = written;
}

// Bytes of b:a (b the upper four) by the four nibbles of `selector`.
__device__ inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// (a & b) | c in one instruction; the compiler makes two where b and c are constants.
__device__ inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(bits) : "r"(a), "r"(b), "r"(c));
  return bits;
}

// (a & b) ^ c, likewise.
__device__ inline uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t bits;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(bits) : "r"(a), "r"(b), "r"(c));
  return bits;
}

// a b + c of pairs, rounded once.
template <FloatType kType>
__device__ inline uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (kType == FloatType::kBf16)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// c += a b for a (16, 16) row by row, b (16, 8) column by column and c (16, 8), in the fragments of
// PTX's mma.m16n8k16.
template <FloatType kType>
__device__ inline void multiply_tile(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  if constexpr (kType == FloatType::kBf16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// As above for integers, a (16, 32), b (32, 8), in the fragments of mma.m16n8k32.
__device__ inline void multiply_tile(int32_t (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The value of the lane whose number differs in the bits of `mask`.
template <typename T>
__device__ inline T exchange(T value, int mask) {
  return __shfl_xor_sync(0xffffffff, value, mask);
}

// Counts one arrival and returns how many came before. What the block wrote before is then seen by
// the block whose arrival is the last; called by all threads.
__device__ inline uint32_t arrive(uint32_t* counter) {
  __shared__ uint32_t before;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    before = atomicAdd(counter, 1u);
    __threadfence();
  }
  __syncthreads();
  return before;
}

// 16 bytes of what other blocks wrote in this launch: from L2, where they met.
template <typename T>
__device__ inline void load_shared_by_blocks(const void* source, T (&words)[4]) {
  static_assert(sizeof words == 16);
  const uint4 read = __ldcg(static_cast<const uint4*>(source));
  memcpy(words, &read, sizeof words);
}

__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }

// Half to even; 0 for NaN.
__device__ inline int32_t nearest_integer(float value) { return __float2int_rn(value); }

template <FloatType kType>
__device__ inline float widen(uint16_t bits) {
  if constexpr (kType == FloatType::kBf16)
    return __uint_as_float(uint32_t{bits} << 16);
  else
    return __half2float(__ushort_as_half(bits));
}

// Rounded half to even.
template <FloatType kType>
__device__ inline uint16_t narrow(float value) {
  if constexpr (kType == FloatType::kBf16)
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  else
    return __half_as_ushort(__float2half_rn(value));
}

// A pair, likewise.
__device__ inline uint32_t narrow_to_fp16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace llmos
