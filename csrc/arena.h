// Where the arrays of a kernel lie in its workspace.
#pragma once
#include <cstdint>

#include "intmath.h"

namespace saccade::SACCADE_TARGET {

// Cuts one workspace into arrays aligned to 64 bytes.  Without memory it only adds up their sizes,
// so that the same code says how much a kernel needs and where each array lies.
class Arena {
 public:
  explicit Arena(void* memory) : base_((char*)memory) {}
  template <class T>
  T* take(int64_t n) {
    T* p = base_ ? (T*)(base_ + bytes_) : nullptr;
    bytes_ += ceil_div(n * (int64_t)sizeof(T), 64) * 64 + 64;
    return p;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace saccade::SACCADE_TARGET
