#include "check_tensor.h"

#include <algorithm>
#include <stdexcept>

namespace saccade {

namespace {

// Bytes from the first to one past the last element; every product is checked for overflow.
int64_t extent(const TensorArg& x, const char* name) {
  int64_t last = 0;
  for (int i = 0; i < x.ndim; ++i) {
    int64_t step;
    if (__builtin_mul_overflow(x.shape[i] - 1, x.stride[i], &step) ||
        __builtin_add_overflow(last, step, &last) || last > kMaxCount)
      fail(std::string(name) + ": strides reach beyond any memory.");
  }
  return (last + 1) * item_size(x.dtype);
}

}  // namespace

void fail(const std::string& text) { throw std::invalid_argument(text); }

void require(bool ok, const char* text) {
  if (!ok) fail(text);
}

int64_t item_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
    case Dtype::i32: return 4;
    case Dtype::bf16:
    case Dtype::f16: return 2;
    case Dtype::i64: return 8;
    default: return 1;
  }
}

bool is_float(Dtype d) { return d == Dtype::f32 || d == Dtype::bf16 || d == Dtype::f16; }

bool is_empty(const TensorArg& x) {
  return std::any_of(x.shape, x.shape + x.ndim, [](int64_t n) { return n == 0; });
}

void check_tensor(const TensorArg& x, const char* name, int ndim, bool unit_last) {
  const std::string who = name;
  if (x.ndim != ndim)
    fail(who + " must have " + number(ndim) + " dimensions, got " + number(x.ndim) + ".");
  for (int i = 0; i < ndim; ++i) {
    if (x.shape[i] < 0 || x.shape[i] > kMaxCount)
      fail(who + ": size " + number(x.shape[i]) + " of dimension " + number(i) + " is impossible.");
    if (x.stride[i] < 0) fail(who + ": negative strides are not supported.");
  }
  if (is_empty(x)) return;
  if (unit_last && ndim > 0 && x.shape[ndim - 1] > 1 && x.stride[ndim - 1] != 1)
    fail(who + " must have a unit last stride, got " + number(x.stride[ndim - 1]) + ".");
  const int64_t bytes = extent(x, name);
  if (x.data == nullptr) fail(who + " has no memory.");
  if ((uintptr_t)x.data % item_size(x.dtype)) fail(who + " is not aligned to its element size.");
  if (bytes > x.reach)
    fail(who + " needs " + number(bytes) + " bytes of storage but has " + number(x.reach) + ".");
}

void check_shape(const TensorArg& x, const char* name, std::initializer_list<int64_t> shape) {
  int i = 0;
  for (int64_t n : shape) {
    if (x.shape[i] != n)
      fail(std::string(name) + ": dimension " + number(i) + " must be " + number(n) + ", got " +
           number(x.shape[i]) + ".");
    ++i;
  }
}

void check_dtype(const TensorArg& x, const char* name, Dtype dtype) {
  if (x.dtype != dtype) fail(std::string(name) + " has the wrong dtype.");
}

void check_no_self_overlap(const TensorArg& x, const char* name) {
  int order[TensorArg::kMaxDims], n = 0;
  for (int i = 0; i < x.ndim; ++i)
    if (x.shape[i] > 1) order[n++] = i;
  std::sort(order, order + n, [&](int a, int b) { return x.stride[a] < x.stride[b]; });
  int64_t covered = 1;
  for (int i = 0; i < n; ++i) {
    if (x.stride[order[i]] < covered) fail(std::string(name) + " overlaps itself.");
    covered = x.stride[order[i]] * (x.shape[order[i]] - 1) + covered;
  }
}

void check_apart(const TensorArg& written, const char* name, const TensorArg& other,
                 const char* other_name) {
  if (is_empty(written) || is_empty(other)) return;
  const char* end = written.data + extent(written, name);
  const char* other_end = other.data + extent(other, other_name);
  if (written.data < other_end && other.data < end)
    fail(std::string(name) + " overlaps " + other_name + " in memory.");
}

Strided strided(const TensorArg& x) {
  const int64_t size = item_size(x.dtype);
  return {x.data, x.dtype, x.stride[0] * size, x.stride[1] * size, x.stride[2] * size};
}

int64_t broadcast_stride(const TensorArg& x, int dim) {
  return x.shape[dim] == 1 ? 0 : x.stride[dim];
}

ByteGrid grid(const TensorArg& x) {
  return {(const uint8_t*)x.data, broadcast_stride(x, 0), broadcast_stride(x, 1), x.stride[2],
          x.stride[3]};
}

void check_integers(const TensorArg& x, const char* name, int64_t size) {
  check_tensor(x, name, 1, false);
  require(x.dtype == Dtype::i32 || x.dtype == Dtype::i64, "integers must be int32 or int64.");
  check_shape(x, name, {size});
}

void check_broadcast(const TensorArg& x, const char* name, int64_t batch, int64_t heads) {
  const bool ok =
      (x.shape[0] == 1 || x.shape[0] == batch) && (x.shape[1] == 1 || x.shape[1] == heads);
  if (!ok) fail(std::string(name) + " must have batch and heads of the call, or 1.");
}

int64_t integer_at(const TensorArg& x, int64_t i) {
  const char* at = x.data + i * x.stride[0] * item_size(x.dtype);
  return x.dtype == Dtype::i64 ? *(const int64_t*)at : *(const int32_t*)at;
}

}  // namespace saccade
