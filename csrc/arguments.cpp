#include "arguments.h"

#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace saccade {

int64_t integer(nb::handle x) {
  if (!PyLong_Check(x.ptr())) throw nb::type_error("expected an integer");
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(x.ptr(), &overflow);
  if (overflow) throw std::invalid_argument("an integer is too large");
  return value;
}

char* address(nb::handle x) {
  if (!PyLong_Check(x.ptr())) throw nb::type_error("an address must be an integer");
  const unsigned long long value = PyLong_AsUnsignedLongLong(x.ptr());
  if (value == (unsigned long long)-1 && PyErr_Occurred()) {
    PyErr_Clear();
    throw std::invalid_argument("an address is out of range");
  }
  return (char*)value;
}

namespace {

nb::tuple tuple_of(nb::handle x, size_t size, const char* what) {
  if (!PyTuple_Check(x.ptr()) || (size_t)PyTuple_GET_SIZE(x.ptr()) != size)
    throw nb::type_error(what);
  return nb::borrow<nb::tuple>(x);
}

}  // namespace

TensorArg tensor(nb::handle x) {
  nb::tuple fields = tuple_of(x, 5, "a tensor is (address, dtype, shape, strides, reach)");
  if (!PyTuple_Check(fields[2].ptr()) || !PyTuple_Check(fields[3].ptr()))
    throw nb::type_error("shape and strides must be tuples");
  nb::tuple shape = nb::borrow<nb::tuple>(fields[2]), stride = nb::borrow<nb::tuple>(fields[3]);
  const int64_t code = integer(fields[1]);
  if (code < 0 || code > (int64_t)Dtype::boolean) throw std::invalid_argument("unknown dtype code");
  if (shape.size() != stride.size() || shape.size() > TensorArg::kMaxDims)
    throw std::invalid_argument("shape and strides must have equally many dimensions, up to 5");
  TensorArg arg{address(fields[0]), (Dtype)code, (int)shape.size(), {}, {}, integer(fields[4])};
  for (int i = 0; i < arg.ndim; ++i) {
    arg.shape[i] = integer(shape[i]);
    arg.stride[i] = integer(stride[i]);
  }
  return arg;
}

std::vector<Span> read_spans(nb::handle x) {
  if (!PyTuple_Check(x.ptr())) throw nb::type_error("spans must be a tuple");
  std::vector<Span> spans;
  for (nb::handle item : nb::borrow<nb::tuple>(x)) {
    nb::tuple span = tuple_of(item, 3, "a span is (slot, position, length)");
    spans.push_back({integer(span[0]), integer(span[1]), integer(span[2])});
  }
  return spans;
}

namespace {

std::optional<TensorArg> maybe_tensor(nb::handle x) {
  if (x.is_none()) return std::nullopt;
  return tensor(x);
}

// (kind, k, v, spans)
void read_dense(nb::tuple x, ViewArg& arg) {
  tuple_of(x, 4, "a dense view is (kind, k, v, spans)");
  arg.spans = read_spans(x[3]);
}

// (kind, k, v, table, lengths), for ragged ones with positions at the end
void read_pages(nb::tuple x, bool ragged, ViewArg& arg) {
  tuple_of(x, ragged ? 6 : 5, "a view in pages is (kind, k, v, table, lengths[, positions])");
  arg.kind = ragged ? ViewKind::ragged : ViewKind::paged;
  arg.table = tensor(x[3]);
  arg.lengths = tensor(x[4]);
  if (ragged) arg.positions = tensor(x[5]);
}

// (kind, k, v, qdata, scale and offset of k, of v, bits_k, bits_v, group)
void read_quantized(nb::tuple x, ViewArg& arg) {
  tuple_of(x, 12, "a quantized view has 12 fields");
  arg.kind = ViewKind::quantized;
  arg.k_qdata = tensor(x[3]);
  arg.k_scale = tensor(x[4]);
  arg.k_offset = tensor(x[5]);
  arg.v_qdata = tensor(x[6]);
  arg.v_scale = tensor(x[7]);
  arg.v_offset = tensor(x[8]);
  arg.bits_k = integer(x[9]);
  arg.bits_v = integer(x[10]);
  arg.k_group = integer(x[11]);
}

}  // namespace

ViewArg read_view(nb::tuple x) {
  if (x.size() < 4) throw nb::type_error("a view is (kind, k, v, ...)");
  ViewArg arg;
  const std::string kind = nb::cast<std::string>(nb::str(x[0]));
  arg.k = tensor(x[1]);
  arg.v = tensor(x[2]);
  if (kind == "dense") {
    read_dense(x, arg);
  } else if (kind == "paged" || kind == "ragged") {
    read_pages(x, kind == "ragged", arg);
  } else if (kind == "quantized") {
    read_quantized(x, arg);
  } else {
    throw std::invalid_argument("unknown kind of view");
  }
  return arg;
}

namespace {

// `extras`: (sink_logits, alibi_slopes, key_padding, lengths, cu_q, cu_k, blocks, q_block, k_block,
// attn_mask, hadamard), or None when there are none.
void read_extras(nb::handle x, CallArg& call) {
  if (x.is_none()) return;
  nb::tuple extras = tuple_of(x, 11, "extras must have 11 fields");
  call.sink_logits = maybe_tensor(extras[0]);
  call.alibi = maybe_tensor(extras[1]);
  call.key_padding = maybe_tensor(extras[2]);
  call.lengths = maybe_tensor(extras[3]);
  call.cu_q = maybe_tensor(extras[4]);
  call.cu_k = maybe_tensor(extras[5]);
  call.blocks = maybe_tensor(extras[6]);
  call.q_block = integer(extras[7]);
  call.k_block = integer(extras[8]);
  call.attn_mask = maybe_tensor(extras[9]);
  call.hadamard = integer(extras[10]) != 0;
}

}  // namespace

CallArg read_call(nb::handle q, nb::handle out, nb::handle lse, nb::tuple kv, bool causal,
                  int64_t window, int64_t sinks, double scale, double softcap, nb::handle q_offset,
                  nb::handle extras, int64_t threads) {
  CallArg call;
  call.q = tensor(q);
  call.out = tensor(out);
  call.lse = maybe_tensor(lse);
  call.kv = read_view(kv);
  call.causal = causal;
  call.window = window;
  call.sinks = sinks;
  call.scale = scale;
  call.softcap = softcap;
  if (PyLong_Check(q_offset.ptr())) {
    call.q_offset = integer(q_offset);
  } else {
    call.q_offsets = tensor(q_offset);
  }
  read_extras(extras, call);
  call.threads = threads;
  return call;
}

BackwardArg read_backward(CallArg call, nb::handle gradients) {
  nb::tuple parts = tuple_of(gradients, 5, "gradients are (d_out, delta, dq, dk, dv)");
  return {std::move(call),  tensor(parts[0]), tensor(parts[1]),
          tensor(parts[2]), tensor(parts[3]), tensor(parts[4])};
}

CallShape read_shape(nb::handle q_shape, nb::handle kv_shape, bool ragged, bool causal,
                     int64_t window, int64_t sinks, int64_t q_offset, nb::handle blocks,
                     int64_t transformed_item, int64_t threads, bool receives) {
  nb::tuple q = tuple_of(q_shape, 4, "the shape of q is (batch, heads, q_len, head_dim)");
  nb::tuple kv = tuple_of(kv_shape, 3, "the shape of the keys is (kv_heads, kv_len, value_dim)");
  nb::tuple block = tuple_of(blocks, 2, "blocks are (q_block, k_block)");
  CallShape s;
  s.batch = integer(q[0]);
  s.heads = integer(q[1]);
  s.q_len = integer(q[2]);
  s.head_dim = integer(q[3]);
  s.kv_heads = integer(kv[0]);
  s.kv_len = integer(kv[1]);
  s.value_dim = integer(kv[2]);
  s.ragged = ragged;
  s.causal = causal;
  s.window = window;
  s.sinks = sinks;
  s.q_offset = q_offset;
  s.q_block = integer(block[0]);
  s.k_block = integer(block[1]);
  s.transformed_item = transformed_item;
  s.threads = threads;
  s.receives = receives;
  return s;
}

}  // namespace saccade
