"""What the C++ kernels allocate for themselves, beside the output: csrc/attend.h, in numbers.

Every thread keeps one workspace for a block of rows (`Prefill::carve`), and the calling thread a
list of the pieces of work with their partial results.  The workspaces are kept for the next call;
they depend on the number of queries and heads, hardly on the number of keys.
"""

from __future__ import annotations

import torch

from saccade.ops.attention.call import AttentionCall

_TILE = 128
_DECODE_ROWS = 8
_PIECES_PER_THREAD = 4
_BLOCK_ROWS = 384
_ROW, _RANGE, _PIECE = 32, 16, 64  # sizes of the structs

# target -> (rows of a strip, floats of a register)
_SHAPES = {"scalar": (4, 4), "neon": (8, 4), "avx2": (6, 8), "avx512": (12, 16)}


def scratch_bytes(call: AttentionCall, target: str) -> int:
    """Bytes of all workspaces for a call without block selection, on all of torch's threads."""
    batch, heads, length, dim = call.q.shape
    kv_heads, end, value_dim = call.kv.shape[1], call.kv.shape[2], call.kv.shape[4]
    strip, width = _SHAPES[target.removesuffix("_bf16")]
    threads, rows = torch.get_num_threads(), length * call.num_groups
    block = _block_rows(batch * heads * length, max(dim, value_dim), threads, strip)
    blocks = batch * kv_heads * -(-rows // block)
    first, last = call.q_bounds(0, length)
    keys = sum(r.stop - r.start for r in call.mask.key_ranges(first, last, end))
    splits = _splits(blocks, keys, threads)
    partial = splits * batch * kv_heads * rows if splits > 1 else 0
    shared = _arrays([(blocks * splits, _PIECE), (partial * value_dim, 4), *[(partial, 4)] * 2])
    block = min(block, rows)
    own = 2 * _RANGE if rows <= _DECODE_ROWS else _workspace(block, dim, value_dim, strip, width)
    return _pages(shared) + min(threads, blocks * splits) * _pages(own)


def _block_rows(rows: int, wide: int, threads: int, strip: int) -> int:
    """`rows_per_block`: all that cache holds, fewer where threads would have no work."""
    chosen = min(_BLOCK_ROWS, max(96, _BLOCK_ROWS * 128 // wide))
    if threads > 1:
        chosen = max(96, min(chosen, -(-rows // (threads * _PIECES_PER_THREAD))))
    return -(-chosen // strip) * strip


def _splits(blocks: int, keys: int, threads: int) -> int:
    """`choose_splits`: parts of the keys, so that every thread has some."""
    if threads == 1 or blocks == 0:
        return 1
    return max(1, min(-(-threads * _PIECES_PER_THREAD // blocks), keys // (4 * _TILE)))


def _workspace(block: int, dim: int, value_dim: int, strip: int, width: int) -> int:
    """`Prefill::carve` for a block of rows."""
    rows, columns = block + strip, 2 * width
    stride = -(-value_dim // columns) * columns
    floats = [
        rows * dim, rows * stride, rows + width, rows + width, rows * width,
        _TILE * dim, _TILE * stride, strip * (_TILE + 16), _TILE, strip * _TILE,
    ]  # fmt: skip
    return _arrays([(rows, _ROW), (2, _RANGE), *((n, 4) for n in floats)])


def _arrays(parts: list[tuple[int, int]]) -> int:
    """(count, size) arrays, each aligned to 64 bytes, as `Carver` cuts them."""
    return sum(-(-count * size // 64) * 64 + 64 for count, size in parts)


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // 4096) * 4096
