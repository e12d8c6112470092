#include "linear_binding.h"

#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "linear.h"
#include "linear_arguments.h"

namespace saccade {
namespace {

const LinearKernels& linear_kernels(const std::string& target) {
  const Kernels* kernels = find_kernels(target.c_str());
  if (!kernels) throw std::invalid_argument("this machine has no SIMD target \"" + target + "\"");
  return *kernels->linear;
}

// gate: 0 for none, 1 silu, 2 gelu by tanh.
void linear(nb::handle x, nb::handle weights, nb::handle biases, nb::handle outs,
            nb::handle scratch, int64_t gate, int64_t threads, const std::string& target) {
  const LinearKernels& kernels = linear_kernels(target);
  const LinearArg call = read_linear(x, weights, biases, outs, scratch, gate, threads);
  nb::gil_scoped_release unlocked;
  kernels.products(check(call));
}

// Rows `index` of the weight, or those from `first` on where it is None, to out [n, in].
void read_rows(nb::handle weight, nb::handle index, int64_t first, nb::handle out,
               int64_t threads, const std::string& target) {
  const LinearKernels& kernels = linear_kernels(target);
  RowsArg call{read_packed(weight), std::nullopt, first, tensor(out), threads};
  if (!index.is_none()) call.index = tensor(index);
  nb::gil_scoped_release unlocked;
  kernels.read_rows(check(call));
}

// False where a number or a scale leaves the range of float16.
bool pack_weight(int64_t kind, nb::handle raw, nb::handle weight, int64_t threads,
                 const std::string& target) {
  const LinearKernels& kernels = linear_kernels(target);
  const PackArg call{kind, tensor(raw), read_packed(weight), threads};
  nb::gil_scoped_release unlocked;
  return kernels.pack(check(call));
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def("linear", &linear, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(),
        nb::arg(), nb::arg());
  m.def("read_rows", &read_rows, nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg());
  m.def("pack_weight", &pack_weight);
}

}  // namespace saccade
