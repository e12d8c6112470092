// Products of rows of x with one or several packed weights, on all threads.
#pragma once
#include "linear_block.h"
#include "linear_panels.h"
#include "pool.h"

namespace saccade::SACCADE_TARGET {

class LinearProducts {
 public:
  explicit LinearProducts(const LinearProblem& p) : p_(p), output_(p), x_(read_inputs(p)) {
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
  SACCADE_NOINLINE void compute(int64_t weight, int64_t block, int64_t row) const {
    alignas(64) float y[R][kBlockRows], up[R][kBlockRows];
    block_products<R>(p_.weights[weight], block, x_, row, y);
    if (p_.gate == Gate::none) return output_.write<R>(weight, block, row, y);
    block_products<R>(p_.weights[1], block, x_, row, up);
    output_.write_gated<R>(block, row, y, up);
  }

  const LinearProblem& p_;
  const LinearOutput output_;
  Inputs x_;
  int64_t blocks_ = 0, bytes_ = 0, per_item_ = 1;
};

static void products(const LinearProblem& p) {
#if defined(SACCADE_DOT)
  if (p.scratch) return LinearPanels(p).run();
#endif
  LinearProducts(p).run();
}

}  // namespace saccade::SACCADE_TARGET
