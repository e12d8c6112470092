// How exact a kernel has to be: the rule of tests/support/tolerance.py.
#pragma once
#include "storage.h"

namespace contract {

inline double allowance(Dtype dtype) {
  return dtype == Dtype::f32 ? 1e-6 : dtype == Dtype::f16 ? 2e-3 : 1e-2;
}

// The largest distance, infinite where a number is NaN or only one of two is infinite.
template <class Get>
double distance(const std::vector<double>& truth, Get&& get) {
  double largest = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const double x = get(i);
    if (x == truth[i]) continue;
    const double error = std::fabs(x - truth[i]);
    largest = error <= largest ? largest : std::isnan(error) ? INFINITY : error;
  }
  return largest;
}

// One tensor: its error as a share of what is allowed.
template <class Get>
double share(Dtype dtype, const std::vector<double>& truth, const std::vector<float>& eager,
             Get&& get) {
  const double size = distance(truth, [](size_t) { return 0.0; });  // gradients grow with length
  const double of_eager = distance(truth, [&](size_t i) { return rounded(dtype, eager[i]); });
  const double allowed = 2 * of_eager + allowance(dtype) * std::max(1.0, size / 4);
  return distance(truth, get) / allowed;
}

}  // namespace contract
