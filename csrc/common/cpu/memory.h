// Scratch memory on cache lines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/numbers.h"

namespace longrope {

constexpr int64_t kCacheLine = 64;  // bytes

// Uninitialised room for `count` elements; goes where a pointer to them does.
template <typename E>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<E*>(std::aligned_alloc(
                  kCacheLine, round_up(count * static_cast<int64_t>(sizeof(E)) + 1, kCacheLine))),
              &std::free) {  // one byte more: never none
    if (!data_) throw std::bad_alloc();
  }
  operator E*() const { return data_.get(); }

 private:
  std::unique_ptr<E, void (*)(void*)> data_;
};

// Hands out pieces of memory, each on its own cache lines; of nullptr it only counts the bytes.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename E>
  E* take(int64_t count) {
    char* const taken = memory_ + used_;
    used_ = round_up(used_ + count * static_cast<int64_t>(sizeof(E)), kCacheLine);
    return reinterpret_cast<E*>(taken);
  }
  size_t bytes() const { return static_cast<size_t>(used_); }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace longrope
