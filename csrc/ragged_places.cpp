#include "ragged_places.h"

#include "check_tensor.h"

namespace saccade {
namespace {

void check_storage(const TensorArg& x, const char* name, int64_t head_dim) {
  check_tensor(x, name, 3);
  check_shape(x, name, {x.shape[0], x.shape[1], head_dim});
  require(is_float(x.dtype), "keys are stored as float32, bfloat16 or float16.");
  check_no_self_overlap(x, name);
}

void check_indices(const ViewArg& kv, int64_t batch, int64_t kv_heads) {
  require(kv.table && kv.lengths && kv.positions,
          "a ragged view needs a table, lengths and positions.");
  check_tensor(*kv.table, "table", 3);
  check_dtype(*kv.table, "table", Dtype::i32);
  check_shape(*kv.table, "table", {batch, kv_heads, kv.table->shape[2]});
  check_tensor(*kv.lengths, "lengths of the view", 2, false);
  check_dtype(*kv.lengths, "lengths of the view", Dtype::i32);
  check_shape(*kv.lengths, "lengths of the view", {batch, kv_heads});
  check_tensor(*kv.positions, "positions", 2);
  check_dtype(*kv.positions, "positions", Dtype::i32);
  check_shape(*kv.positions, "positions", {kv.k.shape[0], kv.k.shape[1]});
  check_no_self_overlap(*kv.positions, "positions");
}

Numbers row_of(const TensorArg& x, int64_t page, int64_t slot) {
  const int64_t at = page * x.stride[0] + slot * x.stride[1];
  return {x.data + at * item_size(x.dtype), x.dtype};
}

}  // namespace

RaggedPlaces find_places(const ViewArg& kv, int64_t batch, int64_t kv_heads, int64_t tokens,
                         int64_t head_dim) {
  check_storage(kv.k, "k", head_dim);
  check_storage(kv.v, "v", head_dim);
  check_indices(kv, batch, kv_heads);
  const int64_t pages = kv.k.shape[0], size = kv.k.shape[1];
  require(kv.v.shape[0] == pages && kv.v.shape[1] == size && size >= 1,
          "keys and values must share pages.");
  const TensorArg &table = *kv.table, &lengths = *kv.lengths;
  RaggedPlaces found;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < kv_heads; ++h) {
      const auto* row = (const int32_t*)table.data + b * table.stride[0] + h * table.stride[1];
      const int64_t before =
          ((const int32_t*)lengths.data)[b * lengths.stride[0] + h * lengths.stride[1]];
      require(before >= 0 && before + tokens <= table.shape[2] * size,
              "there is no room for the new tokens.");
      for (int64_t at = before; at < before + tokens; ++at) {
        const int64_t page = row[at / size];
        require(page >= 0 && page < pages, "a new token has no page.");
        found.pages.push_back(page);
        found.slots.push_back(at % size);
      }
      found.lengths.push_back((int32_t)(before + tokens));
    }
  return found;
}

void write_places(const ViewArg& kv, const RaggedPlaces& to, const StepKernels& step,
                  const float* k, const float* v, int64_t tokens, int64_t position) {
  const TensorArg& positions = *kv.positions;
  const int64_t dim = kv.k.shape[2];
  for (size_t i = 0; i < to.pages.size(); ++i) {
    const int64_t page = to.pages[i], slot = to.slots[i];
    step.narrow(k + (int64_t)i * dim, dim, row_of(kv.k, page, slot));
    step.narrow(v + (int64_t)i * dim, dim, row_of(kv.v, page, slot));
    ((int32_t*)positions.data)[page * positions.stride[0] + slot * positions.stride[1]] =
        (int32_t)(position + (int64_t)i % tokens);
  }
}

TensorArg lengths_of(RaggedPlaces& places, int64_t batch, int64_t kv_heads) {
  return TensorArg{(char*)places.lengths.data(), Dtype::i32, 2, {batch, kv_heads}, {kv_heads, 1},
                   (int64_t)(places.lengths.size() * sizeof(int32_t))};
}

}  // namespace saccade
