// How stored elements are loaded into registers, for kernels that read each of them once.
//
// A chunk of kSpan stored elements fills kParts registers.  Which channels those hold differs:
// bfloat16 pairs are split into even and odd channels, bytes of two nibbles into the two halves of
// the head.  `place` says where the channels of a register lie in the output; `split_pairs` lays
// out queries and values to match Pairs, `join_pairs` undoes it.
#pragma once
#include "simd.h"

namespace saccade::SACCADE_TARGET {

template <class T>
struct Plain {
  using Element = T;
  static constexpr int kParts = 1, kSpan = W;
  SACCADE_INLINE void get(const T* p, F* x) { x[0] = load(p); }
  SACCADE_INLINE int place(int at, int, int) { return at; }
};

struct Pairs {
  using Element = Bf16;
  static constexpr int kParts = 2, kSpan = 2 * W;
  SACCADE_INLINE void get(const Bf16* p, F* x) { load_pairs(p, x[0], x[1]); }
  SACCADE_INLINE int place(int at, int part, int) { return at + part * W; }
};

struct Nibbles {
  using Element = uint8_t;
  static constexpr int kParts = 2, kSpan = W;
  SACCADE_INLINE void get(const uint8_t* p, F* x) { load_nibbles(p, x[0], x[1]); }
  SACCADE_INLINE int place(int at, int part, int length) { return at + part * length; }
};

// The first n elements of a chunk, the others 0.
template <class Source>
SACCADE_INLINE void get_part(const typename Source::Element* p, int n, F* x) {
  typename Source::Element chunk[Source::kSpan] = {};
  std::memcpy(chunk, p, n * sizeof *p);
  Source::get(chunk, x);
}

// Even channels of each chunk of 2 W first, then the odd ones: the order of Pairs.
SACCADE_INLINE void split_pairs(float* x, int dim) {
  for (int c = 0; c < dim; c += 2 * W) {
    float chunk[2 * W];
    std::memcpy(chunk, x + c, sizeof chunk);
    for (int i = 0; i < W; ++i) {
      x[c + i] = chunk[2 * i];
      x[c + W + i] = chunk[2 * i + 1];
    }
  }
}

SACCADE_INLINE void join_pairs(float* x, int dim) {
  for (int c = 0; c < dim; c += 2 * W) {
    float chunk[2 * W];
    std::memcpy(chunk, x + c, sizeof chunk);
    for (int i = 0; i < W; ++i) {
      x[c + 2 * i] = chunk[i];
      x[c + 2 * i + 1] = chunk[W + i];
    }
  }
}

}  // namespace saccade::SACCADE_TARGET
