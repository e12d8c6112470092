// The gradients of a call and what they are computed from.
#include "check_tensor.h"
#include "checks.h"

namespace saccade {
namespace {

using Shape = std::initializer_list<int64_t>;

void check_one(const TensorArg& x, const char* name, Dtype dtype, Shape shape) {
  check_tensor(x, name, (int)shape.size());
  check_dtype(x, name, dtype);
  check_shape(x, name, shape);
}

void check_shapes(const BackwardArg& b, const Problem& p) {
  const CallArg& c = b.call;
  const int64_t batch = c.q.shape[0], q_len = c.q.shape[2], keys = c.kv.k.shape[2];
  check_one(b.d_out, "d_out", c.q.dtype, {batch, p.heads, q_len, p.value_dim});
  check_one(b.dk, "dk", c.kv.k.dtype, {batch, p.kv_heads, keys, p.head_dim});
  check_one(b.dv, "dv", c.kv.v.dtype, {batch, p.kv_heads, keys, p.value_dim});
  check_one(b.delta, "delta", Dtype::f32, {batch, p.heads, q_len});
  const int64_t chunks = b.dq.ndim > 0 ? b.dq.shape[0] : 0;
  const int64_t padded = (p.head_dim + kDqPad - 1) / kDqPad * kDqPad;
  check_one(b.dq, "dq", Dtype::f32, {chunks, batch, p.heads, q_len, padded});
  require(chunks >= 1, "dq needs at least one chunk.");
}

// Dimensions `first` and those after it lie as in a contiguous tensor.
void check_contiguous(const TensorArg& x, int first, const char* text) {
  if (is_empty(x)) return;
  int64_t stride = 1;
  for (int i = x.ndim - 1; i >= first; --i) {
    require(x.shape[i] == 1 || x.stride[i] == stride, text);
    stride *= x.shape[i];
  }
}

void check_overlap(const BackwardArg& b) {
  const CallArg& c = b.call;
  const TensorArg* written[] = {&b.dq, &b.dk, &b.dv};
  const TensorArg* read[] = {&c.q, &c.kv.k, &c.kv.v, &c.out, &*c.lse, &b.d_out, &b.delta};
  for (const TensorArg* x : written) {
    check_no_self_overlap(*x, "a gradient");
    for (const TensorArg* other : read) check_apart(*x, "a gradient", *other, "an input");
    for (const TensorArg* other : written)
      if (other != x) check_apart(*x, "a gradient", *other, "another gradient");
  }
}

}  // namespace

void check(const BackwardArg& b, CheckedGradients& checked) {
  const CallArg& c = b.call;
  check(c, checked.forward);
  const Problem& p = checked.forward.problem;
  require(c.kv.kind == ViewKind::dense && c.kv.spans.empty() && !c.blocks && !c.attn_mask,
          "the backward pass takes plain dense views, without blocks or attn_mask.");
  require(c.lse.has_value(), "the backward pass needs the lse.");
  check_shapes(b, p);
  check_contiguous(*c.lse, 0, "lse and delta must be contiguous.");
  check_contiguous(b.delta, 0, "lse and delta must be contiguous.");
  check_contiguous(b.dq, 1, "dq must be contiguous.");
  check_overlap(b);
  checked.gradients = {&p,
                       strided(b.d_out),
                       strided(b.dk),
                       strided(b.dv),
                       (const float*)c.lse->data,
                       (const float*)b.delta.data,
                       p.heads * c.q.shape[2],
                       c.q.shape[2],
                       (float*)b.dq.data,
                       b.dq.stride[0],
                       b.dq.shape[0]};
}

}  // namespace saccade
