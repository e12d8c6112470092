"""flash-attn's functions, with its signatures and meaning, by saccade's operator on CPUs and GPUs.

    from saccade.flash_attn_interface import flash_attn_func  # instead of: from flash_attn import

Names, order and defaults of the arguments are those of flash-attn 2.8.  Tensors are laid out
`[batch, seqlen, heads, head_dim]`, packed ones `[tokens, heads, head_dim]`.  What cannot be done
is refused in one sentence; docs/flash-attn.md lists what differs.
"""

from saccade.flash_attn_interface.dense import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from saccade.flash_attn_interface.kvcache import flash_attn_with_kvcache
from saccade.flash_attn_interface.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
