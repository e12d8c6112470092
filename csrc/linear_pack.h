// Rows of a file, in its blocks or as plain numbers, to packed weights.
#pragma once
#include <atomic>

#include "linear_blocks.h"
#include "pool.h"

namespace saccade::SACCADE_TARGET {

SACCADE_INLINE bool is_plain(BlockKind kind) { return kind >= BlockKind::f32; }

// Numbers and bytes of a unit, the run of a row that is unpacked at once.
SACCADE_INLINE int64_t unit_numbers(BlockKind kind) {
  return kind >= BlockKind::q4_k && !is_plain(kind) ? 256 : 32;
}
SACCADE_INLINE int64_t unit_bytes(BlockKind kind) {
  constexpr int64_t kBytes[] = {18, 20, 22, 24, 34, 144, 176, 210, 128, 64, 64};
  return kBytes[(int)kind];
}

// Sixteen float32 to float16; false where one leaves the range.
SACCADE_INLINE bool write_halves(const float* x, uint16_t* half) {
  F far = zero();
  for (int i = 0; i < kBlockRows; i += W) {
    store((F16*)half + i, load(x + i));
    far = fma(load((const F16*)half + i), zero(), far);  // NaN where one is infinite
  }
  return hsum(far) == 0.f;
}

SACCADE_INLINE float as_half(float x) {
  alignas(64) float lanes[W] = {x};
  F16 half[W];
  store(half, load(lanes));
  store(lanes, load(half));
  return lanes[0];
}

// Eight numbers of 4 bits, a byte each, in the order of linear.h.
SACCADE_INLINE uint32_t eight_nibbles(const uint8_t* q) {
  uint64_t x;
  std::memcpy(&x, q, sizeof x);
  const auto gather = [](uint64_t every_other) {
    return (uint32_t)(every_other | every_other >> 12 | every_other >> 24 | every_other >> 36) &
           0xffff;
  };
  return gather(x & 0x000f000f000f000f) | gather(x >> 8 & 0x000f000f000f000f) << 16;
}

// The upper two of the 6 bits of sixteen numbers.
SACCADE_INLINE uint32_t sixteen_uppers(const uint8_t* q) {
  uint32_t bits = 0;
  for (int c = 0; c < kColumns; ++c) bits |= (uint32_t)(q[c] >> 4 & 3) << upper_place(c);
  return bits;
}

class Pack {
 public:
  explicit Pack(const PackProblem& p)
      : p_(p), w_(p.weight), unit_(unit_numbers(p.kind)), groups_(unit_ / w_.group) {}

  bool run() {
    parallel_for(p_.threads, num_blocks(w_), [](void* c, int64_t i) { ((Pack*)c)->block(i); },
                 this);
    return in_range_.load();
  }

 private:
  void block(int64_t block) {
    const int64_t rows = min(kBlockRows, w_.out - block * kBlockRows);
    Unpacked units[kBlockRows];
    std::memset(units, 0, sizeof units);
    bool in_range = true;
    for (int64_t k = 0; k < w_.in; k += unit_) {
      for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* row = p_.raw + (block * kBlockRows + r) * p_.row;
        const uint8_t* raw = row + k / unit_ * unit_bytes(p_.kind);
        if (is_plain(p_.kind)) in_range &= round_numbers(raw, units[r]);
        else unpack_block(p_.kind, raw, units[r]);
      }
      in_range &= write_scales(units, block_scales(w_, block) + k / w_.group * kBlockRows);
      uint8_t* to = w_.qdata + (block * w_.in + k) * kBlockRows * w_.bits / 8;
      if (w_.bits == 4) write_nibbles(units, to);
      else if (w_.bits == 6) write_sixes(units, to);
      else write_bytes(units, to);
    }
    if (!in_range) in_range_.store(false, std::memory_order_relaxed);
  }

  bool write_scales(const Unpacked* units, int64_t at) {
    bool in_range = true;
    for (int64_t g = 0; g < groups_; ++g, at += kBlockRows) {
      alignas(64) float scale[kBlockRows], minimum[kBlockRows];
      for (int r = 0; r < kBlockRows; ++r) {
        scale[r] = units[r].scale[g];
        minimum[r] = units[r].minimum[g];
      }
      in_range &= write_halves(scale, w_.scale + at);
      if (w_.minimum) in_range &= write_halves(minimum, w_.minimum + at);
    }
    return in_range;
  }

  void write_nibbles(const Unpacked* units, uint8_t* to) const {
    for (int64_t k = 0; k < unit_; k += 8)
      for (int r = 0; r < kBlockRows; ++r, to += 4) {
        const uint32_t eight = eight_nibbles(units[r].q + k);
        std::memcpy(to, &eight, sizeof eight);
      }
  }

  void write_sixes(const Unpacked* units, uint8_t* to) const {
    for (int64_t k = 0; k < unit_; k += kColumns)
      for (int run = 0; run < 3; ++run)
        for (int r = 0; r < kBlockRows; ++r, to += 4) {
          const uint8_t* q = units[r].q + k;
          const uint32_t bits = run < 2 ? eight_nibbles(q + 8 * run) : sixteen_uppers(q);
          std::memcpy(to, &bits, sizeof bits);
        }
  }

  void write_bytes(const Unpacked* units, uint8_t* to) const {
    for (int64_t k = 0; k < unit_; ++k, to += kBlockRows)
      for (int r = 0; r < kBlockRows; ++r) to[r] = units[r].q[k];
  }

  // A group of 32 plain numbers to the nearest ones; false where one is not finite.
  bool round_numbers(const uint8_t* raw, Unpacked& u) const {
    constexpr Dtype kDtypes[] = {Dtype::f32, Dtype::bf16, Dtype::f16};
    const Dtype dtype = kDtypes[(int)p_.kind - (int)BlockKind::f32];
    alignas(64) float x[32];
    F probe = zero();
    for (int i = 0; i < 32; i += W) {
      const F value = load_any((const char*)raw, dtype, i);
      store(x + i, value);
      probe = fma(value, zero(), probe);
    }
    float low = x[0], high = x[0];
    for (float value : x) {
      low = value < low ? value : low;
      high = value > high ? value : high;
    }
    const bool four = w_.bits == 4;
    const float largest = high > -low ? high : -low;
    u.minimum[0] = four ? as_half(low) : 0.f;
    u.scale[0] = as_half(four ? (high - u.minimum[0]) / 15.f : largest / 127.f);
    const float step = u.scale[0] == 0.f ? 0.f : 1.f / u.scale[0];
    const float from = four ? 0.f : -127.f, to = four ? 15.f : 127.f;
    for (int i = 0; i < 32; ++i) {
      float q = __builtin_rintf((x[i] - u.minimum[0]) * step);
      q = q > from ? q : from;  // NaN too
      u.q[i] = (uint8_t)(int)(q < to ? q : to);
    }
    return hsum(probe) == 0.f;
  }

  const PackProblem& p_;
  const PackedMatrix& w_;
  int64_t unit_, groups_;
  std::atomic<bool> in_range_{true};
};

static bool pack(const PackProblem& p) { return Pack(p).run(); }

}  // namespace saccade::SACCADE_TARGET
