"""The claims of docs/caches.md: bytes of a token, bars that its records reach."""

import json
from functools import partial

import torch

from benchmarks import caches
from saccade.cache import DenseCache, QuantizedCache
from tests.docs.pages import PAGES, ROOT

TEXT = PAGES["docs/caches.md"]


def _row(name):
    return next(line for line in TEXT.splitlines() if line.startswith(f"| {name}")).split("|")


def _bytes_a_token(make, dtype=torch.float32):
    """The difference of two lengths: tokens in full precision count in neither; 64 channels."""
    sizes = []
    for length in (4096, 8192):
        cache, x = make(), torch.zeros(1, 1, length, 64, dtype=dtype)
        cache.append(x, x)
        sizes.append(cache.nbytes)
    return str((sizes[1] - sizes[0]) // 4096)


def test_bytes_of_a_token_are_those_of_the_caches():
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert _row("dense")[-2].strip() == ", ".join(_bytes_a_token(DenseCache, t) for t in dtypes)
    for name, bits in (("int8, fp8", 8), ("int4", 4)):
        make = partial(QuantizedCache, bits_k=bits, bits_v=bits)
        assert _row(name)[-2].strip() == _bytes_a_token(make)


def test_the_record_is_what_the_text_says():
    """Bars of the record: no session lost, int8 within 1e-3 of keys in float32."""
    rows = {(row["length"], row["name"]): row for row in caches.read_record()["rows"]}
    assert all(rows[length, "int8"]["kl"] <= 1e-3 for length in caches.LENGTHS)
    assert TEXT.count("dense fp32 |") == len(caches.LENGTHS)
    kills = json.loads((ROOT / "benchmarks/results/kill-sessions.json").read_text())
    assert kills["sessions_lost"] == 0
