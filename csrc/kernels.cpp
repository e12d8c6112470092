// All kernels for one target: compiled once for each, with that target's flags.
#include "attend.h"
#if !defined(SACCADE_AMX)
#include "backward.h"
#endif
#include "ceilings.h"
#include "dispatch.h"

#define SACCADE_STRING_(x) #x
#define SACCADE_STRING(x) SACCADE_STRING_(x)

#if defined(SACCADE_AMX)  // all but prefill is that of the target below
namespace saccade::avx512_bf16 {
extern const Kernels kernels;
extern const LinearKernels linear_kernels;
extern const StepKernels step_kernels;
}  // namespace saccade::avx512_bf16
#endif

namespace saccade::SACCADE_TARGET {

#if defined(SACCADE_AMX)
using avx512_bf16::linear_kernels, avx512_bf16::step_kernels;
static void attend_backward(const Gradients& g) { avx512_bf16::kernels.attend_backward(g); }
#else
extern const LinearKernels linear_kernels;  // linear_kernels.cpp
extern const StepKernels step_kernels;      // layer_kernels.cpp
#endif

extern const Kernels kernels;
const Kernels kernels = {SACCADE_STRING(SACCADE_TARGET),
                         attend,
                         workspace_bytes,
                         attend_backward,
                         fma_flops,
                         fma_chains,
                         pair_flops,
                         pair_chains,
                         read_all,
                         exp2_row,
                         &linear_kernels,
                         &step_kernels};

}  // namespace saccade::SACCADE_TARGET
