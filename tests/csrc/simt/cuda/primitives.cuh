// The names of csrc/cuda/primitives.cuh for the GPU of simt.h, written from PTX's manual.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "cpu/bf16.h"  // and float_of, bits_of
#include "cuda/float_type.h"
#include "simt.h"

namespace llmos {

inline int32_t nearest_integer(float value) {
  return std::isnan(value) ? 0 : static_cast<int32_t>(std::nearbyint(value));
}

template <FloatType kType>
float widen(uint16_t bits) {
  if (kType == FloatType::kBf16) return load(&bits);
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value = std::ldexp(exponent == 0 ? mantissa : 1024 + mantissa, std::max(exponent, 1) - 25);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : NAN;
  return bits & 0x8000 ? -value : value;
}

template <FloatType kType>
uint16_t narrow(float value) {
  uint16_t bits;
  if (kType == FloatType::kBf16) {
    store(&bits, value);
    return bits;
  }
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // [0.5, 1)
  const int mantissa = static_cast<int>(std::nearbyint(fraction * 2048));
  return sign | static_cast<uint16_t>(((exponent + 13) << 10) + mantissa);
}

inline uint32_t narrow_to_fp16(float low, float high) {
  return narrow<FloatType::kFp16>(low) | uint32_t{narrow<FloatType::kFp16>(high)} << 16;
}

template <FloatType kType>
float half_of(uint32_t pair, int i) {
  return widen<kType>(static_cast<uint16_t>(pair >> (16 * i)));
}

inline uint8_t* shared_memory() { return simt::machine.shared->data(); }
inline uint64_t read_once_policy() { return 1; }
inline uint64_t read_again_policy() { return 2; }

inline void copy_async(void* shared, const void* global, bool exists) {
  const bool aligned = reinterpret_cast<uintptr_t>(shared) % 16 == 0 &&
                       (!exists || reinterpret_cast<uintptr_t>(global) % 16 == 0);
  if (!aligned) std::abort();  // as a GPU would
  const simt::Copy copy{static_cast<uint8_t*>(shared),
                        exists ? static_cast<const uint8_t*>(global) : nullptr};
  if (simt::machine.late)
    simt::machine.fibers[simt::current].groups.back().push_back(copy);
  else
    simt::perform(copy);
}

inline void copy_async(void* shared, const void* global, bool exists, uint64_t) {
  copy_async(shared, global, exists);
}

inline void commit_copies() { simt::machine.fibers[simt::current].groups.emplace_back(); }

template <int kPending>
void wait_for_copies() {
  auto& groups = simt::machine.fibers[simt::current].groups;
  while (groups.size() > kPending + 1) {  // one is open
    for (const simt::Copy& copy : groups.front()) simt::perform(copy);
    simt::machine.fibers[simt::current].hides_copies |= !groups.front().empty();
    groups.erase(groups.begin());
  }
}

inline void synchronize_block() {
  simt::meet(simt::machine.block, simt::current, nullptr, [](void**) {});
}

template <typename T>
void load_words(const void* source, T& words) {
  if (reinterpret_cast<uintptr_t>(source) % sizeof words != 0) std::abort();  // as a GPU would
  std::memcpy(words, source, sizeof words);
}
inline uint32_t load_4_bytes(const void* source) {
  uint32_t word[1];
  load_words(source, word);
  return word[0];
}
inline void load_8_bytes(const void* source, uint32_t (&words)[2]) { load_words(source, words); }
template <typename T>
void load_16_bytes(const void* source, T (&words)[4]) {
  load_words(source, words);
}

template <typename T>
void store_words(void* target, const T& words) {
  if (reinterpret_cast<uintptr_t>(target) % sizeof words != 0) std::abort();
  std::memcpy(target, words, sizeof words);
}
inline void store_4_bytes(void* target, uint32_t word) {
  const uint32_t words[1] = {word};
  store_words(target, words);
}
inline void store_8_bytes(void* target, const uint32_t (&words)[2]) { store_words(target, words); }
template <typename T>
void store_16_bytes(void* target, const T (&words)[4]) {
  store_words(target, words);
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t index = selector >> (4 * i) & 15;
    uint32_t byte = both >> (8 * (index & 7)) & 0xff;
    if (index & 8) byte = byte & 0x80 ? 0xff : 0;  // prmt then repeats the byte's sign
    bytes |= byte << (8 * i);
  }
  return bytes;
}

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
inline uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }

template <FloatType kType>
uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t pair = 0;
  for (int i = 0; i < 2; ++i) {
    const float value = half_of<kType>(a, i) * half_of<kType>(b, i) + half_of<kType>(c, i);
    pair |= uint32_t{narrow<kType>(value)} << (16 * i);
  }
  return pair;
}

// Fragments of mma.m16n8k16 (PTX ISA, 9.7.15.5.8): with g = lane / 4 and t = lane % 4, registers of
// a hold rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8; of b rows 2t, 2t + 8 and
// column g; of c rows g, g, g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1.
struct TileOperands {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

template <FloatType kType>
void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  TileOperands mine{c, a, b};
  simt::meet_warp(&mine, [](void** brought) {
    float left[16][16], right[16][8];
    const auto of = [&](int lane) { return static_cast<TileOperands*>(brought[lane]); };
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) {
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < 4; ++r)
          left[g + r % 2 * 8][2 * t + r / 2 * 8 + i] = half_of<kType>(of(lane)->a[r], i);
        for (int r = 0; r < 2; ++r) right[2 * t + r * 8 + i][g] = half_of<kType>(of(lane)->b[r], i);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        float sum = 0;
        for (int k = 0; k < 16; ++k)
          sum += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
        of(lane)->c[i] += sum;
      }
  });
}

// Fragments of mma.m16n8k32 (9.7.15.5.10): as above, but a register of a or b holds four k, from
// 4t or 4t + 16 on, where the ones above hold two.
struct IntegerOperands {
  int32_t* c;
  const uint32_t* a;
  const uint32_t* b;
};

inline void multiply_tile(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  IntegerOperands mine{c, a, b};
  simt::meet_warp(&mine, [](void** brought) {
    int left[16][32], right[32][8];
    const auto of = [&](int lane) { return static_cast<IntegerOperands*>(brought[lane]); };
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int g = lane / 4, k = lane % 4 * 4 + i;
        const auto byte = [i](uint32_t word) { return static_cast<int8_t>(word >> (8 * i)); };
        for (int r = 0; r < 4; ++r) left[g + r % 2 * 8][k + r / 2 * 16] = byte(of(lane)->a[r]);
        for (int r = 0; r < 2; ++r) right[k + r * 16][g] = byte(of(lane)->b[r]);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        int sum = 0;
        for (int k = 0; k < 32; ++k)
          sum += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
        of(lane)->c[i] += sum;
      }
  });
}

template <typename T>
T exchange(T value, int mask) {
  T result[2] = {value, 0};
  simt::meet_warp(result, [mask](void** brought) {
    for (int lane = 0; lane < 32; ++lane)
      static_cast<T*>(brought[lane])[1] = static_cast<T*>(brought[lane ^ mask])[0];
  });
  return result[1];
}

inline uint32_t arrive(uint32_t* counter) {
  uint32_t before;
  void* mine[2] = {counter, &before};
  simt::meet(simt::machine.block, simt::current, mine, [](void** brought) {
    const uint32_t count = (*static_cast<uint32_t*>(static_cast<void**>(brought[0])[0]))++;
    for (uint32_t i = 0; i < simt::machine.block.size; ++i)
      *static_cast<uint32_t*>(static_cast<void**>(brought[i])[1]) = count;
  });
  return before;
}

// Floats that nobody has written are all ones.
template <typename T>
void load_shared_by_blocks(const void* source, T (&words)[4]) {
  load_words(source, words);
  const uint32_t unwritten = ~0u;
  for (const T& word : words)
    if (std::is_same<T, float>::value && std::memcmp(&word, &unwritten, 4) == 0) std::abort();
}

}  // namespace llmos
