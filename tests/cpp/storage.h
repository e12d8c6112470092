// Number formats written out by hand, and tensors in them: what a kernel reads, and as doubles.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "../../csrc/call.h"

namespace contract {

using saccade::Dtype;
using saccade::TensorArg;

inline int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: case Dtype::i32: return 4;
    case Dtype::bf16: case Dtype::f16: return 2;
    case Dtype::i64: return 8;
    default: return 1;
  }
}

// The nearest number with `fraction` bits behind the point and exponents from `lowest` on, ties to
// even: the definition of IEEE 754 formats, without their bits.
inline double nearest(double x, int fraction, int lowest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), lowest) - fraction);
  return std::nearbyint(x / unit) * unit;
}

inline double rounded(Dtype dtype, double x) {
  if (dtype == Dtype::f32) return nearest(x, 23, -126);
  if (dtype == Dtype::bf16) return nearest(x, 7, -126);
  return dtype == Dtype::f16 ? nearest(x, 10, -14) : x;
}

inline uint16_t half_bits(double x) {  // of a number that a float16 holds
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  if (x < std::ldexp(1.0, -14)) return sign | (uint16_t)std::ldexp(x, 24);
  const int exponent = std::ilogb(x);
  return sign | (uint16_t)((exponent + 15) << 10 | (int)(std::ldexp(x, 10 - exponent) - 1024));
}

inline double from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 0 ? std::ldexp(fraction, -24)
                                    : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

// A contiguous tensor.
struct Array {
  Dtype dtype = Dtype::f32;
  std::vector<int64_t> shape;
  std::vector<char> bytes;

  Array() = default;
  Array(Dtype dtype, std::vector<int64_t> shape) : dtype(dtype), shape(std::move(shape)) {
    bytes.assign(size() * bytes_of(dtype), 0);
  }

  int64_t size() const {
    int64_t n = 1;
    for (int64_t part : shape) n *= part;
    return n;
  }

  // Stores x, which is rounded to the format first.
  void set(int64_t i, double x) {
    char* at = bytes.data() + i * bytes_of(dtype);
    x = rounded(dtype, x);
    if (dtype == Dtype::i32) return put(at, (int32_t)x);
    if (dtype == Dtype::i64) return put(at, (int64_t)x);
    if (dtype == Dtype::f16) return put(at, half_bits(x));
    const float single = (float)x;
    if (dtype == Dtype::f32) return put(at, single);
    if (dtype != Dtype::bf16) return put(at, (uint8_t)x);
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    put(at, (uint16_t)(bits >> 16));
  }

  double get(int64_t i) const {
    const char* at = bytes.data() + i * bytes_of(dtype);
    if (dtype == Dtype::f16) return from_half(as<uint16_t>(at));
    if (dtype == Dtype::i32) return as<int32_t>(at);
    if (dtype == Dtype::f32) return as<float>(at);
    if (dtype != Dtype::bf16) return as<uint8_t>(at);
    const uint32_t bits = (uint32_t)as<uint16_t>(at) << 16;
    float single;
    std::memcpy(&single, &bits, 4);
    return single;
  }

  TensorArg arg() const {
    TensorArg x{(char*)bytes.data(), dtype, (int)shape.size(), {}, {}, (int64_t)bytes.size()};
    int64_t stride = 1;
    for (int i = x.ndim - 1; i >= 0; --i) {
      x.shape[i] = shape[i];
      x.stride[i] = stride;
      stride *= shape[i];
    }
    return x;
  }

 private:
  template <class T>
  static void put(char* at, T x) { std::memcpy(at, &x, sizeof x); }
  template <class T>
  static T as(const char* at) {
    T x;
    std::memcpy(&x, at, sizeof x);
    return x;
  }
};

inline std::mt19937_64 source(2205);

// Normal numbers from sums of twelve uniform ones, so that every machine draws the same.
inline double normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += (double)(source() >> 11) * 0x1p-53;
  return sum;
}

inline Array random(Dtype dtype, std::vector<int64_t> shape) {
  Array x(dtype, std::move(shape));
  for (int64_t i = 0; i < x.size(); ++i) x.set(i, normal());
  return x;
}

}  // namespace contract
