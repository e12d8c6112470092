// Products of all rows of x with one or several packed weights, on all threads.
#pragma once
#include "linear_block.h"
#include "pool.h"

namespace saccade::SACCADE_TARGET {

class LinearProducts {
 public:
  explicit LinearProducts(const LinearProblem& p) : p_(p), x_(read_inputs(p)) {
    for (int i = 0; i < p_.num_outs; ++i) blocks_ += num_blocks(p_.weights[i]);
    for (int i = 0; i < p_.num_weights; ++i)
      bytes_ += p_.weights[i].out * p_.in * p_.weights[i].bits / 8;
  }

  void run() {
    // Waking a thread takes as long as reading some ten kilobytes of weights.
    const int64_t useful = 1 + bytes_ * min(p_.rows, 8) / (64 << 10);
    const int threads = (int)min(p_.threads, useful);
    per_item_ = max(1, blocks_ / (threads * 8));
    parallel_for(threads, ceil_div(blocks_, per_item_), run_item, this);
  }

 private:
  static void run_item(void* self, int64_t item) { ((LinearProducts*)self)->run(item); }

  void run(int64_t item) {
    const int64_t end = min(blocks_, (item + 1) * per_item_);
    for (int64_t i = item * per_item_; i < end; ++i) {
      int64_t weight = 0, block = i;
      while (block >= num_blocks(p_.weights[weight])) block -= num_blocks(p_.weights[weight++]);
      int64_t row = 0;
      for (; p_.rows - row >= kMostRows; row += kMostRows) compute<kMostRows>(weight, block, row);
      if (kMostRows > 4 && p_.rows - row >= 4) compute<4>(weight, block, row), row += 4;
      if (p_.rows - row >= 2) compute<2>(weight, block, row), row += 2;
      if (p_.rows - row >= 1) compute<1>(weight, block, row);
    }
  }

  template <int R>
  SACCADE_NOINLINE void compute(int64_t weight, int64_t block, int64_t row) {
    alignas(64) float y[R][kBlockRows];
    block_products<R>(p_.weights[weight], block, x_, row, y);
    add_bias<R>(weight, block, y);
    if (p_.gate != Gate::none) {
      alignas(64) float up[R][kBlockRows];
      block_products<R>(p_.weights[1], block, x_, row, up);
      add_bias<R>(1, block, up);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kBlockRows; i += W)
          store(y[r] + i, mul(gate(load(y[r] + i)), load(up[r] + i)));
    }
    const Matrix& out = p_.out[weight];
    const int64_t first = block * kBlockRows, n = min(kBlockRows, p_.weights[weight].out - first);
    const int64_t size = out.dtype == Dtype::f32 ? 4 : 2;
    for (int r = 0; r < R; ++r)
      store_any(y[r], out.data + (row + r) * out.row + first * size, out.dtype, n);
  }

  template <int R>
  void add_bias(int64_t weight, int64_t block, Products<R> y) {
    const Vector& bias = p_.bias[weight];
    if (!bias.data) return;
    const int64_t first = block * kBlockRows;
    const int n = (int)min(kBlockRows, p_.weights[weight].out - first);
    for (int i = 0; i < n; i += W) {
      const F b = load_some(bias.data, bias.dtype, first + i, min(W, n - i));
      for (int r = 0; r < R; ++r) store(y[r] + i, add(load(y[r] + i), b));
    }
  }

  F gate(F x) const {
    if (p_.gate == Gate::gelu_tanh) {
      const F cubic = mul(mul(x, x), mul(x, set1(0.044715f)));
      const F t = tanh(mul(add(x, cubic), set1(0.7978845608f)));
      return mul(mul(x, set1(0.5f)), add(t, set1(1.f)));
    }
    // x / (1 + e^-x), by the exponential of -|x| alone
    const F e = exp2_negative(mul(abs(x), set1(-kLog2e)));
    const F share = div(select(lt(x, zero()), e, set1(1.f)), add(set1(1.f), e));
    return mul(x, share);
  }

  const LinearProblem& p_;
  Inputs x_;
  int64_t blocks_ = 0, bytes_ = 0, per_item_ = 1;
};

static void products(const LinearProblem& p) { LinearProducts(p).run(); }

}  // namespace saccade::SACCADE_TARGET
