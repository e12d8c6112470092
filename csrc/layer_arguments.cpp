#include "layer_arguments.h"

#include <nanobind/stl/string.h>

#include <string>

#include "check_linear.h"
#include "check_tensor.h"
#include "linear_arguments.h"

namespace saccade {
namespace {

nb::tuple fields(nb::handle x, size_t size, const char* what) {
  if (!PyTuple_Check(x.ptr()) || (size_t)PyTuple_GET_SIZE(x.ptr()) != size)
    throw nb::type_error(what);
  return nb::borrow<nb::tuple>(x);
}

int64_t count(nb::handle x, const char* name) {
  const int64_t n = nb::cast<int64_t>(x);
  if (n < 1 || n > kMaxCount) fail(std::string(name) + " is out of range.");
  return n;
}

void check_contiguous(const TensorArg& x, const char* name) {
  int64_t expected = 1;
  for (int i = x.ndim - 1; i >= 0; --i) {
    if (x.shape[i] != 1 && x.stride[i] != expected) fail(std::string(name) + " is not contiguous.");
    expected *= x.shape[i];
  }
}

Numbers read_numbers(nb::handle x, int64_t n, const char* name) {
  if (x.is_none()) return {};
  const TensorArg arg = tensor(x);
  check_tensor(arg, name, 1);
  check_shape(arg, name, {n});
  require(is_float(arg.dtype), "norms and biases must be float32, bfloat16 or float16.");
  return {arg.data, arg.dtype};
}

// A norm of each head, or of all of them.
Norm read_head_norm(nb::handle x, int64_t head_dim, int64_t all) {
  if (x.is_none()) return {};
  const TensorArg weight = tensor(fields(x, 3, "a norm is (weight, eps, plus_one)")[0]);
  check_tensor(weight, "norm", 1);
  return read_norm(x, weight.shape[0] == all ? all : head_dim, "norm");
}

}  // namespace

Norm read_norm(nb::handle x, int64_t n, const char* name) {
  if (x.is_none()) return {};
  nb::tuple parts = fields(x, 3, "a norm is (weight, eps, plus_one)");
  return {read_numbers(parts[0], n, name), (float)nb::cast<double>(parts[1]),
          nb::cast<bool>(parts[2]), n};
}

Weight read_weight(nb::handle x, int64_t out, int64_t in, const char* name) {
  nb::tuple parts = fields(x, 2, "a weight is (matrix, bias)");
  if (PyTuple_Check(parts[0].ptr()) && PyTuple_GET_SIZE(parts[0].ptr()) == 7) {
    const PackedMatrix packed = check_packed(read_packed(parts[0]));
    require(packed.out == out && packed.in == in, "a packed weight has another shape.");
    return {out, in, true, packed, {}, read_numbers(parts[1], out, name)};
  }
  const TensorArg matrix = tensor(parts[0]);
  check_tensor(matrix, name, 2);
  check_shape(matrix, name, {out, in});
  check_contiguous(matrix, name);
  require(is_float(matrix.dtype), "weights must be float32, bfloat16 or float16.");
  return {out, in, false, {}, {matrix.data, matrix.dtype}, read_numbers(parts[1], out, name)};
}

ReadLayer read_layer(nb::handle x, int64_t hidden) {
  nb::tuple parts = fields(x, 10, "a layer has 10 fields");
  ReadLayer read{};
  Layer& layer = read.layer;
  layer.hidden = hidden;
  layer.heads = count(parts[0], "heads");
  layer.kv_heads = count(parts[1], "kv_heads");
  layer.head_dim = count(parts[2], "head_dim");
  layer.inner = count(parts[3], "inner");
  require(layer.heads % layer.kv_heads == 0 && layer.head_dim % 2 == 0 &&
              layer.head_dim <= kMaxDim,
          "heads must be a multiple of kv_heads, and head_dim even.");
  const int64_t activation = nb::cast<int64_t>(parts[4]);
  require(activation == 0 || activation == 1, "unknown activation.");
  layer.activation = (Activation)activation;
  read.scale = nb::cast<double>(parts[5]);
  read.softcap = nb::cast<double>(parts[6]);
  layer.residual = (float)nb::cast<double>(parts[7]);
  nb::tuple norms = fields(parts[8], 6, "a layer has six norms");
  Norm* to_norm[] = {&layer.attention_norm, &layer.attended_norm, &layer.mlp_norm,
                     &layer.mlp_out_norm};
  for (int i = 0; i < 4; ++i) *to_norm[i] = read_norm(norms[i], hidden, "norm");
  const int64_t q = layer.heads * layer.head_dim, kv = layer.kv_heads * layer.head_dim;
  layer.q_norm = read_head_norm(norms[4], layer.head_dim, q);
  layer.k_norm = read_head_norm(norms[5], layer.head_dim, kv);
  nb::tuple weights = fields(parts[9], 7, "a layer has seven weights");
  layer.q = read_weight(weights[0], q, hidden, "q");
  layer.k = read_weight(weights[1], kv, hidden, "k");
  layer.v = read_weight(weights[2], kv, hidden, "v");
  layer.o = read_weight(weights[3], hidden, q, "o");
  layer.gate = read_weight(weights[4], layer.inner, hidden, "gate");
  layer.up = read_weight(weights[5], layer.inner, hidden, "up");
  layer.down = read_weight(weights[6], hidden, layer.inner, "down");
  return read;
}

}  // namespace saccade
