// Integer arithmetic on sizes.  In the namespace of the target: see problem.h for the reason.
#pragma once
#include <cstdint>

#include "simd.h"

namespace saccade::SACCADE_TARGET {

SACCADE_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
SACCADE_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
SACCADE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace saccade::SACCADE_TARGET
