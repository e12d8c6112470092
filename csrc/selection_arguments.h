// From Python tuples to a selection of blocks (selection.h), checked.
#pragma once
#include <optional>

#include "arguments.h"
#include "selection.h"

namespace saccade {

// (summary, q_block, k_block, sinks, window, stride, top, share, scale, least); summary: 0 for none,
// 1 for means, 2 for bounds.  Throws std::invalid_argument.
BlockRule read_rule(nb::handle x);

// q [batch, heads, q_len, head_dim]; rows: those of the first `num_rows` blocks, or none;
// out: bool [batch, kv_heads, q_blocks, num_blocks].
Selecting make_selecting(const BlockRule& rule, const TensorArg& q, int64_t q_offset,
                         const std::optional<TensorArg>& rows, int64_t num_rows,
                         const TensorArg& out, int64_t threads);

void bind_selection(nb::module_& m);

}  // namespace saccade
