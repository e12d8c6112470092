// The threads that torch computes with, where they are OpenMP's.
#pragma once

namespace saccade {

// Runs fn(context) once on each of `threads` threads of the OpenMP runtime that torch has loaded,
// the caller included, and returns when all have ended.  False, and nothing is run, where torch has
// no such runtime, in a child of fork (whose threads stayed in the parent), and in builds with
// ThreadSanitizer, which cannot see how that runtime synchronizes.
//
// `fn` must not throw, and must not rely on the number of threads: inside of another parallel
// region it runs on the caller alone.
bool run_on_openmp(int threads, void (*fn)(void*), void* context);

// Whether `run_on_openmp` would run anything here.
bool has_openmp();

}  // namespace saccade
