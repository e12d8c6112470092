// Ceilings of this machine, measured with the kernels' own vector operations on all threads.
#pragma once
#include <cstdint>

#include "call.h"
#include "dispatch.h"

namespace saccade {

void check_threads(int64_t threads);

// Floating-point operations a second of dependent FMA chains, best of a few.
double measure_fma_peak(const Kernels& kernels, int64_t threads);

// The same of products of bfloat16 pairs: 0 where the target has none.
double measure_pair_peak(const Kernels& kernels, int64_t threads);

// Bytes a second that are read from memory beyond the caches, best of a few.
double measure_read_bandwidth(const Kernels& kernels, int64_t threads, int64_t megabytes);

// Reads a contiguous float32 vector once: what memory alone costs a kernel.
void read_memory(const Kernels& kernels, const TensorArg& memory, int64_t threads);

}  // namespace saccade
