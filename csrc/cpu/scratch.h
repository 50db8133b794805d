// Memory that a thread keeps from call to call, so that no kernel allocates in its steady state.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/huge_pages.h"

namespace llmos {

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  // Room for `count` floats, aligned to a cache line; what was there before is lost.
  float* floats(int64_t count) {
    if (count > capacity_) {
      std::free(memory_);
      capacity_ = (count + 1023) / 1024 * 1024;
      memory_ = static_cast<float*>(std::aligned_alloc(64, capacity_ * sizeof(float)));
      if (!memory_) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
      prefer_huge_pages(memory_, capacity_ * sizeof(float));
    }
    return memory_;
  }

 private:
  float* memory_ = nullptr;
  int64_t capacity_ = 0;
};

// Slots are independent: one stays as it is while another is taken.
template <int slot = 0>
inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace llmos
