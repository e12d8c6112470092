// All kernels for one target: compiled once for each, with that target's flags.
#include "attend.h"
#include "backward.h"
#include "ceilings.h"
#include "dispatch.h"

#define SACCADE_STRING_(x) #x
#define SACCADE_STRING(x) SACCADE_STRING_(x)

namespace saccade::SACCADE_TARGET {

extern const LinearKernels linear_kernels;  // linear_kernels.cpp
extern const Kernels kernels;
const Kernels kernels = {SACCADE_STRING(SACCADE_TARGET), attend,   workspace_bytes, attend_backward,
                         fma_flops,                      fma_chains, read_all,      exp2_row,
                         &linear_kernels};

}  // namespace saccade::SACCADE_TARGET
