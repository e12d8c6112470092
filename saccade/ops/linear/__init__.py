"""Linear layers whose weights stay quantized in memory, as groups along the input.

W[n, k] = q[n, k] * scale[n, g] + minimum[n, g], g = k // group.  The blocks of GGUF are such groups
(Q4_0, Q4_1, sub-blocks of Q4_K: 32 numbers of 4 bits, Q5_0, Q5_1, Q5_K: 32 that fit 6, Q6_K: 16 of
6, Q8_0: 32 of 8) and are held exactly, but for scales and minima that are rounded to float16.
"""

from saccade.ops.linear.blocks import packed_blocks, quantized
from saccade.ops.linear.forward import product_dtype
from saccade.ops.linear.packed import PackedWeight, pack
from saccade.ops.linear.products import dequantize, gated, linear, linears, rows

__all__ = [
    "PackedWeight",
    "dequantize",
    "gated",
    "linear",
    "linears",
    "pack",
    "packed_blocks",
    "product_dtype",
    "quantized",
    "rows",
]
