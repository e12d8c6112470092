"""What is measured, as data: shapes, storage types and the bar that each of them has to meet.

Work is counted exactly, from `Mask.num_pairs`: a visible (query, key) pair costs 2 D + 2 Dv
floating-point operations a head forward, and 2.5 times that backward (five products for two).
Bytes are the least that any kernel must move: keys, values and queries read once, the output
written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from saccade.core import Mask

Work = Literal["prefill", "decode", "window", "backward"]
Measure = Literal["peak", "bandwidth", "torch", "product", "time", "rate", "pairs"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {"int8": 8, "int4": 4}
GROUP = 64  # tokens that share a key scale, channels that share a value scale: the cache's own
RECENT = 64  # newest tokens that the quantized cache keeps in full precision
BACKWARD_FACTOR = 2.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A limit on one measure of a case.

    Attributes:
        measure: what is limited.
            peak        share of the machine's FMA rate, at least
            bandwidth   share of the machine's read bandwidth, at least
            torch       speed as a multiple of torch SDPA's on the same tensors, at least
            product     share of the rate of torch's bfloat16 matrix product, at least
            rate        speed as a multiple of that of the case `against`, at least
            time        time as a multiple of that of the case `against`, at most
            pairs       time as a multiple of what the pair count predicts at the rate measured
                        for the case `against`, at most
        limit: the number; against: name of another case.
    """

    measure: Measure
    limit: float
    against: str = ""

    @property
    def at_most(self) -> bool:
        """Whether smaller is better."""
        return self.measure in ("time", "pairs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One problem: batch 1, causal, the queries at the end of the keys.

    Attributes:
        group: cases of a group are timed together, their samples alternating.
        storage: of keys and values.  Queries have it too where it is a float type, else `q_type`.
        hadamard: quantized keys and values are Hadamard-transformed, as the cache stores them by
            default.
        peers: whom to time on the same tensors ("torch", "flex").
        quick: belongs to the one-minute subset.
    """

    group: str
    work: Work
    heads: int
    kv_heads: int
    head_dim: int
    q_len: int
    kv_len: int
    storage: str
    window: int | None = None
    q_type: str = "fp32"
    hadamard: bool = False
    bars: tuple[Bar, ...] = ()
    peers: tuple[str, ...] = ()
    quick: bool = False

    @property
    def name(self) -> str:
        """`prefill 32/8 D128 N2048 bf16`; unique in the table."""
        return f"{self.group} {self.label}"

    @property
    def label(self) -> str:
        """What distinguishes the case from others of its group."""
        return f"{self.storage} hadamard" if self.hadamard else self.storage

    @property
    def mask(self) -> Mask:
        """Which keys each query attends to."""
        return Mask(causal=True, window=self.window)

    @property
    def q_dtype(self) -> torch.dtype:
        """Type of queries, outputs and recent keys."""
        return DTYPES[self.storage if self.storage in DTYPES else self.q_type]

    @property
    def num_pairs(self) -> int:
        """Visible (query, key) pairs of one head."""
        return self.mask.num_pairs(self.q_len, self.kv_len)

    @property
    def flops(self) -> float:
        """Floating-point operations over all heads."""
        forward = 4.0 * self.head_dim * self.heads * self.num_pairs
        return forward * BACKWARD_FACTOR if self.work == "backward" else forward

    @property
    def num_quantized(self) -> int:
        """Tokens that are stored quantized."""
        return max(0, self.kv_len - RECENT) // GROUP * GROUP if self.storage in BITS else 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values as they are stored."""
        size = self.q_dtype.itemsize
        plain = 2 * size * (self.kv_len - self.num_quantized) * self.head_dim
        if not self.num_quantized:
            return self.kv_heads * plain
        qdata = 2 * self.num_quantized * self.head_dim * BITS[self.storage] // 8
        k_scales = 4 * self.num_quantized // GROUP * self.head_dim  # float16 scale and offset
        v_scales = 4 * self.num_quantized * (self.head_dim // value_group(self.head_dim))
        return self.kv_heads * (plain + qdata + k_scales + v_scales)

    @property
    def nbytes(self) -> int:
        """Bytes that have to cross the memory bus; backward reads q k v o do and writes three."""
        rows = self.heads * self.q_len * self.head_dim * self.q_dtype.itemsize
        if self.work == "backward":
            return 4 * rows + 2 * self.kv_bytes
        return 2 * rows + self.kv_bytes


def value_group(head_dim: int) -> int:
    """Channels that share a value scale: the full head where it is no multiple of the group."""
    return GROUP if head_dim % GROUP == 0 else head_dim


def prefill(heads: int, kv_heads: int, head_dim: int, length: int, *, quick: bool) -> list[Case]:
    """One shape over every storage type."""
    group = f"prefill {heads}/{kv_heads} D{head_dim} N{length}"
    base = f"{group} fp32"
    peers = ("torch", "flex") if length < 8192 else ()  # peers need minutes there
    plain = Case(
        group=group, work="prefill", heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        q_len=length, kv_len=length, storage="fp32", quick=quick, peers=("torch", "flex"),
        bars=(Bar(measure="peak", limit=0.75), Bar(measure="torch", limit=3.0)),
    )  # fmt: skip
    bf16 = (
        Bar(measure="rate", limit=1.5, against=base),
        Bar(measure="torch", limit=1.5),
        Bar(measure="product", limit=0.5),
    )
    fp16 = (Bar(measure="time", limit=1.15, against=base),)
    qdata = (Bar(measure="time", limit=1.0, against=f"{group} bf16"),)
    return [
        plain,
        replace(plain, storage="bf16", bars=bf16, peers=("torch", *peers[1:])),
        replace(plain, storage="fp16", bars=fp16, peers=peers, quick=False),
        replace(plain, storage="int8", q_type="bf16", bars=qdata, peers=()),
        replace(plain, storage="int4", q_type="bf16", bars=qdata, peers=()),
    ]


def decode(length: int, *, quick: bool) -> list[Case]:
    """One new token over `length` keys, 32 query heads on 8 key heads of 128."""
    group = f"decode 32/8 D128 {length // 1024}k keys"
    base = f"{group} bf16"
    plain = Case(
        group=group, work="decode", heads=32, kv_heads=8, head_dim=128, q_len=1, kv_len=length,
        storage="bf16", q_type="bf16", quick=quick, peers=("torch", "flex"),
        bars=(Bar(measure="bandwidth", limit=0.8),),
    )  # fmt: skip
    int8 = Bar(measure="rate", limit=1.6, against=base)
    int4 = Bar(measure="rate", limit=2.5, against=base)
    return [
        plain,
        replace(plain, storage="fp16", quick=False),
        replace(plain, storage="int8", bars=(int8,), peers=()),
        replace(plain, storage="int4", bars=(int4,), peers=()),
        replace(plain, storage="int4", bars=(), peers=(), hadamard=True, quick=False),
    ]


def window() -> list[Case]:
    """A window of 1024 at 32k tokens, and a dense prefill with the same number of pairs."""
    group = "window 1024 8/2 D64"
    dense = Case(
        group=group, work="prefill", heads=8, kv_heads=2, head_dim=64, q_len=8192, kv_len=8192,
        storage="fp32", quick=True,
    )  # fmt: skip
    dense = replace(dense, group=f"dense 8/2 D64 N{dense.q_len}")
    bars = (Bar(measure="pairs", limit=1.2, against=dense.name),)
    narrow = replace(
        dense, group=f"{group} N32768", work="window", q_len=32768, kv_len=32768, window=1024,
        bars=bars, peers=("flex",),
    )  # fmt: skip
    return [dense, narrow]


def backward(heads: int, kv_heads: int, *, quick: bool) -> list[Case]:
    """Gradients of q, k and v."""
    bars = (Bar(measure="peak", limit=0.55), Bar(measure="torch", limit=2.0))
    return [
        Case(
            group=f"backward {heads}/{kv_heads} D64 N2048", work="backward", heads=heads,
            kv_heads=kv_heads, head_dim=64, q_len=2048, kv_len=2048, storage="fp32", bars=bars,
            peers=("torch",), quick=quick,
        )
    ]  # fmt: skip


CASES: tuple[Case, ...] = (
    *prefill(32, 8, 128, 2048, quick=False),
    *prefill(32, 8, 128, 8192, quick=False),
    *prefill(9, 3, 64, 2048, quick=True),
    *prefill(8, 8, 64, 2048, quick=False),
    *decode(4096, quick=True),
    *decode(32768, quick=False),
    *window(),
    *backward(8, 8, quick=True),
    *backward(9, 3, quick=False),
)


def selected(
    cases: Sequence[Case], *, words: Sequence[str] = (), quick: bool = False
) -> list[Case]:
    """Cases whose name contains one of the words, with the cases that their bars refer to.

    Raises:
        ValueError: a word that is in no name.
    """
    pool = [case for case in cases if case.quick or not quick]
    for word in words:
        if not any(word.lower() in case.name.lower() for case in pool):
            names = ", ".join(dict.fromkeys(case.group for case in pool))
            raise ValueError(f"no case has {word!r} in its name. The groups are: {names}.")
    wanted = {
        case.name
        for case in pool
        if not words or any(word.lower() in case.name.lower() for word in words)
    }
    for case in reversed(pool):  # bars refer to cases before their own
        if case.name in wanted:
            wanted |= {bar.against for bar in case.bars}
    return [case for case in pool if case.name in wanted]


def batches(cases: Sequence[Case]) -> list[list[Case]]:
    """Cases that are timed together: those of a group, and of groups that their bars refer to."""
    found: list[list[Case]] = []
    for case in cases:
        against = {bar.against for bar in case.bars}
        for batch in found:
            if any(other.group == case.group or other.name in against for other in batch):
                batch.append(case)
                break
        else:
            found.append([case])
    return found
