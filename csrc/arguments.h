// From Python objects to the description of a call (call.h).
//
// A tensor comes as (address, dtype code, shape, strides, bytes to the end of its storage); that
// costs a fraction of a DLPack exchange, which would be noticeable in a decoding step.
#pragma once
#include <nanobind/nanobind.h>

#include "call.h"
#include "call_shape.h"

namespace saccade {

namespace nb = nanobind;

int64_t integer(nb::handle x);
char* address(nb::handle x);
TensorArg tensor(nb::handle x);

// ((slot, position, length), ...)
std::vector<Span> read_spans(nb::handle x);

// (kind, k, v, ...), as saccade.ops.attention.cpu.binding describes each kind of view.
ViewArg read_view(nb::tuple x);

CallArg read_call(nb::handle q, nb::handle out, nb::handle lse, nb::tuple kv, bool causal,
                  int64_t window, int64_t sinks, double scale, double softcap, nb::handle q_offset,
                  nb::handle extras, int64_t threads);

// `gradients`: (d_out, delta, dq, dk, dv).
BackwardArg read_backward(CallArg call, nb::handle gradients);

// `q_shape`: (batch, heads, q_len, head_dim); `kv_shape`: (kv_heads, kv_len, value_dim);
// `blocks`: (q_block, k_block); `transformed_item`: see CallShape.
CallShape read_shape(nb::handle q_shape, nb::handle kv_shape, bool ragged, bool causal,
                     int64_t window, int64_t sinks, int64_t q_offset, nb::handle blocks,
                     int64_t transformed_item, int64_t threads, bool receives);

}  // namespace saccade
