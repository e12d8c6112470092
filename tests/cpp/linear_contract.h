// Products with packed weights, their rows, and packing, against plain loops in double.
#pragma once
#include <cstdio>
#include <string>

#include "../../csrc/linear.h"
#include "bounds.h"

namespace contract {

struct LinearCase {
  const char* name;
  int64_t rows, out, in;
  int bits = 4;
  int64_t group = 32;
  bool minimum = false, bias = false;
  Dtype dtype = Dtype::f32;
  saccade::Gate gate = saccade::Gate::none;
  int threads = 1;
};

inline const LinearCase kLinearCases[] = {
    {.name = "linear, 4 bits, one row", .rows = 1, .out = 48, .in = 96},
    {.name = "linear, 4 bits, minima, seven rows", .rows = 7, .out = 37, .in = 128,
     .minimum = true},
    {.name = "linear, 4 bits, groups of 16, bf16", .rows = 3, .out = 33, .in = 80, .group = 16,
     .minimum = true, .dtype = Dtype::bf16},
    {.name = "linear, 6 bits, groups of 16", .rows = 5, .out = 37, .in = 80, .bits = 6, .group = 16},
    {.name = "linear, 6 bits, minima, one row", .rows = 1, .out = 48, .in = 96, .bits = 6,
     .minimum = true},
    {.name = "linear, 8 bits, bias, three threads", .rows = 5, .out = 70, .in = 96, .bits = 8,
     .bias = true, .threads = 3},
    {.name = "linear, 8 bits, groups of 16, fp16", .rows = 2, .out = 17, .in = 48, .bits = 8,
     .group = 16, .minimum = true, .dtype = Dtype::f16},
    {.name = "linear, silu gate", .rows = 3, .out = 40, .in = 64, .gate = saccade::Gate::silu},
    {.name = "linear, gelu gate, 8 bits", .rows = 1, .out = 40, .in = 64, .bits = 8,
     .gate = saccade::Gate::gelu_tanh},
};

// A packed matrix and the numbers that it stands for.
struct Packed {
  Array qdata, scale, low;
  saccade::PackedMatrix matrix{};
  std::vector<double> numbers;  // [out, in]

  Packed(int64_t out, int64_t in, int bits, int64_t group, bool minimum) {
    const int64_t blocks = (out + 15) / 16;
    qdata = Array(Dtype::u8, {blocks, in * bits / 32, 64});
    scale = Array(Dtype::f16, {blocks, in / group, 16});
    low = scale;
    matrix = {(uint8_t*)qdata.bytes.data(), (uint16_t*)scale.bytes.data(),
              minimum ? (uint16_t*)low.bytes.data() : nullptr, out, in, group, bits};
  }

  // Random numbers in every row, those that fill the last block up are 0.
  void draw() {
    const auto& m = matrix;
    numbers.assign(m.out * m.in, 0);
    for (int64_t row = 0; row < m.out; ++row)
      for (int64_t k = 0; k < m.in; ++k) {
        const int64_t block = row / 16, lane = row % 16;
        const int64_t at = (block * (m.in / m.group) + k / m.group) * 16 + lane;
        if (k % m.group == 0) {
          scale.set(at, (1 + 0.2 * normal()) / (1 << (m.bits - 1)));
          if (m.minimum) low.set(at, 0.3 * normal());
        }
        const int q = (int)(source() >> (64 - m.bits));
        numbers[row * m.in + k] = place(block, lane, k, q) * scale.get(at) +
                                  (m.minimum ? low.get(at) : 0.0);
      }
  }

 private:
  // Stores q where csrc/linear.h says, and returns the number that it means.
  int place(int64_t block, int64_t lane, int64_t k, int q) {
    if (matrix.bits == 8) {
      qdata.bytes[(block * matrix.in + k) * 16 + lane] = (char)q;
      return (int8_t)q;
    }
    const int64_t eight = k / 8, before = matrix.bits == 4 ? 0 : k / 16;  // runs of upper bits
    const int nibble = (int)(k % 8) / 2 + (k % 2 ? 4 : 0);
    set_bits(block, eight + before, lane, 4 * nibble, q & 15);
    if (matrix.bits == 4) return matrix.minimum ? q : q - 8;
    const int pair = (int)(k % 16) / 2 + (k % 2 ? 8 : 0);
    set_bits(block, k / 16 * 3 + 2, lane, 2 * pair, q >> 4);
    return matrix.minimum ? q : q - 32;
  }

  // Bits of the 32 of a lane in a run of columns.
  void set_bits(int64_t block, int64_t run, int64_t lane, int shift, int bits) {
    const int64_t runs = matrix.in * matrix.bits / 32;
    char& byte = qdata.bytes[((block * runs + run) * 16 + lane) * 4 + shift / 8];
    byte = (char)((uint8_t)byte | bits << shift % 8);
  }
};

template <class Real>
std::vector<Real> multiplied(const LinearCase& c, const Array& x, const Packed& w,
                             const Array* bias) {
  std::vector<Real> y(c.rows * c.out);
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t o = 0; o < c.out; ++o) {
      Real sum = bias ? (Real)bias->get(o) : 0;
      for (int64_t k = 0; k < c.in; ++k)
        sum += (Real)x.get(r * c.in + k) * (Real)w.numbers[o * c.in + k];
      y[r * c.out + o] = sum;
    }
  return y;
}

template <class Real>
std::vector<Real> gated(saccade::Gate gate, std::vector<Real> y, const std::vector<Real>& up) {
  for (size_t i = 0; i < y.size(); ++i) {
    const Real x = y[i], inner = (Real)0.7978845608028654 * (x + (Real)0.044715 * x * x * x);
    y[i] = up[i] * (gate == saccade::Gate::silu ? x / (1 + std::exp(-x))
                                                : x * (1 + std::tanh(inner)) / 2);
  }
  return y;
}

inline double error_of_products(const saccade::LinearKernels& kernels, const LinearCase& c) {
  source.seed(2205);
  const Array x = random(c.dtype, {c.rows, c.in}), bias = random(Dtype::f32, {c.out});
  Packed first(c.out, c.in, c.bits, c.group, c.minimum), second = first;
  second.matrix.qdata = (uint8_t*)second.qdata.bytes.data();
  second.matrix.scale = (uint16_t*)second.scale.bytes.data();
  if (c.minimum) second.matrix.minimum = (uint16_t*)second.low.bytes.data();
  first.draw();
  second.draw();
  const Array* added = c.bias ? &bias : nullptr;
  auto truth = multiplied<double>(c, x, first, added);
  auto eager = multiplied<float>(c, x, first, added);
  const bool has_gate = c.gate != saccade::Gate::none;
  if (has_gate) {
    truth = gated(c.gate, truth, multiplied<double>(c, x, second, nullptr));
    eager = gated(c.gate, eager, multiplied<float>(c, x, second, nullptr));
  }
  Array out(c.dtype, {c.rows, c.out});
  saccade::LinearProblem p{};
  const int64_t size = bytes_of(c.dtype);
  p.x = {(char*)x.bytes.data(), c.dtype, c.in * size};
  p.rows = c.rows;
  p.in = c.in;
  p.num_weights = has_gate ? 2 : 1;
  p.num_outs = 1;
  p.weights[0] = first.matrix;
  p.weights[1] = second.matrix;
  if (c.bias) p.bias[0] = {bias.bytes.data(), Dtype::f32};
  p.out[0] = {out.bytes.data(), c.dtype, c.out * size};
  p.gate = c.gate;
  p.threads = c.threads;
  kernels.products(p);
  return share(c.dtype, truth, eager, [&](size_t i) { return out.get((int64_t)i); });
}

// Rows of a weight, in float32: the largest distance from the numbers that it stands for.
inline double error_of_rows(const saccade::LinearKernels& kernels, const Packed& w, bool by_index) {
  const int64_t n = w.matrix.out;
  std::vector<int64_t> index(n);
  for (int64_t i = 0; i < n; ++i) index[i] = n - 1 - i;
  Array out(Dtype::f32, {n, w.matrix.in});
  kernels.read_rows({w.matrix, by_index ? index.data() : nullptr, 0, n,
                     {out.bytes.data(), Dtype::f32, w.matrix.in * 4}, 2});
  return distance(w.numbers, [&](size_t i) {
    const int64_t row = (int64_t)i / w.matrix.in;
    return out.get((by_index ? n - 1 - row : row) * w.matrix.in + (int64_t)i % w.matrix.in);
  });
}

// Blocks of a GGUF file: a float16 scale, then 32 numbers of 8 bits, or 16 bytes of two nibbles,
// before which 4 bytes may hold the fifth bits of the 32 numbers (packed to 6 bits).
inline double error_of_packing(const saccade::LinearKernels& kernels, int bits) {
  source.seed(2205);
  const int64_t out = 21, in = 96, block = bits == 8 ? 34 : bits == 6 ? 22 : 18;
  Packed w(out, in, bits, 32, false);
  std::vector<uint8_t> raw(out * in / 32 * block);
  w.numbers.assign(out * in, 0);
  for (int64_t i = 0; i < out * in / 32; ++i) {
    uint8_t* at = raw.data() + i * block;
    const double scale = rounded(Dtype::f16, 0.1 + 0.01 * normal());
    const uint16_t half = half_bits(scale);
    std::memcpy(at, &half, 2);
    for (int64_t j = 2; j < block; ++j) at[j] = (uint8_t)(source() >> 56);
    for (int j = 0; j < 32; ++j) {
      const int nibble = at[(bits == 6 ? 6 : 2) + j % 16] >> (j < 16 ? 0 : 4) & 15;
      const int fifth = at[2 + j / 8] >> j % 8 & 1;
      const int q = bits == 8 ? (int8_t)at[2 + j] : bits == 6 ? nibble + 16 * fifth - 16 : nibble - 8;
      w.numbers[i * 32 + j] = q * scale;
    }
  }
  using saccade::BlockKind;
  const BlockKind kind =
      bits == 8 ? BlockKind::q8_0 : bits == 6 ? BlockKind::q5_0 : BlockKind::q4_0;
  if (!kernels.pack({kind, raw.data(), in / 32 * block, w.matrix, 2})) return INFINITY;
  return error_of_rows(kernels, w, false);
}

// The number of cases that failed.
inline int run_linear(const saccade::LinearKernels& kernels, const char* target) {
  int failed = 0;
  auto say = [&](const char* name, double error) {
    failed += !(error <= 1);
    std::printf("%-8s %-44s %5.2f of the allowed error  %s\n", target, name, error,
                error <= 1 ? "" : "WRONG");
  };
  for (const LinearCase& c : kLinearCases) say(c.name, error_of_products(kernels, c));
  for (int bits : {4, 6, 8}) {
    source.seed(2205);
    Packed w(37, 96, bits, 16, bits == 4);
    w.draw();
    const std::string name = std::to_string(bits) + " bits";
    say(("linear, rows, " + name).c_str(), error_of_rows(kernels, w, false) / 1e-6);
    say(("linear, rows by index, " + name).c_str(), error_of_rows(kernels, w, true) / 1e-6);
    say(("linear, blocks of a file, " + name).c_str(), error_of_packing(kernels, bits) / 1e-6);
  }
  return failed;
}

}  // namespace contract
