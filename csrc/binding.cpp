// The Python module saccade._cpu.
//
//   this file            each function of the module: reads arguments, releases the GIL, runs
//   arguments            Python tuples -> call.h, call_shape.h (nothing checked)
//   described_call       call.h once, addresses alone for each next call of that description
//   checks, check_*      call.h -> problem.h, or a ValueError; checker.h lists them in order
//   call_shape           call_shape.h -> a problem without memory, for planning
//   dispatch             which SIMD targets are compiled and which one runs; amx_permission
//   kernels.cpp          everything below, compiled once for each target:
//     attend               forward: work_items (cutting), then for each item
//       prefill              many rows in float32: prefill_rows, pack, micro_kernel
//       prefill_pairs        in bfloat16: pack_pairs, pair_products, amx_products, amx
//       decode               few rows: decode_plain, decode_quantized, integer_dot, loaders
//       split_kv, output     partial results, finished rows
//       hadamard             q and out of views whose keys were transformed
//     backward             gradients
//     tiles, key_ranges    which keys are read, and where they lie
//     rows, softmax        masks and the online softmax of a row
//     simd_*               vector operations of a target; intmath, arena
//   linear_binding       products with packed weights: linear_arguments, check_linear, and for each
//                        target linear_kernels.cpp: linear_products (inputs, block), linear_rows,
//                        linear_pack (blocks)
//   pool, openmp         threads: torch's, or our own
//   workspace            the memory that threads keep for the kernels
//   decoder              a step of decoding: layer_arguments, then for each layer
//     layer_kernels        norms, RoPE, the MLP; products with the weights
//   selection_arguments  which blocks of keys are read, alone or in a step; select_blocks
//   machine, ceilings    FMA rate and read bandwidth of the machine
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "arguments.h"
#include "call_shape.h"
#include "checks.h"
#include "decoder.h"
#include "described_call.h"
#include "dispatch.h"
#include "linear_binding.h"
#include "machine.h"
#include "pool.h"
#include "selection_arguments.h"
#include "workspace.h"

namespace nb = nanobind;

namespace saccade {
namespace {

const Kernels& kernels_named(const std::string& target) {
  const Kernels* kernels = find_kernels(target.c_str());
  if (!kernels) throw std::invalid_argument("this machine has no SIMD target \"" + target + "\"");
  return *kernels;
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

// `attend`, and in `received` [batch, kv_heads, keys] float32 what each key receives.
void attend_received(nb::handle q, nb::handle out, nb::handle lse, nb::tuple kv, bool causal,
                     int64_t window, int64_t sinks, double scale, double softcap,
                     nb::handle q_offset, nb::handle extras, int64_t threads,
                     const std::string& target, nb::handle received, bool largest) {
  const Kernels& kernels = kernels_named(target);
  CallArg call = read_call(q, out, lse, kv, causal, window, sinks, scale, softcap, q_offset, extras,
                           threads);
  call.received = tensor(received);
  call.largest = largest;
  nb::gil_scoped_release unlocked;
  CheckedProblem checked;
  check(call, checked);
  kernels.attend(checked.problem);
}

DescribedCall describe(nb::handle q, nb::handle out, nb::handle lse, nb::tuple kv, bool causal,
                       int64_t window, int64_t sinks, double scale, double softcap,
                       nb::handle q_offset, nb::handle extras) {
  return DescribedCall(read_call(q, out, lse, kv, causal, window, sinks, scale, softcap, q_offset,
                                 extras, 1));
}

void attend_described(const DescribedCall& described, nb::tuple places, int64_t threads,
                      const std::string& target) {
  const Kernels& kernels = kernels_named(target);
  const CallArg call = described.at(places, threads);
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
  const BackwardArg call =
      read_backward(read_call(q, out, lse, kv, causal, window, sinks, scale, softcap, q_offset,
                              extras, threads),
                    gradients);
  nb::gil_scoped_release unlocked;
  CheckedGradients checked;
  check(call, checked);
  kernels.attend_backward(checked.gradients);
}

// What `attend` allocates for a call of this shape on all threads, if none has memory from before.
int64_t workspace_bytes(nb::handle q_shape, nb::handle kv_shape, bool ragged, bool causal,
                        int64_t window, int64_t sinks, int64_t q_offset, nb::handle blocks,
                        int64_t transformed_item, int64_t threads, const std::string& target,
                        bool receives) {
  const Kernels& kernels = kernels_named(target);
  ShapedProblem shaped;
  make_problem(read_shape(q_shape, kv_shape, ragged, causal, window, sinks, q_offset, blocks,
                          transformed_item, threads, receives),
               shaped);
  return kernels.workspace_bytes(shaped.problem);
}

std::vector<std::string> targets() {
  std::vector<std::string> names;
  for (const Kernels* const* k = usable_kernels(); *k; ++k) names.emplace_back((*k)->name);
  return names;
}

double fma_peak(int64_t threads, const std::string& target) {
  const Kernels& kernels = kernels_named(target);
  nb::gil_scoped_release unlocked;
  return measure_fma_peak(kernels, threads);
}

double pair_peak(int64_t threads, const std::string& target) {
  const Kernels& kernels = kernels_named(target);
  nb::gil_scoped_release unlocked;
  return measure_pair_peak(kernels, threads);
}

double read_bandwidth(int64_t threads, int64_t megabytes, const std::string& target) {
  const Kernels& kernels = kernels_named(target);
  nb::gil_scoped_release unlocked;
  return measure_read_bandwidth(kernels, threads, megabytes);
}

void read_through(nb::handle memory, int64_t threads, const std::string& target) {
  const Kernels& kernels = kernels_named(target);
  const TensorArg vector = tensor(memory);
  nb::gil_scoped_release unlocked;
  read_memory(kernels, vector, threads);
}

// What starting and ending `items` work items costs that do nothing.
void empty_items(int64_t items, int64_t threads) {
  check_threads(threads);
  nb::gil_scoped_release unlocked;
  parallel_for((int)threads, items, [](void*, int64_t) {}, nullptr);
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
  nb::set_leak_warnings(false);  // descriptions are remembered until the process ends
  m.doc() = "CPU attention kernels; saccade.ops.attention.cpu.backend calls them.";
  m.def("attend", &saccade::attend, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg());
  m.def("attend_received", &saccade::attend_received, nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
  nb::class_<saccade::DescribedCall>(m, "DescribedCall")
      .def("attend", &saccade::attend_described);
  m.def("describe", &saccade::describe, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
  m.def("attend_backward", &saccade::attend_backward, nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
        nb::arg(), nb::arg(), nb::arg());
  m.def("workspace_bytes", &saccade::workspace_bytes, nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg("receives") = false);
  m.def("workspace_bytes_of_thread", &saccade::workspace_bytes_of_thread);
  m.def("workspace_bytes_of_all", &saccade::workspace_bytes_of_all);
  m.def("targets", &saccade::targets);
  m.def("share_threads", &saccade::share_threads);
  m.def("empty_items", &saccade::empty_items);
  m.def("fma_peak", &saccade::fma_peak, nb::arg("threads"), nb::arg("target") = "");
  m.def("pair_peak", &saccade::pair_peak, nb::arg("threads"), nb::arg("target") = "");
  m.def("read_bandwidth", &saccade::read_bandwidth, nb::arg("threads"), nb::arg("megabytes") = 512,
        nb::arg("target") = "");
  m.def("read_through", &saccade::read_through, nb::arg("memory"), nb::arg("threads"),
        nb::arg("target") = "");
  saccade::define_decoder(m);
  m.def("exp2", &saccade::exp2, nb::arg("x"), nb::arg("target") = "");
  saccade::bind_linear(m);
  saccade::bind_selection(m);
}
