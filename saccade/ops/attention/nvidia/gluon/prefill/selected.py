"""Blocks of a selection in tiles: every row of a tile has to read the same blocks of keys.

Blocks of fewer queries than a tile has rows are read by several heads of a KV head together, which
share a selection.  Blocks of fewer keys lie in a tile side by side.  Nothing here imports Triton.
"""

from __future__ import annotations

from math import gcd

TILE_ROWS = 128
MOST_HEADS = 16
NARROWEST = 32  # keys: each part of a tile is a copy of its own


def heads_of_tile(q_block: int, group: int) -> int | None:
    """Heads whose queries of one block fill a tile; None: a KV head's `group` does not allow it."""
    heads = TILE_ROWS // gcd(q_block, TILE_ROWS)
    return None if group % heads or heads > MOST_HEADS else heads


def parts_of_tile(k_block: int, tile_keys: int) -> int | None:
    """Parts of a tile of keys, each in one block; None: they would be too narrow."""
    width = gcd(k_block, tile_keys)
    return None if width < NARROWEST else tile_keys // width
