// Threads that wait for work, shared by all calls of the process.
#pragma once
#include <cstdint>

namespace saccade {

// Calls fn(context, i) for every i below `count`, on at most `threads` threads, the caller
// included.  Which thread takes which i is decided at run time, so fn(i) must not depend on it.
// While another Python thread owns the workers, the caller does everything itself.
void parallel_for(int threads, int64_t count, void (*fn)(void*, int64_t), void* context);

}  // namespace saccade
