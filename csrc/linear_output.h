// What happens to the products of a block before they are stored: bias, gate, the output's dtype.
#pragma once
#include "linear_simd.h"

namespace saccade::SACCADE_TARGET {

// y[r][i]: row `row + r` of x times row i of a block.
template <int R>
using Products = float (&)[R][kBlockRows];

SACCADE_INLINE F silu(F x) {
  // x / (1 + e^-x), by the exponential of -|x| alone
  const F e = exp2_negative(mul(abs(x), set1(-kLog2e)));
  return mul(x, div(select(lt(x, zero()), e, set1(1.f)), add(set1(1.f), e)));
}

SACCADE_INLINE F gelu_tanh(F x) {
  const F cubic = mul(mul(x, x), mul(x, set1(0.044715f)));
  const F t = tanh(mul(add(x, cubic), set1(0.7978845608f)));
  return mul(mul(x, set1(0.5f)), add(t, set1(1.f)));
}

class LinearOutput {
 public:
  explicit LinearOutput(const LinearProblem& p) : p_(p) {}

  template <int R>
  void write(int64_t weight, int64_t block, int64_t row, Products<R> y) const {
    add_bias<R>(weight, block, y);
    store_rows<R>(weight, block, row, y);
  }

  template <int R>
  void write_gated(int64_t block, int64_t row, Products<R> gate, Products<R> up) const {
    add_bias<R>(0, block, gate);
    add_bias<R>(1, block, up);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kBlockRows; i += W) {
        const F x = load(gate[r] + i);
        const F share = p_.gate == Gate::silu ? silu(x) : gelu_tanh(x);
        store(gate[r] + i, mul(share, load(up[r] + i)));
      }
    store_rows<R>(0, block, row, gate);
  }

 private:
  template <int R>
  void store_rows(int64_t weight, int64_t block, int64_t row, Products<R> y) const {
    const Matrix& out = p_.out[weight];
    const int64_t first = block * kBlockRows, n = min(kBlockRows, p_.weights[weight].out - first);
    const int64_t size = out.dtype == Dtype::f32 ? 4 : 2;
    for (int64_t r = 0; r < min(R, p_.rows - row); ++r)
      store_any(y[r], out.data + (row + r) * out.row + first * size, out.dtype, n);
  }

  template <int R>
  void add_bias(int64_t weight, int64_t block, Products<R> y) const {
    const Vector& bias = p_.bias[weight];
    if (!bias.data) return;
    const int64_t first = block * kBlockRows, n = min(kBlockRows, p_.weights[weight].out - first);
    for (int i = 0; i < n; i += W) {
      const F b = load_some(bias.data, bias.dtype, first + i, min(W, n - i));
      for (int r = 0; r < R; ++r) store(y[r] + i, add(load(y[r] + i), b));
    }
  }

  const LinearProblem& p_;
};

}  // namespace saccade::SACCADE_TARGET
