// Many rows of x: a part of a block of the weight becomes bfloat16 in the cache once, and all rows
// of x, as bfloat16, are multiplied with it.
#pragma once
#include "arena.h"
#include "linear_output.h"
#include "pool.h"
#include "workspace.h"

namespace saccade::SACCADE_TARGET {

#if defined(SACCADE_DOT)

constexpr int kStrip = kStripRows;  // rows of x at once: with two blocks, 24 sums in registers
constexpr int64_t kPart = 1024;     // columns of a panel: eight of them take 256 KiB of the L2 cache
constexpr int64_t kPairs = 4;       // of panels that read a strip of x while it is in the L1 cache

// Sixteen numbers of a column and sixteen of the next, as pairs, one a lane.
SACCADE_INLINE __m512i as_pairs(F even, F odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(halves, 1));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// panel[k / 2][row]: pairs of columns of a block, from column `first` to `end`.
template <int Bits>
static void fill_panel(const PackedMatrix& w, int64_t block, int64_t first, int64_t end,
                       Bf16* panel) {
  const uint8_t* q = block_data(w, block) + first / kColumns * bytes_at_once<Bits>();
  int64_t at = block_scales(w, block) + first / w.group * kBlockRows;
  const Columns<Bits> numbers(w);
  for (int64_t k = first; k < end; k += w.group, at += kBlockRows) {
    const F scale = load((const F16*)w.scale + at);
    const F minimum = w.minimum ? load((const F16*)w.minimum + at) : zero();
    for (int64_t c = 0; c < w.group; c += kColumns, q += bytes_at_once<Bits>())
      SACCADE_UNROLL for (int i = 0; i < kColumns; i += 2, panel += 2 * kBlockRows) {
        const F even = fma(numbers.get(q, 0, i), scale, minimum);
        const F odd = fma(numbers.get(q, 0, i + 1), scale, minimum);
        _mm512_storeu_si512(panel, as_pairs(even, odd));
      }
  }
}

// Adds the products of R rows of x, x[k / 2][R] as pairs, with B panels of n columns to y.
template <int R, int B>
SACCADE_INLINE void panel_products(Bf16* const (&panels)[2], const Bf16* x, int64_t n,
                                   float* y) {
  F sum[B][R];
  SACCADE_UNROLL for (int r = 0; r < R; ++r)
    SACCADE_UNROLL for (int b = 0; b < B; ++b) sum[b][r] = load(y + (b * R + r) * kBlockRows);
  for (int64_t k = 0; k < n; k += 2, x += 2 * R) {
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
    SACCADE_UNROLL for (int b = 0; b < B; ++b) store(y + (b * R + r) * kBlockRows, sum[b][r]);
}

class LinearPanels {
 public:
  explicit LinearPanels(const LinearProblem& p) : p_(p), output_(p) {
    strips_ = ceil_div(p_.rows, kStrip);
    for (int i = 0; i < p_.num_outs; ++i) pairs_ += pairs_of(p_.weights[i]);
    per_item_ = max(1, min(kPairs, pairs_ / (2 * p_.threads)));
  }

  void run() {
    parallel_for(p_.threads, strips_, [](void* c, int64_t i) { ((LinearPanels*)c)->strip(i); },
                 this);
    parallel_for(p_.threads, ceil_div(pairs_, per_item_), [](void* c, int64_t i) { ((LinearPanels*)c)->item(i); },
                 this);
  }

 private:
  bool is_gated() const { return p_.gate != Gate::none; }
  int64_t pairs_of(const PackedMatrix& w) const {
    return is_gated() ? num_blocks(w) : ceil_div(num_blocks(w), 2);
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

  // Two panels and the sums of all rows with them: two blocks of a weight, or one of gate and one
  // of up.
  struct Pair {
    int64_t weight, block;
    bool two;
    Bf16* panels[2];
    float* sums;
  };

  int place(int64_t first, int64_t n, Arena& arena, Pair* pairs) const {
    for (int64_t i = 0; i < n; ++i) {
      Pair& pair = pairs[i];
      for (Bf16*& panel : pair.panels) panel = arena.take<Bf16>(kPart * kBlockRows);
      pair.sums = arena.take<float>(strips_ * kStrip * 2 * kBlockRows);
      pair.weight = 0;
      int64_t at = first + i;
      while (at >= pairs_of(p_.weights[pair.weight])) at -= pairs_of(p_.weights[pair.weight++]);
      pair.block = is_gated() ? at : 2 * at;
      pair.two = is_gated() || pair.block + 1 < num_blocks(p_.weights[pair.weight]);
    }
    return (int)n;
  }

  void item(int64_t item) {
    Pair pairs[kPairs];
    const int64_t first = item * per_item_, count = min(per_item_, pairs_ - first);
    Arena sizes(nullptr);
    place(first, count, sizes, pairs);
    Arena arena(workspace(WorkspaceSlot::item, (size_t)sizes.bytes()));
    const int n = place(first, count, arena, pairs);
    for (int i = 0; i < n; ++i)
      std::memset(pairs[i].sums, 0, (size_t)(strips_ * kStrip * 2 * kBlockRows) * sizeof(float));
    for (int64_t k = 0; k < p_.in; k += kPart) {
      const int64_t end = min(p_.in, k + kPart);
      for (int i = 0; i < n; ++i) fill(pairs[i], k, end);
      each_strip([&]<int R>(int64_t s) {
        for (int i = 0; i < n; ++i) add<R>(s, pairs[i], k, end);
      });
    }
    each_strip([&]<int R>(int64_t s) {
      for (int i = 0; i < n; ++i) write<R>(s, pairs[i]);
    });
  }

  void fill(const Pair& pair, int64_t k, int64_t end) const {
    const auto fill_one = [&](const PackedMatrix& w, int64_t block, Bf16* panel) {
      for_bits(w.bits, [&]<int Bits>() { fill_panel<Bits>(w, block, k, end, panel); });
    };
    fill_one(p_.weights[pair.weight], pair.block, pair.panels[0]);
    if (!pair.two) return;
    const int64_t weight = is_gated() ? 1 : pair.weight;
    fill_one(p_.weights[weight], is_gated() ? pair.block : pair.block + 1, pair.panels[1]);
  }

  template <class Fn>
  void each_strip(Fn&& fn) const {
    for (int64_t s = 0; s < strips_; ++s) {
      switch (strip_rows(s)) {
        case 12: fn.template operator()<12>(s); break;
        case 8: fn.template operator()<8>(s); break;
        default: fn.template operator()<4>(s);
      }
    }
  }

  float* sums_of(int64_t strip, const Pair& pair) const {
    return pair.sums + strip * kStrip * 2 * kBlockRows;
  }

  template <int R>
  SACCADE_NOINLINE void add(int64_t strip, const Pair& pair, int64_t k, int64_t end) const {
    const Bf16* x = strip_at(strip) + k * R;
    if (pair.two) panel_products<R, 2>(pair.panels, x, end - k, sums_of(strip, pair));
    else panel_products<R, 1>(pair.panels, x, end - k, sums_of(strip, pair));
  }

  template <int R>
  SACCADE_NOINLINE void write(int64_t strip, const Pair& pair) const {
    auto* y = (float(*)[R][kBlockRows])sums_of(strip, pair);
    const int64_t row = strip * kStrip;
    if (is_gated()) return output_.write_gated<R>(pair.block, row, y[0], y[1]);
    output_.write<R>(pair.weight, pair.block, row, y[0]);
    if (pair.two) output_.write<R>(pair.weight, pair.block + 1, row, y[1]);
  }

  const LinearProblem& p_;
  const LinearOutput output_;
  int64_t strips_ = 0, pairs_ = 0, per_item_ = 1;
};

#endif

}  // namespace saccade::SACCADE_TARGET
