// The names of csrc/cuda/warpgroup.cuh for the GPU of simt.h, written from PTX's manual (9.7.15).
// Products run as late as the waits allow, or at once.
#pragma once

#include "cuda/primitives.cuh"

namespace llmos {

constexpr bool kHasWarpgroups = true;

// Shared memory begins at address 0.
template <uint32_t kBytes>
uint64_t right_operand(const void* shared) {
  constexpr uint64_t kSwizzle = kBytes == 32 ? 3 : 2, kStride = 8 * kBytes;
  const auto address = static_cast<uint64_t>(static_cast<const uint8_t*>(shared) - shared_memory());
  return address >> 4 | uint64_t{1} << 16 | (kStride >> 4) << 32 | kSwizzle << 62;
}

// Byte `byte` (0..31) of the 32 that row `row` of a right operand has for one product.
inline uint8_t right_byte(uint64_t descriptor, uint32_t row, uint32_t byte) {
  const uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t swizzle = descriptor >> 62;  // 1, 2, 3: of 128, 64, 32 bytes
  const uint32_t bytes = 256 >> swizzle;      // of a row in its swizzle
  if ((descriptor >> 49 & 7) != 0 || start / bytes % 8 != 0) std::abort();
  const uint32_t address = start + row / 8 * stride + row % 8 * bytes + byte;
  // address bits from 7 on, of which a row's bytes have bits from 4 on, are added to them
  return shared_memory()[address ^ (address >> 7 & (bytes / 16 - 1)) << 4];
}

inline void show_copies_to_products() { simt::machine.fibers[simt::current].hides_copies = false; }
inline void show_registers_to_products() {}
inline void commit_products() { simt::machine.fibers[simt::current].products.emplace_back(); }

// Calls the product for all threads' parts of it.
inline void perform_product(simt::Product& mine) {
  simt::meet_warpgroup(&mine, [](void** brought) {
    const auto parts = reinterpret_cast<const simt::Product* const*>(brought);
    parts[0]->act(parts);
  });
}

template <int kPending>
void wait_for_products() {
  auto& groups = simt::machine.fibers[simt::current].products;
  while (groups.size() > kPending + 1) {  // one is open
    for (simt::Product& product : groups.front()) perform_product(product);
    groups.erase(groups.begin());
  }
}

template <uint32_t kCount, typename T>
void hold(T (&)[kCount][4]) {}

// left(word, i): number i of a register; right(descriptor, row, k); kHeld numbers in a register.
template <uint32_t kFirst, uint32_t kHeld, typename T, typename Left, typename Right>
void multiply_rows(T (&sums)[32][4], const uint32_t (&a)[4], uint64_t b, Left left, Right right) {
  simt::Product mine{
      sums, a, [=](const simt::Product* const* parts) {
        for (const simt::Fiber& fiber : simt::machine.fibers)
          if (fiber.hides_copies) std::abort();  // the right operand might be an older one
        constexpr uint32_t kK = 8 * kHeld;
        T operand[128][kK];
        for (uint32_t row = 0; row < 128; ++row)
          for (uint32_t k = 0; k < kK; ++k) operand[row][k] = right(b, row, k);
        for (uint32_t warp = 0; warp < 4; ++warp) {
          T rows[16][kK];
          for (uint32_t lane = 0; lane < 32; ++lane)
            for (uint32_t r = 0; r < 4; ++r)
              for (uint32_t i = 0; i < kHeld; ++i)
                rows[lane / 4 + r % 2 * 8][lane % 4 * kHeld + r / 2 * 4 * kHeld + i] =
                    left(parts[warp * 32 + lane]->left[r], i);
          for (uint32_t lane = 0; lane < 32; ++lane)
            for (uint32_t column = 0; column < 128; ++column) {
              if (column % 8 / 2 != lane % 4) continue;
              auto* of_lane = static_cast<T(*)[4]>(parts[warp * 32 + lane]->sums);
              for (uint32_t half = 0; half < 2; ++half) {
                T sum = 0;
                for (uint32_t k = 0; k < kK; ++k)
                  sum += rows[lane / 4 + half * 8][k] * operand[column][k];
                of_lane[column / 8 * 2 + kFirst][half * 2 + column % 2] += sum;
              }
            }
        }
      }};
  if (simt::machine.late)
    perform_product(mine);
  else
    simt::machine.fibers[simt::current].products.back().push_back(std::move(mine));
}

template <uint32_t kFirst>
void multiply_warpgroup(int32_t (&sums)[32][4], const uint32_t (&a)[4], uint64_t b) {
  multiply_rows<kFirst, 4>(
      sums, a, b, [](uint32_t word, uint32_t i) { return static_cast<int8_t>(word >> (8 * i)); },
      [](uint64_t operand, uint32_t row, uint32_t k) {
        return static_cast<int8_t>(right_byte(operand, row, k));
      });
}

template <FloatType kType, uint32_t kFirst>
void multiply_warpgroup(float (&sums)[32][4], const uint32_t (&a)[4], uint64_t b) {
  multiply_rows<kFirst, 2>(
      sums, a, b, [](uint32_t word, uint32_t i) { return half_of<kType>(word, i); },
      [](uint64_t operand, uint32_t row, uint32_t k) {
        return widen<kType>(right_byte(operand, row, 2 * k) | right_byte(operand, row, 2 * k + 1)
                                                                  << 8);
      });
}

}  // namespace llmos
