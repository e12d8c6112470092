// The Python module: turns tuples into checked arguments, releases the GIL, runs the kernels.
//
// A tensor comes as (address, dtype code, shape, strides, bytes to the end of its storage); that
// costs a fraction of a DLPack exchange, which a decoding call would feel.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "dispatch.h"
#include "pool.h"

namespace nb = nanobind;

namespace saccade {
namespace {

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

nb::tuple tuple_of(nb::handle x, size_t size, const char* what) {
  if (!PyTuple_Check(x.ptr()) || (size_t)PyTuple_GET_SIZE(x.ptr()) != size) throw nb::type_error(what);
  return nb::borrow<nb::tuple>(x);
}

TensorArg tensor(nb::handle x) {
  nb::tuple fields = tuple_of(x, 5, "a tensor is (address, dtype, shape, strides, reach)");
  if (!PyTuple_Check(fields[2].ptr()) || !PyTuple_Check(fields[3].ptr()))
    throw nb::type_error("shape and strides must be tuples");
  nb::tuple shape = nb::borrow<nb::tuple>(fields[2]), stride = nb::borrow<nb::tuple>(fields[3]);
  const int64_t code = integer(fields[1]);
  if (code < 0 || code > (int64_t)Dtype::boolean) throw std::invalid_argument("unknown dtype code");
  if (shape.size() != stride.size() || shape.size() > TensorArg::kMaxDims)
    throw std::invalid_argument("shape and strides must have the same number of dimensions, up to 5");
  TensorArg arg{address(fields[0]), (Dtype)code, (int)shape.size(), {}, {}, integer(fields[4])};
  for (int i = 0; i < arg.ndim; ++i) {
    arg.shape[i] = integer(shape[i]);
    arg.stride[i] = integer(stride[i]);
  }
  return arg;
}

std::optional<TensorArg> maybe_tensor(nb::handle x) {
  if (x.is_none()) return std::nullopt;
  return tensor(x);
}

// ("dense", k, v, spans) | ("paged", k, v, table, lengths)
// | ("ragged", k, v, table, lengths, positions)
// | ("quantized", k, v, k_codes, k_scale, k_offset, v_codes, v_scale, v_offset, bits_k, bits_v, group)
ViewArg view(nb::tuple x) {
  if (x.size() < 4) throw nb::type_error("a view is (kind, k, v, ...)");
  ViewArg arg;
  const std::string kind = nb::cast<std::string>(nb::str(x[0]));
  arg.k = tensor(x[1]);
  arg.v = tensor(x[2]);
  if (kind == "dense") {
    tuple_of(x, 4, "a dense view is (kind, k, v, spans)");
    if (!PyTuple_Check(x[3].ptr())) throw nb::type_error("spans must be a tuple");
    for (nb::handle item : nb::borrow<nb::tuple>(x[3])) {
      nb::tuple span = tuple_of(item, 3, "a span is (slot, position, length)");
      arg.spans.push_back({integer(span[0]), integer(span[1]), integer(span[2])});
    }
  } else if (kind == "paged" || kind == "ragged") {
    const bool ragged = kind == "ragged";
    tuple_of(x, ragged ? 6 : 5, "a view in pages is (kind, k, v, table, lengths[, positions])");
    arg.kind = ragged ? ViewKind::ragged : ViewKind::paged;
    arg.table = tensor(x[3]);
    arg.lengths = tensor(x[4]);
    if (ragged) arg.positions = tensor(x[5]);
  } else if (kind == "quantized") {
    tuple_of(x, 12, "a quantised view has 12 fields");
    arg.kind = ViewKind::quantized;
    arg.k_codes = tensor(x[3]);
    arg.k_scale = tensor(x[4]);
    arg.k_offset = tensor(x[5]);
    arg.v_codes = tensor(x[6]);
    arg.v_scale = tensor(x[7]);
    arg.v_offset = tensor(x[8]);
    arg.bits_k = integer(x[9]);
    arg.bits_v = integer(x[10]);
    arg.k_group = integer(x[11]);
  } else {
    throw std::invalid_argument("unknown kind of view");
  }
  return arg;
}

const Kernels& kernels_named(const std::string& target) {
  const Kernels* kernels = find_kernels(target.c_str());
  if (!kernels) throw std::invalid_argument("this machine has no SIMD target \"" + target + "\"");
  return *kernels;
}

// `extras`: (sink_logits, alibi_slopes, key_padding, lengths, cu_q, cu_k, blocks, q_block, k_block,
// attn_mask), or None when there are none.
void read_extras(nb::handle x, CallArg& call) {
  if (x.is_none()) return;
  nb::tuple extras = tuple_of(x, 10, "extras must have 10 fields");
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
}

CallArg read_call(nb::handle q, nb::handle out, nb::handle lse, nb::tuple kv, bool causal,
                  int64_t window, int64_t sinks, double scale, double softcap, nb::handle q_offset,
                  nb::handle extras, int64_t threads) {
  CallArg call;
  call.q = tensor(q);
  call.out = tensor(out);
  call.lse = maybe_tensor(lse);
  call.kv = view(kv);
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

void attend(nb::handle q, nb::handle out, nb::handle lse, nb::tuple kv, bool causal, int64_t window,
            int64_t sinks, double scale, double softcap, nb::handle q_offset, nb::handle extras,
            int64_t threads, const std::string& target) {
  const Kernels& kernels = kernels_named(target);
  const CallArg call = read_call(q, out, lse, kv, causal, window, sinks, scale, softcap, q_offset,
                                 extras, threads);
  nb::gil_scoped_release unlocked;
  CheckedProblem checked;
  check(call, checked);
  kernels.attend(checked.problem);
}

// `gradients`: (d_out, delta, dq, dk, dv); dk and dv are zero on entry, dq is added to.
void attend_backward(nb::handle q, nb::handle out, nb::handle lse, nb::tuple kv, bool causal,
                     int64_t window, int64_t sinks, double scale, double softcap,
                     nb::handle q_offset, nb::handle extras, int64_t threads,
                     const std::string& target, nb::handle gradients) {
  const Kernels& kernels = kernels_named(target);
  BackwardArg arg;
  arg.call = read_call(q, out, lse, kv, causal, window, sinks, scale, softcap, q_offset, extras,
                       threads);
  nb::tuple parts = tuple_of(gradients, 5, "gradients are (d_out, delta, dq, dk, dv)");
  arg.d_out = tensor(parts[0]);
  arg.delta = tensor(parts[1]);
  arg.dq = tensor(parts[2]);
  arg.dk = tensor(parts[3]);
  arg.dv = tensor(parts[4]);
  nb::gil_scoped_release unlocked;
  CheckedGradients checked;
  check(arg, checked);
  kernels.attend_backward(checked.gradients);
}

std::vector<std::string> targets() {
  std::vector<std::string> names;
  for (const Kernels* const* k = usable_kernels(); *k; ++k) names.emplace_back((*k)->name);
  return names;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void check_threads(int64_t threads) {
  if (threads < 1 || threads > 4096) throw std::invalid_argument("threads must be 1 to 4096");
}

// Floating-point operations a second of dependent FMA chains on all threads, best of a few.
double fma_peak(int64_t threads, const std::string& target) {
  check_threads(threads);
  const Kernels& kernels = kernels_named(target);
  nb::gil_scoped_release unlocked;
  constexpr int64_t kSteps = 4'000'000;
  struct Context {
    const Kernels* kernels;
    volatile float sink;
  } context{&kernels, 0};
  double best = 1e30;
  for (int i = 0; i < 9; ++i) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for((int)threads, threads, [](void* c, int64_t) {
      auto* context = (Context*)c;
      context->sink = context->kernels->fma_chains(kSteps);
    }, &context);
    best = std::min(best, seconds_since(start));
  }
  return kernels.fma_flops(kSteps) * (double)threads / best;
}

// Bytes a second that all threads read from memory beyond the caches, best of a few.
double read_bandwidth(int64_t threads, int64_t megabytes, const std::string& target) {
  check_threads(threads);
  if (megabytes < 1 || megabytes > 1 << 16) throw std::invalid_argument("megabytes must be 1 to 65536");
  const Kernels& kernels = kernels_named(target);
  nb::gil_scoped_release unlocked;
  const int64_t pieces = threads * 16, size = (megabytes << 20) / 4 / pieces / 1024 * 1024;
  const std::unique_ptr<float[]> memory(new float[pieces * size]);
  std::fill(memory.get(), memory.get() + pieces * size, 1.f);
  struct Context {
    const Kernels* kernels;
    const float* memory;
    int64_t size;
    volatile float sink;
  } context{&kernels, memory.get(), size, 0};
  double best = 1e30;
  for (int i = 0; i < 9; ++i) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for((int)threads, pieces, [](void* c, int64_t piece) {
      auto* context = (Context*)c;
      context->sink = context->kernels->read_all(context->memory + piece * context->size, context->size);
    }, &context);
    best = std::min(best, seconds_since(start));
  }
  return 4.0 * (double)(pieces * size) / best;
}

// Reads a contiguous float32 vector once, on all threads: what memory alone costs a kernel.
void read_through(nb::handle memory, int64_t threads, const std::string& target) {
  check_threads(threads);
  const Kernels& kernels = kernels_named(target);
  const TensorArg arg = tensor(memory);
  constexpr int64_t kPiece = 32 << 10;
  if (arg.dtype != Dtype::f32 || arg.ndim != 1 || arg.shape[0] < kPiece || arg.stride[0] != 1)
    throw std::invalid_argument("read_through needs a contiguous float32 vector of 32768 or more");
  if (!arg.data || (uintptr_t)arg.data % sizeof(float) || arg.shape[0] > arg.reach / (int64_t)sizeof(float))
    throw std::invalid_argument("the vector ends behind its memory or is misaligned");
  nb::gil_scoped_release unlocked;
  struct Context {
    const Kernels* kernels;
    const float* memory;
    volatile float sink;
  } context{&kernels, (const float*)arg.data, 0};
  parallel_for((int)threads, arg.shape[0] / kPiece, [](void* c, int64_t piece) {
    auto* context = (Context*)c;
    context->sink = context->kernels->read_all(context->memory + piece * kPiece, kPiece);
  }, &context);
}

// 2^x of each element by the kernels' own exponential, for its error bound.
std::vector<float> exp2(const std::vector<float>& x, const std::string& target) {
  std::vector<float> y(x.size());
  kernels_named(target).exp2(x.data(), y.data(), (int64_t)x.size());
  return y;
}

}  // namespace
}  // namespace saccade

NB_MODULE(_cpu, m) {
  m.doc() = "CPU attention kernels; see saccade.ops.attend.cpu for the door to them.";
  m.def("attend", &saccade::attend, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg());
  m.def("attend_backward", &saccade::attend_backward, nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg(), nb::arg(), nb::arg());
  m.def("targets", &saccade::targets);
  m.def("fma_peak", &saccade::fma_peak, nb::arg("threads"), nb::arg("target") = "");
  m.def("read_bandwidth", &saccade::read_bandwidth, nb::arg("threads"), nb::arg("megabytes") = 512,
        nb::arg("target") = "");
  m.def("read_through", &saccade::read_through, nb::arg("memory"), nb::arg("threads"),
        nb::arg("target") = "");
  m.def("exp2", &saccade::exp2, nb::arg("x"), nb::arg("target") = "");
}
