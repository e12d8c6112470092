// Attention and its gradients as their formulas say, in plain loops: nothing is shared with csrc/.
//
// With Real = double this is the truth; with float it is the eager run whose error a kernel may
// reach twice.  A row that attends to nothing has output 0 and lse -inf.
#pragma once
#include "inputs.h"

namespace contract {

constexpr double kNothing = -std::numeric_limits<double>::infinity();

template <class Real>
struct Result {
  std::vector<Real> out, lse, dq, dk, dv;
  std::vector<Real> received, largest;  // [batch, kv_heads, kv_len], by position
};

// Whether query i of head h attends to a key.  `skip` is a position that nobody sees (-1: none).
inline bool sees(const Inputs& in, int64_t b, int64_t h, int64_t i, const Key& key, int64_t skip) {
  const Case& c = in.c;
  const int64_t at = c.kv_len - c.q_len + i, head = h / (c.heads / c.kv_heads);
  if (key.position == skip) return false;
  if (c.causal && key.position > at) return false;
  if (c.window > 0 && at - key.position >= c.window && key.position >= c.sinks) return false;
  if (c.padding && in.padding.get(b * c.kv_len + key.position) == 0) return false;
  if (!c.blocks) return true;
  const int64_t rows = in.blocks.shape[2], columns = in.blocks.shape[3];
  return in.blocks.get(((b * c.kv_heads + head) * rows + i / kBlock) * columns +
                       key.position / kBlock) != 0;
}

template <class Real>
Real score(const Inputs& in, int64_t h, int64_t i, const Array& q, int64_t row, const Key& key) {
  const Case& c = in.c;
  Real sum = 0;
  for (int64_t d = 0; d < c.dim; ++d) sum += (Real)q.get(row * c.dim + d) * (Real)key.k[d];
  sum *= (Real)in.scale_of_scores();
  if (c.softcap > 0) sum = (Real)c.softcap * std::tanh(sum / (Real)c.softcap);
  if (c.alibi) {
    const int64_t at = c.kv_len - c.q_len + i;
    sum -= (Real)in.alibi.get(h) * (Real)std::llabs(at - key.position);
  }
  return sum;
}

// Output and lse; with `dout`, gradients of a loss whose gradient by the output that is.
template <class Real>
Result<Real> attend(Inputs& in, const Array* dout = nullptr, int64_t skip = -1) {
  const Case& c = in.c;
  Result<Real> r;
  const int64_t rows = c.batch * c.heads * c.q_len, slots = c.batch * c.kv_heads * c.kv_len;
  r.out.assign(rows * c.value_dim, 0);
  r.lse.assign(rows, (Real)kNothing);
  r.received.assign(slots, 0);
  r.largest.assign(slots, 0);
  if (dout) {
    r.dq.assign(rows * c.dim, 0);
    r.dk.assign(slots * c.dim, 0);
    r.dv.assign(slots * c.value_dim, 0);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row % c.q_len, h = row / c.q_len % c.heads, b = row / c.q_len / c.heads;
    const int64_t head = h / (c.heads / c.kv_heads);
    const auto& keys = in.keys_of(b, head);
    std::vector<Real> scores(keys.size(), (Real)kNothing);
    Real peak = (Real)(c.sink_logits ? in.sink_logits.get(h) : kNothing), total = 0;
    for (size_t j = 0; j < keys.size(); ++j)
      if (sees(in, b, h, i, keys[j], skip)) {
        scores[j] = score<Real>(in, h, i, in.q, row, keys[j]);
        peak = std::max(peak, scores[j]);
      }
    if (peak == (Real)kNothing) continue;
    if (c.sink_logits) total += std::exp((Real)in.sink_logits.get(h) - peak);
    for (Real s : scores) total += std::exp(s - peak);
    r.lse[row] = peak + std::log(total);
    Real* out = &r.out[row * c.value_dim];
    for (size_t j = 0; j < keys.size(); ++j)
      for (int64_t d = 0; d < c.value_dim && scores[j] != (Real)kNothing; ++d)
        out[d] += std::exp(scores[j] - r.lse[row]) * (Real)keys[j].v[d];
    for (size_t j = 0; j < keys.size(); ++j) {
      if (scores[j] == (Real)kNothing) continue;
      const Real weight = std::exp(scores[j] - r.lse[row]);
      const int64_t at = (b * c.kv_heads + head) * c.kv_len + keys[j].position;
      r.received[at] += weight / (Real)(c.heads / c.kv_heads);
      r.largest[at] = std::max(r.largest[at], weight);
    }
    if (!dout) continue;
    Real delta = 0;
    for (int64_t d = 0; d < c.value_dim; ++d)
      delta += out[d] * (Real)dout->get(row * c.value_dim + d);
    for (size_t j = 0; j < keys.size(); ++j) {
      if (scores[j] == (Real)kNothing) continue;
      const int64_t slot = (b * c.kv_heads + head) * c.kv_len + (int64_t)j;
      const Real weight = std::exp(scores[j] - r.lse[row]);
      Real along = 0;
      for (int64_t d = 0; d < c.value_dim; ++d) {
        const Real g = (Real)dout->get(row * c.value_dim + d);
        along += g * (Real)keys[j].v[d];
        r.dv[slot * c.value_dim + d] += weight * g;
      }
      Real slope = weight * (along - delta) * (Real)in.scale_of_scores();
      if (c.softcap > 0) slope *= 1 - (scores[j] / (Real)c.softcap) * (scores[j] / (Real)c.softcap);
      for (int64_t d = 0; d < c.dim; ++d) {
        r.dq[row * c.dim + d] += slope * (Real)keys[j].k[d];
        r.dk[slot * c.dim + d] += slope * (Real)in.q.get(row * c.dim + d);
      }
    }
  }
  return r;
}

// The position that the last query of the first head weighs most.
inline int64_t heaviest(Inputs& in) {
  const int64_t row = in.c.q_len - 1;
  double most = kNothing;
  int64_t found = 0;
  for (const Key& key : in.keys_of(0, 0)) {
    if (!sees(in, 0, 0, row, key, -1)) continue;
    const double s = score<double>(in, 0, row, in.q, row, key);
    if (s > most) most = s, found = key.position;
  }
  return found;
}

}  // namespace contract
