// What tensors must satisfy before anything reads or writes their memory.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>

#include "call.h"
#include "problem.h"

namespace saccade {

// Positions are int32 in the kernels; half the range leaves room for differences of two of them.
constexpr int64_t kMaxPosition = int64_t{1} << 30;
constexpr int64_t kMaxCount = int64_t{1} << 40;

[[noreturn]] void fail(const std::string& text);
void require(bool ok, const char* text);
inline std::string number(int64_t x) { return std::to_string(x); }

int64_t item_size(Dtype dtype);
bool is_float(Dtype dtype);
bool is_empty(const TensorArg& x);

// Rank, sizes, strides, alignment, and that the storage reaches as far as the tensor.
void check_tensor(const TensorArg& x, const char* name, int ndim, bool unit_last = true);
void check_shape(const TensorArg& x, const char* name, std::initializer_list<int64_t> shape);
void check_dtype(const TensorArg& x, const char* name, Dtype dtype);
// int32 or int64 [size].
void check_integers(const TensorArg& x, const char* name, int64_t size);
// That shape 0 and 1 are those of the call, or 1.
void check_broadcast(const TensorArg& x, const char* name, int64_t batch, int64_t heads);

// No two elements of a tensor that is written to may share memory.
void check_no_self_overlap(const TensorArg& x, const char* name);
void check_apart(const TensorArg& written, const char* name, const TensorArg& other,
                 const char* other_name);

// Dimensions 0, 1 and 2 of a four-dimensional tensor.
Strided strided(const TensorArg& x);
// Four dimensions of a boolean tensor, the first two broadcast where they are 1.
ByteGrid grid(const TensorArg& x);
int64_t broadcast_stride(const TensorArg& x, int dim);
int64_t integer_at(const TensorArg& x, int64_t i);

}  // namespace saccade
