// A call that was described once: its next calls give addresses alone.
#pragma once
#include <nanobind/nanobind.h>

#include "call.h"

namespace saccade {

class DescribedCall {
 public:
  explicit DescribedCall(CallArg call) : call_(std::move(call)) {}

  // The call with its tensors at other places: (address, reach) of q, of out, of the lse where it
  // is wanted, then of the other tensors in the order of `each_tensor`.  Nothing is checked but the
  // number of places.
  CallArg at(nanobind::tuple places, int64_t threads) const;

 private:
  const CallArg call_;
};

}  // namespace saccade
