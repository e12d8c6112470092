// The kernels of a decoding step for one target: compiled once for each, with that target's flags.
#include "layer_kernels.h"
#include "select_blocks.h"

namespace saccade::SACCADE_TARGET {

extern const StepKernels step_kernels;
const StepKernels step_kernels = {layer_front, layer_back, multiply, normalize, narrow, widen,
                                  select_blocks};

}  // namespace saccade::SACCADE_TARGET
