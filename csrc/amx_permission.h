// Whether this process may use the matrix tiles of AMX.
#pragma once

namespace saccade {

// Asks the operating system, which grants their 8 KiB of state to processes that ask; false where
// the processor has no tiles for bfloat16 or the system says no.
bool ask_for_amx();

}  // namespace saccade
