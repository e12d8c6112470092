// The products with packed weights for one target: compiled once for each, as kernels.cpp is.
#include "linear_pack.h"
#include "linear_products.h"
#include "linear_rows.h"

namespace saccade::SACCADE_TARGET {

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {products, read_rows, pack};

}  // namespace saccade::SACCADE_TARGET
