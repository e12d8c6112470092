// A decoder layer for a few rows: everything but the cache and attention (layer.h).
#pragma once
#include <cmath>

#include "products.h"

namespace saccade::SACCADE_TARGET {

template <class Do>
SACCADE_INLINE void each_vector(int64_t n, Do&& with) {
  for (int64_t i = 0; i < n; i += W) with(i, (int)std::min<int64_t>(W, n - i));
}

SACCADE_INLINE F lanes(const float* x, int64_t i, int count) {
  return count == W ? load(x + i) : load_part(x + i, count);
}

SACCADE_INLINE void put(float* x, int64_t i, int count, F values) {
  if (count == W) return store(x + i, values);
  store_part(x + i, values, count);
}

// Lanes of numbers in any of the float dtypes.
SACCADE_INLINE F lanes(const Numbers& x, int64_t i, int count) {
  if (x.dtype == Dtype::bf16) return load_part((const Bf16*)x.data + i, count);
  if (x.dtype == Dtype::f16) return load_part((const F16*)x.data + i, count);
  return lanes((const float*)x.data, i, count);
}

SACCADE_INLINE void put(const Numbers& x, int64_t i, int count, F values) {
  if (x.dtype == Dtype::bf16) return store_part((Bf16*)x.data + i, values, count);
  if (x.dtype == Dtype::f16) return store_part((F16*)x.data + i, values, count);
  put((float*)x.data, i, count, values);
}

static void narrow(const float* x, int64_t n, Numbers to) {
  each_vector(n, [&](int64_t i, int count) { put(to, i, count, lanes(x, i, count)); });
}

static void widen(Numbers x, int64_t n, float* y) {
  each_vector(n, [&](int64_t i, int count) { put(y, i, count, lanes(x, i, count)); });
}

// y = the norm of x `[n]`; x itself without a weight.  Both may be the same memory.
static void normalize(const Norm& norm, const float* x, int64_t n, float* y) {
  if (!norm.weight.data) {
    if (x != y) std::memcpy(y, x, (size_t)n * sizeof(float));
    return;
  }
  F squares = zero();
  each_vector(n, [&](int64_t i, int count) {
    const F at = lanes(x, i, count);
    squares = fma(at, at, squares);
  });
  const F factor = set1(1.f / std::sqrt(hsum(squares) / (float)n + norm.eps));
  const F one = set1(norm.plus_one ? 1.f : 0.f);
  each_vector(n, [&](int64_t i, int count) {
    const F weight = add(lanes(norm.weight, i, count), one);
    put(y, i, count, mul(mul(lanes(x, i, count), factor), weight));
  });
}

// x += factor times the norm of delta `[n]`, which is overwritten.
static void add_normalized(const Norm& norm, float factor, float* delta, int64_t n, float* x) {
  normalize(norm, delta, n, delta);
  each_vector(n, [&](int64_t i, int count) {
    put(x, i, count, fma(lanes(delta, i, count), set1(factor), lanes(x, i, count)));
  });
}

// A head, rotated by halves: (a, b) -> (a cos - b sin, b cos + a sin).
static void rotate_head(float* x, int64_t rotated, const float* cos, const float* sin) {
  const int64_t half = rotated / 2;
  each_vector(half, [&](int64_t i, int count) {
    const F a = lanes(x, i, count), b = lanes(x, half + i, count);
    put(x, i, count, sub(mul(a, lanes(cos, i, count)), mul(b, lanes(sin, i, count))));
    put(x, half + i, count,
        fma(b, lanes(cos, half + i, count), mul(a, lanes(sin, half + i, count))));
  });
}

// The heads of one token, after their norm.
static void rotate_heads(const Norm& norm, float* x, int64_t heads, int64_t dim,
                         const LayerFront& f, int64_t token) {
  const float *cos = f.cos + token * f.rotated, *sin = f.sin + token * f.rotated;
  const bool whole = norm.size == heads * dim;
  if (whole) normalize(norm, x, heads * dim, x);
  for (int64_t h = 0; h < heads; ++h) {
    if (!whole) normalize(norm, x + h * dim, dim, x + h * dim);
    rotate_head(x + h * dim, f.rotated, cos, sin);
  }
}

// The orthonormal Walsh-Hadamard transform of a head; see hadamard.h, which serves many.
static void transform_head(float* x, int64_t dim) {
  const int64_t block = dim & -dim;
  for (int64_t half = 1; half < block; half *= 2)
    for (int64_t at = 0; at < dim; at += 2 * half)
      for (int64_t d = at; d < at + half; ++d) {
        const float a = x[d], b = x[d + half];
        x[d] = a + b;
        x[d + half] = a - b;
      }
  const F factor = set1(1.f / std::sqrt((float)block));
  each_vector(dim, [&](int64_t i, int count) {
    put(x, i, count, mul(lanes(x, i, count), factor));
  });
}

// Whether float16 holds numbers `[n]`: none too large, and the largest not among its smallest.
static bool fits_half(const float* x, int64_t n) {
  constexpr float kLargest = 65504.f, kSmallest = 0x1p-14f;
  F found = zero();
  each_vector(n, [&](int64_t i, int count) { found = max(found, abs(lanes(x, i, count))); });
  const float largest = hmax(found);
  return largest <= kLargest && (largest >= kSmallest || largest == 0.f);
}

SACCADE_INLINE Numbers place(const Strided& x, int64_t batch, int64_t head, int64_t row) {
  return {x.data + batch * x.batch + head * x.head + row * x.row, x.dtype};
}

// Stores rows [rows, kv_heads, dim] of keys or values; false where they are out of bounds.
static bool store_heads(const Layer& layer, const LayerFront& f, float* x, const Strided& to) {
  const int64_t dim = layer.head_dim, heads = f.batch * f.tokens * layer.kv_heads;
  if (f.storing.hadamard)
    for (int64_t i = 0; i < heads; ++i) transform_head(x + i * dim, dim);
  if (f.storing.bounded && !fits_half(x, heads * dim)) return false;
  for (int64_t i = 0; i < heads; ++i) {
    const int64_t row = i / layer.kv_heads;
    narrow(x + i * dim, dim, place(to, row / f.tokens, i % layer.kv_heads, row % f.tokens));
  }
  return true;
}

static bool layer_front(const Layer& layer, const LayerFront& f) {
  const int64_t rows = f.batch * f.tokens, dim = layer.head_dim, hidden = layer.hidden;
  const int64_t q_width = layer.heads * dim, kv_width = layer.kv_heads * dim;
  float* normed = f.scratch;
  float* k = normed + rows * hidden;
  float* v = k + rows * kv_width;
  for (int64_t r = 0; r < rows; ++r)
    normalize(layer.attention_norm, f.x + r * hidden, hidden, normed + r * hidden);
  const Weight* weights[] = {&layer.q, &layer.k, &layer.v};
  float* products[] = {f.q, k, v};
  multiply_each(weights, products, 3, normed, rows, f.threads);
  for (int64_t r = 0; r < rows; ++r) {
    rotate_heads(layer.q_norm, f.q + r * q_width, layer.heads, dim, f, r % f.tokens);
    rotate_heads(layer.k_norm, k + r * kv_width, layer.kv_heads, dim, f, r % f.tokens);
  }
  return store_heads(layer, f, k, f.k) && store_heads(layer, f, v, f.v);
}

// x / (1 + e^-x); never overflows.
SACCADE_INLINE F silu(F x) {
  const F e = exp2_negative(mul(abs(x), set1(-kLog2e)));
  const F share = div(select(lt(x, zero()), e, set1(1.f)), add(set1(1.f), e));
  return mul(x, share);
}

SACCADE_INLINE F gelu_tanh(F x) {
  const F cube = mul(mul(x, x), x);
  const F inner = mul(fma(cube, set1(0.044715f), x), set1(0.7978845608028654f));
  return mul(mul(x, set1(0.5f)), add(set1(1.f), tanh(inner)));
}

// gate = act(gate) * up.
static void gate_by(Activation activation, float* gate, const float* up, int64_t n) {
  each_vector(n, [&](int64_t i, int count) {
    const F x = lanes(gate, i, count);
    const F on = activation == Activation::silu ? silu(x) : gelu_tanh(x);
    put(gate, i, count, mul(on, lanes(up, i, count)));
  });
}

static void layer_back(const Layer& layer, const LayerBack& b) {
  const int64_t hidden = layer.hidden;
  float* row = b.scratch;  // [rows, hidden]
  float* gate = row + b.rows * hidden;
  float* up = gate + b.rows * layer.inner;
  multiply(layer.o, b.attended, b.rows, row, b.threads);
  for (int64_t r = 0; r < b.rows; ++r) {
    add_normalized(layer.attended_norm, layer.residual, row + r * hidden, hidden, b.x + r * hidden);
    normalize(layer.mlp_norm, b.x + r * hidden, hidden, row + r * hidden);
  }
  const Weight* weights[] = {&layer.gate, &layer.up};
  float* products[] = {gate, up};
  multiply_each(weights, products, 2, row, b.rows, b.threads);
  gate_by(layer.activation, gate, up, b.rows * layer.inner);
  multiply(layer.down, gate, b.rows, row, b.threads);
  for (int64_t r = 0; r < b.rows; ++r)
    add_normalized(layer.mlp_out_norm, layer.residual, row + r * hidden, hidden, b.x + r * hidden);
}

}  // namespace saccade::SACCADE_TARGET
