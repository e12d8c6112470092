// Threads that compute work items, shared by all calls of the process.
#pragma once
#include <cstdint>

namespace saccade {

// Calls fn(context, i) for every i below `count`, on at most `threads` threads, the caller
// included.  Which thread takes which i is decided at run time, so fn(i) must not depend on it.
// While another Python thread computes here, the caller does everything itself.
//
// The threads are those of torch's OpenMP runtime: they still spin when the operator before this
// call has just ended, so nothing has to be woken, and there are not twice as many threads as cores
// that wait by spinning.  Where torch has no such runtime, or its threads come late, our own
// serve.
void parallel_for(int threads, int64_t count, void (*fn)(void*, int64_t), void* context);

// Whether to use torch's threads, where it has any; returns whether they are used from now on.
// Results are the same: this exists to measure one against the other.
bool share_threads(bool on);

}  // namespace saccade
