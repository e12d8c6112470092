// The checks of one call, in the order in which each may rely on those before it.
#pragma once
#include "check_tensor.h"
#include "checks.h"

namespace saccade {

class Checker {
 public:
  Checker(const CallArg& call, CheckedProblem& checked)
      : c_(call), r_(checked), p_(checked.problem) {}

  void run();

 private:
  void check_queries();  // checks.cpp
  void check_outputs();
  void check_received();
  void check_written(const TensorArg& x, const char* name);

  void check_view();  // check_view.cpp
  void check_kv_tensors(int ndim);
  void check_dense();
  void check_paged();
  void check_ragged();
  void check_quantized();
  void check_table(int table_dims);
  void check_table_row(const int32_t* row, int64_t max_pages, int64_t length);
  void check_ragged_positions();
  void check_ragged_lengths();
  QuantizedTensor quantized_tensor(const TensorArg& qdata, const TensorArg& scale,
                                   const TensorArg& offset, int64_t bits, int64_t dim,
                                   int64_t scale_rows, int64_t scale_columns);

  void check_mask();  // check_options.cpp
  void check_sink_logits();
  void check_alibi();
  void check_key_padding();
  void check_blocks();
  void check_attn_mask();

  void make_sequences();  // check_sequences.cpp
  void make_varlen_sequences();

  const CallArg& c_;
  CheckedProblem& r_;
  Problem& p_;
  int64_t batch_ = 0, q_len_ = 0;
  int64_t end_ = 0;  // one past the last position of the keys
};

}  // namespace saccade
