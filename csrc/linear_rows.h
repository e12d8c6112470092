// Packed weights back to plain rows: those of an embedding, or a run of them, which is faster.
#pragma once
#include "linear_simd.h"
#include "pool.h"

namespace saccade::SACCADE_TARGET {

// One number, with the centre taken off.
SACCADE_INLINE float number_at(const PackedMatrix& w, const uint8_t* block, int64_t row,
                               int64_t k, int centre) {
  if (w.bits == 8) return (float)(int8_t)block[k * kBlockRows + row];
  const int c = (int)(k % kColumns);
  const uint8_t* sixteen = block + (k - c) * kBlockRows * w.bits / 8;
  const auto bits_at = [&](int run) {
    uint32_t bits;
    std::memcpy(&bits, sixteen + (run * kBlockRows + row) * 4, sizeof bits);
    return bits;
  };
  uint32_t number = bits_at(c / 8) >> nibble_place(c & 7) & 15;
  if (w.bits == 6) number |= (bits_at(2) >> upper_place(c) & 3) << 4;
  return (float)((int)number - centre);
}

SACCADE_INLINE float scale_at(const uint16_t* p) {
  F16 lanes[W] = {{*p}};
  alignas(64) float wide[W];
  store(wide, load(lanes));
  return wide[0];
}

class ReadRows {
 public:
  explicit ReadRows(const RowsProblem& p) : p_(p), w_(p.weight), centre_(centre_of(p.weight)) {}

  void run() {
    first_block_ = p_.first / kBlockRows;
    const int64_t last = ceil_div(p_.first + p_.n, kBlockRows);
    const int64_t items = p_.index ? p_.n : last - first_block_;
    if (!p_.n) return;
    const int64_t useful = 1 + p_.n * w_.in / (32 << 10);
    parallel_for((int)min(p_.threads, useful), items, run_item, this);
  }

 private:
  static void run_item(void* self, int64_t item) {
    auto* rows = (ReadRows*)self;
    if (rows->p_.index) return rows->one_row(item);
    for_bits(rows->w_.bits, [&]<int Bits>() { rows->block<Bits>(rows->first_block_ + item); });
  }

  void one_row(int64_t item) {
    const int64_t block = p_.index[item] / kBlockRows, row = p_.index[item] % kBlockRows;
    const uint8_t* data = block_data(w_, block);
    alignas(64) float x[32];
    for (int64_t k = 0; k < w_.in; k += w_.group) {
      const int64_t at = block_scales(w_, block) + k / w_.group * kBlockRows + row;
      const float scale = scale_at(w_.scale + at);
      const float minimum = w_.minimum ? scale_at(w_.minimum + at) : 0.f;
      for (int64_t c = 0; c < w_.group; ++c)
        x[c] = number_at(w_, data, row, k + c, centre_) * scale + minimum;
      write(x, item, k, w_.group);
    }
  }

  // Sixteen rows: W columns at a time, transposed from one column a register to one row.
  template <int Bits>
  void block(int64_t block) {
    const uint8_t* q = block_data(w_, block);
    const Columns<Bits> numbers(w_);
    for (int lane = 0; lane < kBlockRows; lane += W) {
      const int64_t row = block * kBlockRows + lane - p_.first;  // of the output
      if (row + W <= 0 || row >= p_.n) continue;
      for (int64_t k = 0; k < w_.in; k += kColumns) {
        alignas(64) float x[W][kColumns];
        transposed(q + k / kColumns * bytes_at_once<Bits>(), block, lane, k, numbers, x);
        for (int i = 0; i < W; ++i)
          if (row + i >= 0 && row + i < p_.n) write(x[i], row + i, k, kColumns);
      }
    }
  }

  // x[i][c]: column k + c of row lane + i of the block.
  template <int Bits>
  SACCADE_INLINE_MEMBER void transposed(const uint8_t* q, int64_t block, int lane, int64_t k,
                                        const Columns<Bits>& numbers,
                                        float (&x)[W][kColumns]) const {
    const int64_t at = block_scales(w_, block) + k / w_.group * kBlockRows + lane;
    const F scale = load((const F16*)w_.scale + at);
    const F minimum = w_.minimum ? load((const F16*)w_.minimum + at) : zero();
    for (int first = 0; first < kColumns; first += W) {
      F r[W];
      SACCADE_UNROLL for (int i = 0; i < W; ++i)
        r[i] = fma(numbers.get(q, lane, first + i), scale, minimum);
      transpose(r);
      SACCADE_UNROLL for (int i = 0; i < W; ++i) store(x[i] + first, r[i]);
    }
  }

  void write(const float* x, int64_t row, int64_t k, int64_t n) const {
    const int64_t size = p_.out.dtype == Dtype::f32 ? 4 : 2;
    store_any(x, p_.out.data + row * p_.out.row + k * size, p_.out.dtype, n);
  }

  const RowsProblem& p_;
  const PackedMatrix& w_;
  int centre_;
  int64_t first_block_ = 0;
};

static void read_rows(const RowsProblem& p) { ReadRows(p).run(); }

}  // namespace saccade::SACCADE_TARGET
