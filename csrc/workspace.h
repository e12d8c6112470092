// Memory that the kernels take for themselves: kept by each thread for its next call.
#pragma once
#include <cstddef>
#include <cstdint>

namespace saccade {

// Two buffers a thread: `call` for the calling thread's list of work items and their partial
// results, `item` for what a thread needs while it computes one work item.
enum class WorkspaceSlot { call, item };

// At least `bytes` of memory of the calling thread, aligned to 4096, valid until its next request
// for the same slot.  Throws std::bad_alloc.
void* workspace(WorkspaceSlot slot, size_t bytes);

// What a request of `bytes` allocates.
int64_t workspace_size(int64_t bytes);

// What workspaces take at the moment: those of the calling thread, those of all threads.
int64_t workspace_bytes_of_thread();
int64_t workspace_bytes_of_all();

}  // namespace saccade
