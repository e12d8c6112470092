// The functions of packed weights in the Python module.
#pragma once
#include <nanobind/nanobind.h>

namespace saccade {
void bind_linear(nanobind::module_& m);
}  // namespace saccade
