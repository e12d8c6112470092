#include "linear_arguments.h"

#include <stdexcept>

namespace saccade {
namespace {

nb::tuple tuple_of(nb::handle x, const char* what) {
  if (!PyTuple_Check(x.ptr())) throw nb::type_error(what);
  return nb::borrow<nb::tuple>(x);
}

int64_t size_at(const nb::tuple& fields, int i) {
  if (!PyLong_Check(fields[i].ptr())) throw nb::type_error("the sizes of a weight are integers");
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(fields[i].ptr(), &overflow);
  if (overflow) throw std::invalid_argument("a size of a weight is too large");
  return value;
}

std::optional<TensorArg> maybe(nb::handle x) {
  if (x.is_none()) return std::nullopt;
  return tensor(x);
}

}  // namespace

PackedArg read_packed(nb::handle weight) {
  const char* what = "a weight is (qdata, scale, minimum, out, in, group, bits)";
  const nb::tuple fields = tuple_of(weight, what);
  if (fields.size() != 7) throw nb::type_error(what);
  return {tensor(fields[0]), tensor(fields[1]), maybe(fields[2]), size_at(fields, 3),
          size_at(fields, 4), size_at(fields, 5), size_at(fields, 6)};
}

LinearArg read_linear(nb::handle x, nb::handle weights, nb::handle biases, nb::handle outs,
                      nb::handle scratch, int64_t gate, int64_t threads) {
  LinearArg call{tensor(x), {}, {}, {}, gate, threads, maybe(scratch)};
  for (nb::handle w : tuple_of(weights, "weights must be a tuple"))
    call.weights.push_back(read_packed(w));
  for (nb::handle b : tuple_of(biases, "biases must be a tuple")) call.biases.push_back(maybe(b));
  for (nb::handle o : tuple_of(outs, "outs must be a tuple")) call.outs.push_back(tensor(o));
  return call;
}

}  // namespace saccade
