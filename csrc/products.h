// Products of a few rows with matrices: the work is reading each matrix once.
#pragma once
#include <algorithm>

#include "layer.h"
#include "pool.h"
#include "simd.h"

namespace saccade::SACCADE_TARGET {

// Sums of R rows of x with two rows of a matrix: 4 R chains of additions.
template <class T, int R>
static void dot_two(const T* w0, const T* w1, const float* x, int64_t stride, int64_t n,
                    float (&sums)[2][R]) {
  F a[2][R][2];
  SACCADE_UNROLL for (int r = 0; r < R; ++r)
    a[0][r][0] = a[0][r][1] = a[1][r][0] = a[1][r][1] = zero();
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    SACCADE_UNROLL for (int half = 0; half < 2; ++half) {
      const F first = load(w0 + i + half * W), second = load(w1 + i + half * W);
      SACCADE_UNROLL for (int r = 0; r < R; ++r) {
        const F at = load(x + r * stride + i + half * W);
        a[0][r][half] = fma(first, at, a[0][r][half]);
        a[1][r][half] = fma(second, at, a[1][r][half]);
      }
    }
  }
  for (; i < n; i += W) {
    const int count = (int)std::min<int64_t>(W, n - i);
    const F first = load_part(w0 + i, count), second = load_part(w1 + i, count);
    SACCADE_UNROLL for (int r = 0; r < R; ++r) {
      const F at = load_part(x + r * stride + i, count);
      a[0][r][0] = fma(first, at, a[0][r][0]);
      a[1][r][0] = fma(second, at, a[1][r][0]);
    }
  }
  SACCADE_UNROLL for (int r = 0; r < R; ++r)
    SACCADE_UNROLL for (int w = 0; w < 2; ++w) sums[w][r] = hsum(add(a[w][r][0], a[w][r][1]));
}

SACCADE_INLINE float number_at(const Numbers& v, int64_t i) {
  if (v.dtype == Dtype::f32) return ((const float*)v.data)[i];
  float lanes[W];
  store(lanes, v.dtype == Dtype::bf16 ? load_part((const Bf16*)v.data + i, 1)
                                      : load_part((const F16*)v.data + i, 1));
  return lanes[0];
}

// Rows begin .. end of a matrix times `count` <= 4 rows of x, into y `[rows, m.out]`.
template <class T, int R>
static void plain_rows(const Weight& m, const float* x, float* y, int64_t begin, int64_t end) {
  const T* w = (const T*)m.numbers.data;
  for (int64_t row = begin; row < end; row += 2) {
    const bool two = row + 1 < end;
    float sums[2][R];
    dot_two<T, R>(w + row * m.in, w + (two ? row + 1 : row) * m.in, x, m.in, m.in, sums);
    for (int i = 0; i <= (int)two; ++i) {
      const float bias = m.bias.data ? number_at(m.bias, row + i) : 0.f;
      for (int r = 0; r < R; ++r) y[r * m.out + row + i] = sums[i][r] + bias;
    }
  }
}

template <class T>
static void plain_product(const Weight& m, const float* x, int64_t rows, float* y, int64_t begin,
                          int64_t end) {
  for (int64_t r = 0; r < rows; r += 4) {
    const float* from = x + r * m.in;
    float* to = y + r * m.out;
    switch (std::min<int64_t>(4, rows - r)) {
      case 1: plain_rows<T, 1>(m, from, to, begin, end); break;
      case 2: plain_rows<T, 2>(m, from, to, begin, end); break;
      case 3: plain_rows<T, 3>(m, from, to, begin, end); break;
      default: plain_rows<T, 4>(m, from, to, begin, end);
    }
  }
}

// Rows begin .. end of y = x times the transposed matrix, plus its bias.
static void product_rows(const Weight& m, const float* x, int64_t rows, float* y, int64_t begin,
                         int64_t end) {
  switch (m.numbers.dtype) {
    case Dtype::bf16: return plain_product<Bf16>(m, x, rows, y, begin, end);
    case Dtype::f16: return plain_product<F16>(m, x, rows, y, begin, end);
    default: return plain_product<float>(m, x, rows, y, begin, end);
  }
}

// Products of the same rows of x with up to three weights of plain numbers, as one list of work.
struct PlainProducts {
  static constexpr int64_t kBlock = 16;  // rows of a weight that one item is a multiple of
  const Weight* weights[3];
  float* y[3];
  int count;
  const float* x;
  int64_t rows, step;

  int64_t items(int i) const { return (weights[i]->out + step - 1) / step; }

  static void run_item(void* context, int64_t item) {
    const PlainProducts& all = *(const PlainProducts*)context;
    for (int i = 0; i < all.count; ++i) {
      if (item < all.items(i)) {
        const int64_t begin = item * all.step;
        product_rows(*all.weights[i], all.x, all.rows, all.y[i], begin,
                     std::min(begin + all.step, all.weights[i]->out));
        return;
      }
      item -= all.items(i);
    }
  }

  void run(int threads) {
    int64_t total = 0, work = 0, number = 0;
    for (int i = 0; i < count; ++i) {
      total += weights[i]->out;
      work += weights[i]->out * weights[i]->in;
    }
    if (work < (1 << 15)) threads = 1;  // waking a thread costs more than it saves
    const int64_t parts = threads == 1 ? 1 : 4 * threads;
    step = std::max(kBlock, (total / parts + kBlock - 1) / kBlock * kBlock);
    for (int i = 0; i < count; ++i) number += items(i);
    parallel_for(threads, number, run_item, this);
  }
};

extern const LinearKernels linear_kernels;  // linear_kernels.cpp

// y[i] `[rows, out]` = products of the rows of x with up to three weights of equally many columns.
static void multiply_each(const Weight* const* weights, float* const* y, int count, const float* x,
                          int64_t rows, int threads) {
  PlainProducts plain{{}, {}, 0, x, rows, 0};
  LinearProblem packed{};
  for (int i = 0; i < count; ++i) {
    const Weight& w = *weights[i];
    if (!w.is_packed) {
      plain.weights[plain.count] = &w;
      plain.y[plain.count++] = y[i];
      continue;
    }
    const int n = packed.num_weights++;
    packed.weights[n] = w.packed;
    packed.bias[n] = {w.bias.data, w.bias.dtype};
    packed.out[n] = {(char*)y[i], Dtype::f32, w.out * (int64_t)sizeof(float)};
  }
  if (plain.count) plain.run(threads);
  if (!packed.num_weights) return;
  packed.x = {(char*)x, Dtype::f32, weights[0]->in * (int64_t)sizeof(float)};
  packed.rows = rows;
  packed.in = weights[0]->in;
  packed.num_outs = packed.num_weights;
  packed.threads = threads;
  linear_kernels.products(packed);
}

static void multiply(const Weight& m, const float* x, int64_t rows, float* y, int threads) {
  const Weight* one = &m;
  multiply_each(&one, &y, 1, x, rows, threads);
}

}  // namespace saccade::SACCADE_TARGET
