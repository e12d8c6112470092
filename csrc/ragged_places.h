// Where a step stores new keys and values of a ragged view: behind those of each row and head.
#pragma once
#include <cstdint>
#include <vector>

#include "call.h"
#include "layer.h"

namespace saccade {

struct RaggedPlaces {
  std::vector<int32_t> lengths;  // of [batch, kv_heads], the new tokens included
  std::vector<int64_t> pages, slots;  // of [batch, kv_heads, tokens]
};

// Places of `tokens` new tokens of each row and head; fails where pages are missing.
RaggedPlaces find_places(const ViewArg& kv, int64_t batch, int64_t kv_heads, int64_t tokens,
                         int64_t head_dim);

// Stores k and v, float32 [batch, kv_heads, tokens, head_dim], and their positions.
void write_places(const ViewArg& kv, const RaggedPlaces& to, const StepKernels& step,
                  const float* k, const float* v, int64_t tokens, int64_t position);

// The lengths as the argument of a call.
TensorArg lengths_of(RaggedPlaces& places, int64_t batch, int64_t kv_heads);

}  // namespace saccade
