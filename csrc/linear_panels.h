// Many rows of x: a block of the weight becomes bfloat16 in the cache once, and all rows of x, as
// bfloat16, are multiplied with it.
#pragma once
#include "linear_output.h"
#include "pool.h"
#include "workspace.h"

namespace saccade::SACCADE_TARGET {

#if defined(SACCADE_DOT)

constexpr int kStrip = kStripRows;  // rows of x at once: with two blocks, 24 sums in registers

// Sixteen numbers of a column and sixteen of the next, as pairs, one a lane.
SACCADE_INLINE __m512i as_pairs(F even, F odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// panel[k / 2][row]: pairs of columns of a block.
static void fill_panel(const PackedMatrix& w, int64_t block, Bf16* panel) {
  const uint8_t* q = block_data(w, block);
  int64_t at = block_scales(w, block);
  const NibbleTable table(centre_of(w));
  for (int64_t k = 0; k < w.in; k += w.group, at += kBlockRows) {
    const F scale = load((const F16*)w.scale + at);
    const F minimum = w.minimum ? load((const F16*)w.minimum + at) : zero();
    for (int64_t c = 0; c < w.group; c += 8, panel += 8 * kBlockRows) {
      F x[8];
      if (w.bits == 8) {
        SACCADE_UNROLL for (int i = 0; i < 8; ++i)
          x[i] = load_signed((const int8_t*)q + i * kBlockRows);
      } else {
        const I numbers = loadi((const int32_t*)q);
        SACCADE_UNROLL for (int i = 0; i < 8; ++i) x[i] = table.get(numbers, nibble_place(i));
      }
      q += kBlockRows * w.bits;
      SACCADE_UNROLL for (int i = 0; i < 8; ++i) x[i] = fma(x[i], scale, minimum);
      SACCADE_UNROLL for (int i = 0; i < 8; i += 2)
        _mm512_storeu_si512(panel + i * kBlockRows, as_pairs(x[i], x[i + 1]));
    }
  }
}

// The products of R rows of x, x[k / 2][R] as pairs, with B panels.
template <int R, int B>
SACCADE_INLINE void panel_products(const Bf16* const (&panels)[2], const Bf16* x, int64_t in,
                                   float (&y)[2][R][kBlockRows]) {
  F sum[B][R];
  SACCADE_UNROLL for (int r = 0; r < R; ++r)
    SACCADE_UNROLL for (int b = 0; b < B; ++b) sum[b][r] = zero();
  for (int64_t k = 0; k < in; k += 2, x += 2 * R) {
    __m512i weights[B];
    SACCADE_UNROLL for (int b = 0; b < B; ++b)
      weights[b] = _mm512_loadu_si512(panels[b] + k * kBlockRows);
    SACCADE_UNROLL for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + 2 * r, sizeof pair);
      const __m512i wide = _mm512_set1_epi32(pair);
      SACCADE_UNROLL for (int b = 0; b < B; ++b) sum[b][r] = dot_pairs(weights[b], wide, sum[b][r]);
    }
  }
  SACCADE_UNROLL for (int r = 0; r < R; ++r)
    SACCADE_UNROLL for (int b = 0; b < B; ++b) store(y[b][r], sum[b][r]);
}

class LinearPanels {
 public:
  explicit LinearPanels(const LinearProblem& p) : p_(p), output_(p) {
    strips_ = ceil_div(p_.rows, kStrip);
    for (int i = 0; i < p_.num_outs; ++i) items_ += items_of(p_.weights[i]);
  }

  void run() {
    parallel_for(p_.threads, strips_, [](void* c, int64_t i) { ((LinearPanels*)c)->strip(i); },
                 this);
    parallel_for(p_.threads, items_, [](void* c, int64_t i) { ((LinearPanels*)c)->item(i); },
                 this);
  }

 private:
  // Two panels an item: two blocks of a weight, or one of gate and one of up.
  int64_t items_of(const PackedMatrix& w) const {
    return p_.gate == Gate::none ? ceil_div(num_blocks(w), 2) : num_blocks(w);
  }

  // The rows of a strip, filled up to a multiple of four.
  int64_t strip_rows(int64_t strip) const {
    return min(kStrip, ceil_div(p_.rows - strip * kStrip, 4) * 4);
  }
  Bf16* strip_at(int64_t strip) const { return (Bf16*)p_.scratch + strip * kStrip * p_.in; }

  void strip(int64_t strip) {
    const int64_t rows = strip_rows(strip);
    Bf16* to = strip_at(strip);
    for (int64_t k = 0; k < p_.in; k += W) {
      alignas(64) Bf16 x[kStrip][W];
      std::memset(x, 0, sizeof x);
      for (int64_t r = 0; r < min(rows, p_.rows - strip * kStrip); ++r) {
        const char* from = p_.x.data + (strip * kStrip + r) * p_.x.row;
        store(x[r], load_any(from, p_.x.dtype, k));
      }
      for (int c = 0; c < W; c += 2)
        for (int64_t r = 0; r < rows; ++r, to += 2) std::memcpy(to, x[r] + c, 4);
    }
  }

  void item(int64_t item) {
    int64_t weight = 0;
    while (item >= items_of(p_.weights[weight])) item -= items_of(p_.weights[weight++]);
    const bool gated = p_.gate != Gate::none;
    const int64_t block = gated ? item : 2 * item;
    const bool two = gated || block + 1 < num_blocks(p_.weights[weight]);
    const int64_t size = p_.in * kBlockRows;
    auto* panel = (Bf16*)workspace(WorkspaceSlot::item, (size_t)(2 * size) * sizeof(Bf16));
    const Bf16* const panels[2] = {panel, panel + size};
    fill_panel(p_.weights[weight], block, panel);
    if (two) fill_panel(p_.weights[gated ? 1 : weight], gated ? block : block + 1, panel + size);
    for (int64_t s = 0; s < strips_; ++s) {
      switch (strip_rows(s)) {
        case 12: multiply<12>(weight, block, s, panels, two); break;
        case 8: multiply<8>(weight, block, s, panels, two); break;
        default: multiply<4>(weight, block, s, panels, two);
      }
    }
  }

  template <int R>
  SACCADE_NOINLINE void multiply(int64_t weight, int64_t block, int64_t strip,
                                 const Bf16* const (&panels)[2], bool two) const {
    alignas(64) float y[2][R][kBlockRows];
    if (two) panel_products<R, 2>(panels, strip_at(strip), p_.in, y);
    else panel_products<R, 1>(panels, strip_at(strip), p_.in, y);
    const int64_t row = strip * kStrip;
    if (p_.gate != Gate::none) return output_.write_gated<R>(block, row, y[0], y[1]);
    output_.write<R>(weight, block, row, y[0]);
    if (two) output_.write<R>(weight, block + 1, row, y[1]);
  }

  const LinearProblem& p_;
  const LinearOutput output_;
  int64_t strips_ = 0, items_ = 0;
};

#endif

}  // namespace saccade::SACCADE_TARGET
