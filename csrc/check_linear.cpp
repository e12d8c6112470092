#include "check_linear.h"

#include "check_tensor.h"

namespace saccade {
namespace {

int check_count(int64_t threads) {
  require(threads >= 1 && threads <= 4096, "threads must be 1 to 4096.");
  return (int)threads;
}

void check_contiguous(const TensorArg& x, const char* name, Dtype dtype,
                      std::initializer_list<int64_t> shape) {
  check_tensor(x, name, (int)shape.size());
  check_dtype(x, name, dtype);
  check_shape(x, name, shape);
  int64_t stride = 1;
  for (int i = x.ndim - 1; i >= 0; --i) {
    if (x.shape[i] > 1 && x.stride[i] != stride) fail(std::string(name) + " must be contiguous.");
    stride *= x.shape[i];
  }
}

}  // namespace

PackedMatrix check_packed(const PackedArg& w) {
  require(w.bits == 4 || w.bits == 6 || w.bits == 8, "bits must be 4, 6 or 8.");
  require(w.group == 16 || w.group == 32, "group must be 16 or 32.");
  require(w.out >= 0 && w.out <= kMaxCount && w.in >= 0 && w.in <= kMaxPosition,
          "the sizes of a weight are impossible.");
  require(w.in % w.group == 0, "the columns of a weight must be whole groups.");
  const int64_t blocks = (w.out + kBlockRows - 1) / kBlockRows, groups = w.in / w.group;
  check_contiguous(w.qdata, "qdata", Dtype::u8, {blocks, w.in * w.bits / 32, 4 * kBlockRows});
  check_contiguous(w.scale, "scale", Dtype::f16, {blocks, groups, kBlockRows});
  if (w.minimum) check_contiguous(*w.minimum, "minimum", Dtype::f16, {blocks, groups, kBlockRows});
  return {(uint8_t*)w.qdata.data, (uint16_t*)w.scale.data,
          w.minimum ? (uint16_t*)w.minimum->data : nullptr, w.out, w.in, w.group, (int)w.bits};
}

namespace {

Matrix matrix(const TensorArg& x) { return {x.data, x.dtype, x.stride[0] * item_size(x.dtype)}; }

void check_matrix(const TensorArg& x, const char* name, int64_t rows, int64_t columns) {
  check_tensor(x, name, 2);
  if (!is_float(x.dtype)) fail(std::string(name) + " must be float32, bfloat16 or float16.");
  check_shape(x, name, {rows, columns});
}

void check_apart_from(const TensorArg& written, const char* name, const PackedArg& w) {
  check_apart(written, name, w.qdata, "qdata");
  check_apart(written, name, w.scale, "scale");
  if (w.minimum) check_apart(written, name, *w.minimum, "minimum");
}

Vector check_bias(const std::optional<TensorArg>& bias, int64_t out) {
  if (!bias) return {nullptr, Dtype::f32};
  check_tensor(*bias, "bias", 1);
  require(is_float(bias->dtype), "bias must be float32, bfloat16 or float16.");
  check_shape(*bias, "bias", {out});
  return {bias->data, bias->dtype};
}

void check_out(const LinearArg& call, size_t i, LinearProblem& p) {
  const TensorArg& out = call.outs[i];
  check_matrix(out, "out", p.rows, p.weights[i].out);
  check_dtype(out, "out", call.x.dtype);
  check_no_self_overlap(out, "out");
  check_apart(out, "out", call.x, "x");
  for (const PackedArg& w : call.weights) check_apart_from(out, "out", w);
  for (const auto& bias : call.biases)
    if (bias) check_apart(out, "out", *bias, "bias");
  for (size_t j = 0; j < i; ++j) check_apart(out, "out", call.outs[j], "another out");
  p.out[i] = matrix(out);
}

void check_scratch(const LinearArg& call, LinearProblem& p) {
  const TensorArg& scratch = *call.scratch;
  const int64_t strips = (p.rows + kStripRows - 1) / kStripRows;
  check_contiguous(scratch, "scratch", Dtype::bf16, {strips * kStripRows, p.in});
  check_apart(scratch, "scratch", call.x, "x");
  for (const TensorArg& out : call.outs) check_apart(scratch, "scratch", out, "out");
  for (const PackedArg& w : call.weights) check_apart_from(scratch, "scratch", w);
  for (const auto& bias : call.biases)
    if (bias) check_apart(scratch, "scratch", *bias, "bias");
  p.scratch = scratch.data;
}

}  // namespace

LinearProblem check(const LinearArg& call) {
  LinearProblem p{};
  const size_t n = call.weights.size(), gated = call.gate != 0;
  require(call.gate >= 0 && call.gate <= (int)Gate::gelu_tanh, "unknown gate.");
  require(n >= 1 && n <= kMaxWeights && (!gated || n == 2), "too many or too few weights.");
  require(call.biases.size() == n, "there must be as many biases as weights.");
  require(call.outs.size() == (gated ? 1 : n), "there must be an output of each weight.");
  require(call.x.ndim == 2, "x must have 2 dimensions.");
  check_matrix(call.x, "x", call.x.shape[0], call.x.shape[1]);
  p.x = matrix(call.x);
  p.rows = call.x.shape[0];
  p.in = call.x.shape[1];
  require(p.rows <= kMaxPosition, "x has too many rows.");
  for (size_t i = 0; i < n; ++i) {
    p.weights[i] = check_packed(call.weights[i]);
    if (p.weights[i].in != p.in)
      fail("x has " + number(p.in) + " columns, the weight " + number(p.weights[i].in) + ".");
    p.bias[i] = check_bias(call.biases[i], p.weights[i].out);
  }
  require(!gated || p.weights[0].out == p.weights[1].out, "gate and up must have equal sizes.");
  for (size_t i = 0; i < call.outs.size(); ++i) check_out(call, i, p);
  p.num_weights = (int)n;
  p.num_outs = (int)call.outs.size();
  p.gate = (Gate)call.gate;
  p.threads = check_count(call.threads);
  if (call.scratch) check_scratch(call, p);
  return p;
}

RowsProblem check(const RowsArg& call) {
  RowsProblem p{};
  p.weight = check_packed(call.weight);
  require(call.out.ndim == 2, "out must have 2 dimensions.");
  p.n = call.out.shape[0];
  check_matrix(call.out, "out", p.n, p.weight.in);
  check_no_self_overlap(call.out, "out");
  check_apart_from(call.out, "out", call.weight);
  p.out = matrix(call.out);
  p.first = call.first;
  p.threads = check_count(call.threads);
  if (!call.index) {
    require(p.first >= 0 && p.first <= p.weight.out && p.n <= p.weight.out - p.first,
            "the rows are beyond the weight.");
    return p;
  }
  check_contiguous(*call.index, "index", Dtype::i64, {p.n});
  check_apart(call.out, "out", *call.index, "index");
  p.index = (const int64_t*)call.index->data;
  for (int64_t i = 0; i < p.n; ++i)
    if (p.index[i] < 0 || p.index[i] >= p.weight.out)
      fail("index " + number(p.index[i]) + " is not below the " + number(p.weight.out) +
           " rows of the weight.");
  return p;
}

PackProblem check(const PackArg& call) {
  struct Kind {
    int64_t numbers, bytes, bits, group;
    bool minimum;
  };
  // Of a block; plain numbers (bits 0) are rounded to 4 bits with minimum or to 8 without.
  constexpr Kind kKinds[] = {
      {32, 18, 4, 32, false},  {32, 20, 4, 32, true},   {32, 22, 6, 32, false},
      {32, 24, 6, 32, true},   {32, 34, 8, 32, false},  {256, 144, 4, 32, true},
      {256, 176, 6, 32, true}, {256, 210, 6, 16, false}, {1, 4, 0, 32, false},
      {1, 2, 0, 32, false},    {1, 2, 0, 32, false}};
  require(call.kind >= 0 && call.kind <= (int)BlockKind::f16, "unknown kind of block.");
  const Kind& kind = kKinds[call.kind];
  const PackedArg& w = call.weight;
  PackProblem p{(BlockKind)call.kind, (const uint8_t*)call.raw.data, 0, check_packed(w),
                check_count(call.threads)};
  const bool minimum = kind.bits ? kind.minimum : w.bits == 4;
  require((!kind.bits || w.bits == kind.bits) && w.group == kind.group &&
              w.minimum.has_value() == minimum,
          "the weight does not have the form of these blocks.");
  require(w.in % kind.numbers == 0, "the rows are not whole blocks.");
  check_tensor(call.raw, "raw", 2);
  check_dtype(call.raw, "raw", Dtype::u8);
  check_shape(call.raw, "raw", {w.out, w.in / kind.numbers * kind.bytes});
  p.row = call.raw.stride[0];
  check_apart_from(call.raw, "raw", w);
  check_apart(w.qdata, "qdata", w.scale, "scale");
  if (w.minimum) {
    check_apart(*w.minimum, "minimum", w.scale, "scale");
    check_apart(*w.minimum, "minimum", w.qdata, "qdata");
  }
  return p;
}

}  // namespace saccade
