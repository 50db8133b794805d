// Memory between two guard zones. The zones hold NaN, so that what is read there shows up in the
// results, and must not change. AddressSanitizer stops at the first touch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif

class Guarded {
 public:
  // `shift`: by how many bytes the memory misses an address that is a multiple of 64
  Guarded(size_t bytes, size_t shift)
      : front_(kZone + shift), bytes_(bytes), total_((front_ + bytes + kZone + 63) / 64 * 64) {
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, total_));
    std::memset(memory_, 0xff, total_);
    ASAN_POISON_MEMORY_REGION(memory_, front_);
    ASAN_POISON_MEMORY_REGION(memory_ + front_ + bytes_, total_ - front_ - bytes_);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, total_);
    std::free(memory_);
  }

  uint8_t* data() { return memory_ + front_; }

  bool guards_hold() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, total_);
    bool hold = true;
    for (size_t i = 0; i < total_; ++i)
      if (i < front_ || i >= front_ + bytes_) hold = hold && memory_[i] == 0xff;
    ASAN_POISON_MEMORY_REGION(memory_, front_);
    ASAN_POISON_MEMORY_REGION(memory_ + front_ + bytes_, total_ - front_ - bytes_);
    return hold;
  }

 private:
  static constexpr size_t kZone = 64;
  size_t front_, bytes_, total_;
  uint8_t* memory_;
};
