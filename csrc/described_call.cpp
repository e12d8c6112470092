#include "described_call.h"

#include <stdexcept>

#include "arguments.h"

namespace saccade {
namespace {

// Visits the tensors of a call, those of the view in the order of the Python view's description.
template <class Visit>
void each_tensor(CallArg& call, Visit&& visit) {
  auto maybe = [&](std::optional<TensorArg>& x) {
    if (x) visit(*x);
  };
  visit(call.q);
  visit(call.out);
  maybe(call.lse);
  ViewArg& kv = call.kv;
  visit(kv.k);
  visit(kv.v);
  for (auto* x : {&kv.table, &kv.lengths, &kv.positions, &kv.k_qdata, &kv.k_scale, &kv.k_offset,
                  &kv.v_qdata, &kv.v_scale, &kv.v_offset, &call.q_offsets, &call.sink_logits,
                  &call.alibi, &call.key_padding, &call.lengths, &call.cu_q, &call.cu_k,
                  &call.blocks, &call.attn_mask})
    maybe(*x);
}

}  // namespace

CallArg DescribedCall::at(nb::tuple places, int64_t threads) const {
  CallArg call = call_;
  const size_t given = places.size();
  size_t next = 0;
  each_tensor(call, [&](TensorArg& x) {
    if (next + 2 > given) throw std::invalid_argument("the call has more tensors than places");
    x.data = address(places[next]);
    x.reach = integer(places[next + 1]);
    next += 2;
  });
  if (next != given) throw std::invalid_argument("the call has fewer tensors than places");
  call.threads = threads;
  return call;
}

}  // namespace saccade
