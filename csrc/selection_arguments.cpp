#include "selection_arguments.h"

#include <nanobind/stl/string.h>

#include <string>

#include "check_tensor.h"
#include "dispatch.h"
#include "layer.h"

namespace saccade {

BlockRule read_rule(nb::handle x) {
  if (!PyTuple_Check(x.ptr()) || PyTuple_GET_SIZE(x.ptr()) != 10)
    throw nb::type_error("a rule has 10 fields");
  nb::tuple f = nb::borrow<nb::tuple>(x);
  const int64_t summary = integer(f[0]);
  require(summary >= 0 && summary <= (int64_t)Summary::keys, "unknown kind of summary.");
  const BlockRule rule{(Summary)summary, integer(f[1]), integer(f[2]), integer(f[3]), integer(f[4]),
                       integer(f[5]), integer(f[6]), (float)nb::cast<double>(f[7]),
                       (float)nb::cast<double>(f[8]), integer(f[9])};
  for (int64_t n : {rule.q_block, rule.k_block, rule.window})
    require(n >= 1 && n <= kMaxPosition, "blocks and the window must be 1 or more.");
  for (int64_t n : {rule.sinks, rule.stride, rule.top, rule.least})
    require(n >= 0 && n <= kMaxPosition, "sinks, stride, top and least must be 0 or more.");
  require(rule.share >= 0.f && rule.share <= 1.f, "a share must be 0 to 1.");
  require(rule.share == 0.f || rule.top == 0, "top and share exclude each other.");
  require(rule.share == 0.f || rule.summary == Summary::mean, "a share is estimated by means.");
  return rule;
}

Selecting make_selecting(const BlockRule& rule, const TensorArg& q, int64_t q_offset,
                         const std::optional<TensorArg>& rows, int64_t num_rows,
                         const TensorArg& out, int64_t threads) {
  check_tensor(q, "q", 4);
  check_tensor(out, "out", 4);
  require(is_float(q.dtype), "q must be float32, bfloat16 or float16.");
  check_dtype(out, "out", Dtype::boolean);
  Selecting s{};
  s.rule = rule;
  s.batch = q.shape[0];
  s.heads = q.shape[1];
  s.q_len = q.shape[2];
  s.head_dim = q.shape[3];
  s.kv_heads = out.shape[1];
  s.num_blocks = out.shape[3];
  require(s.kv_heads >= 1 && s.heads >= 1 && s.heads % s.kv_heads == 0,
          "the query heads must be a multiple of the key/value heads.");
  require(s.head_dim >= 1 && s.head_dim <= kMaxDim, "head_dim must be 1 to 576.");
  require(s.num_blocks <= kMaxPosition, "there are too many blocks.");
  require(q_offset >= 0 && q_offset <= kMaxPosition && s.q_len <= kMaxPosition,
          "q_offset is no position.");
  check_shape(out, "out", {s.batch, s.kv_heads, (s.q_len + rule.q_block - 1) / rule.q_block,
                           s.num_blocks});
  int64_t expected = 1;
  for (int i = 3; i >= 0; --i) {
    require(out.shape[i] == 1 || out.stride[i] == expected, "out must be contiguous.");
    expected *= out.shape[i];
  }
  check_apart(out, "out", q, "q");
  require(threads >= 1 && threads <= 4096, "threads must be 1 to 4096.");
  s.q = strided(q);
  s.q_offset = q_offset;
  s.out = (uint8_t*)out.data;
  s.threads = (int)threads;
  if (rule.summary == Summary::none) return s;
  require(rows.has_value(), "blocks are chosen by their summaries, but there are none.");
  check_tensor(*rows, "summaries", 4);
  require(is_float(rows->dtype), "summaries must be float32, bfloat16 or float16.");
  const int64_t width = rule.summary == Summary::bounds ? 2 * s.head_dim : s.head_dim;
  check_shape(*rows, "summaries", {s.batch, s.kv_heads, rows->shape[2], width});
  require(num_rows >= 0 && num_rows <= rows->shape[2], "there are not so many summaries.");
  check_apart(out, "out", *rows, "summaries");
  s.rows = strided(*rows);
  s.num_rows = num_rows;
  return s;
}

namespace {

void select(nb::handle rule, nb::handle q, int64_t q_offset, nb::handle rows, nb::handle out,
            int64_t threads, const std::string& target) {
  const Kernels* kernels = find_kernels(target.c_str());
  if (!kernels) fail("this machine has no SIMD target \"" + target + "\".");
  std::optional<TensorArg> summaries;
  if (!rows.is_none()) summaries = tensor(rows);
  const int64_t num_rows = summaries && summaries->ndim == 4 ? summaries->shape[2] : 0;
  const Selecting s = make_selecting(read_rule(rule), tensor(q), q_offset, summaries, num_rows,
                                     tensor(out), threads);
  nb::gil_scoped_release unlocked;
  kernels->step->select_blocks(s);
}

}  // namespace

void bind_selection(nb::module_& m) {
  m.def("select_blocks", &select, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg(), nb::arg());
}

}  // namespace saccade
