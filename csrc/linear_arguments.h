// From Python objects to calls of the kernels of packed weights (nothing checked).
#pragma once
#include "arguments.h"
#include "check_linear.h"

namespace saccade {

// `weight`: (qdata, scale, minimum or None, out, in, group, bits).
PackedArg read_packed(nb::handle weight);

// `weights`, `biases` (tensors or None) and `outs` are tuples; scratch is None for few rows.
LinearArg read_linear(nb::handle x, nb::handle weights, nb::handle biases, nb::handle outs,
                      nb::handle scratch, int64_t gate, int64_t threads);

}  // namespace saccade
