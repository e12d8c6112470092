"""Which backend supports what: the support matrix as data, and a call for each of its cells.

A cell holds letters: P a prompt, D decoding (one query), G gradients; "." for none of them, "-"
where the combination makes no sense.  The tests run every cell that can run here and call `refusal`
for the others (test_support_matrix.py); docs/support.md is `markdown()`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.core import BlockSelection, DenseKV, KVView, Mask, PerHeadFP8KV, quantize_fp8_per_head
from tests.support import views
from tests.support.random_inputs import normal, qkv

KINDS = {"P": "prompt", "D": "decoding", "G": "gradients"}
K_LEN = 192
Q_LEN = {"P": 160, "D": 1, "G": K_LEN}
DTYPES = ("float32", "float64", "bfloat16", "float16")
# What a call is made of where its row says nothing else.
BASE = {
    "gluon": "bfloat16", "gluon_triton": "bfloat16", "gluon_fp8": "fp8", "sdpa_cuda": "bfloat16",
    "fa3": "bfloat16", "fa4": "bfloat16", "flash_attn": "bfloat16", "flashinfer": "bfloat16",
}  # fmt: skip
BATCH = {"flashinfer": 1}  # rows of a call, 2 elsewhere

TABLE = """
row            reference tiled cpu  sdpa sdpa_cuda triton gluon gluon_triton gluon_fp8
causal         PDG       PDG   PDG  PDG  PDG       PDG    PDG   G            PD
all            PDG       PDG   PDG  PDG  PDG       PDG    PDG   G            PD
window         PDG       PDG   PDG  PDG  PD        PDG    PDG   G            PD
sinks          PDG       PDG   PDG  PDG  PD        PDG    PDG   G            PD
key_padding    PDG       PDG   PDG  PDG  PD        PDG    .     .            .
kv_lens        PDG       PDG   PDG  PDG  PD        PDG    PD    .            .
q_offset       PDG       PDG   PDG  PDG  PD        PDG    PD    .            .
cu_seqlens     PDG       PDG   PDG  PDG  .         PDG    PD    .            .
blocks         PDG       PDG   PD   PDG  PD        PDG    P     .            .
attn_mask      PDG       PDG   PD   PDG  PD        PDG    .     .            .
softcap        PDG       PDG   PDG  .    .         PDG    P     G            .
sink_logits    PDG       PDG   PDG  PD   PD        PDG    PDG   G            PD
alibi_slopes   PDG       PDG   PDG  PDG  PD        PDG    P     G            .
learned_slopes G         G     .    .    .         .      .     .            .
value_dim      PDG       PDG   PDG  .    PDG       PDG    .     .            .
lse            PDG       PDG   PDG  PD   PD        PDG    PDG   G            PD
head_dim_80    PDG       PDG   PDG  PDG  PDG       PDG    PD    .            .
head_dim_256   PDG       PDG   PDG  PDG  PDG       PDG    PD    G            .
float32        PDG       PDG   PDG  PDG  PDG       PDG    .     .            .
float64        PDG       PDG   .    PDG  .         .      .     .            .
bfloat16       PDG       PDG   PDG  PDG  PDG       PDG    PDG   G            .
float16        PDG       PDG   PDG  PDG  PDG       PDG    PDG   G            .
fp8            PD        PD    .    .    .         .      .     .            PD
ring           PDG       PDG   PD   PDG  PD        PD     P     .            .
paged          PDG       PDG   PD   PDG  .         PD     PD    .            .
ragged         PDG       PDG   PD   PDG  .         PD     .     .            .
int8           PDG       PDG   PD   PDG  .         PD     PD    .            .
int4           PDG       PDG   PD   PDG  .         PD     PD    .            .
quantized_fp8  PDG       PDG   .    PDG  .         PD     PD    .            .
growing        PDG       PDG   .    PDG  .         PD     D     .            .
cpu_tensors    PDG       PDG   PDG  PDG  -         .      .     .            .
cuda_tensors   PDG       PDG   .    PDG  PDG       PDG    PDG   G            PD
"""

PEERS = """
row            fa3 fa4 flash_attn flashinfer
causal         PDG PDG PDG        PD
all            PDG PDG PDG        PD
window         PDG PDG PDG        PD
sinks          .   .   .          .
key_padding    .   .   .          .
kv_lens        .   .   D          .
q_offset       .   .   .          .
cu_seqlens     PDG PDG PDG        .
blocks         .   .   .          .
attn_mask      .   .   .          .
softcap        PDG PDG PDG        PD
sink_logits    PD  PD  PD         PD
alibi_slopes   .   .   PDG        .
learned_slopes .   .   .          .
value_dim      PD  .   .          .
lse            PD  PDG PD         PD
head_dim_80    PDG PDG PDG        .
head_dim_256   PDG PDG PDG        PD
float32        .   .   .          .
float64        .   .   .          .
bfloat16       PDG PDG PDG        PD
float16        PDG PDG PDG        PD
fp8            .   .   .          .
ring           .   .   .          .
paged          .   .   .          .
ragged         .   .   .          .
int8           .   .   .          .
int4           .   .   .          .
quantized_fp8  .   .   .          .
growing        .   .   .          .
cpu_tensors    .   .   .          .
cuda_tensors   PDG PDG PDG        PD
"""

MEANING = {
    "causal": "no query attends to a later key",
    "all": "`causal=False`",
    "window": "the last `window` keys",
    "sinks": "the first keys stay visible outside the window",
    "key_padding": "holes anywhere in a row",
    "kv_lens": "every row has its own length",
    "q_offset": "every row's queries have their own position",
    "cu_seqlens": "packed sequences",
    "blocks": "a `BlockSelection`",
    "attn_mask": "any boolean mask",
    "softcap": "scores are capped by tanh",
    "sink_logits": "learned sinks in the denominator",
    "alibi_slopes": "ALiBi",
    "learned_slopes": "ALiBi with gradients to the slopes",
    "value_dim": "values of 128 channels beside keys of 64",
    "lse": "the lse is returned (and has a gradient)",
    "head_dim_80": "heads of 80 channels",
    "head_dim_256": "heads of 256 channels",
    "fp8": "queries, keys and values in fp8 with a scale per head",
    "ring": "`DenseKV` with spans",
    "paged": "`PagedKV`",
    "ragged": "`RaggedKV`, other keys for every head",
    "int8": "`QuantizedKV` of 8 bits",
    "int4": "`QuantizedKV` of 4 bits",
    "quantized_fp8": "`QuantizedKV` of float8_e4m3fn",
    "growing": "`GrowingKV`, quantized keys of a captured decoding step",
    "cpu_tensors": "tensors on the CPU",
    "cuda_tensors": "tensors on an NVIDIA GPU",
}


@dataclass(frozen=True)
class Cell:
    """One backend, row and kind of call, and whether the backend supports it."""

    backend: str
    row: str
    kind: str
    supported: bool

    def __str__(self) -> str:
        return f"{self.backend}-{self.row}-{KINDS[self.kind]}"

    @property
    def base(self) -> str:
        """Dtype of the call, "fp8" for a scale per head."""
        return BASE.get(self.backend, "float32")


def _parse(table: str) -> tuple[tuple[str, ...], dict[str, dict[str, str]]]:
    head, *lines = (line.split() for line in table.strip().splitlines())
    rows = {row: dict(zip(head[1:], cells, strict=True)) for row, *cells in lines}
    return tuple(head[1:]), rows


OURS, _ROWS = _parse(TABLE)
PEER_COLUMNS, _PEER_ROWS = _parse(PEERS)
COLUMNS = OURS + PEER_COLUMNS
ROWS = {row: kinds | _PEER_ROWS[row] for row, kinds in _ROWS.items()}
NOTHING = {".": "-", "-": ""}  # as the documentation shows it


def kinds_of(row: str) -> str:
    """The kinds of call that a row is about; fp8 numbers have no gradient anywhere."""
    return {"learned_slopes": "G", "fp8": "PD"}.get(row, "PDG")


def cells() -> list[Cell]:
    """All cells of the matrix, supported or not."""
    return [
        Cell(backend, row, kind, kind in kinds[backend])
        for row, kinds in ROWS.items()
        for backend in COLUMNS
        for kind in kinds_of(row)
        if kinds[backend] != "-" and not (BASE.get(backend) == "fp8" and kind == "G")
    ]


@dataclass(frozen=True)
class Given:
    """Arguments of `attend`, and the tensors that get a gradient where one is asked for."""

    q: Any
    kv: KVView
    options: dict[str, Any]
    leaves: tuple[Tensor, ...] = ()


def call_of(cell: Cell) -> Given:
    """The arguments of `attend` that stand for a cell."""
    given = _plain(cell)
    if cell.row == "cuda_tensors":
        given = replace(given, q=_on_meta(given.q), kv=_view_on_meta(given.kv))
    if cell.kind == "G":
        given = _with_leaves(given, cell)
    return given


def _plain(cell: Cell) -> Given:
    """The call without gradients."""
    q_len, batch = Q_LEN[cell.kind], BATCH.get(cell.backend, 2)
    packed = cell.row == "cu_seqlens"
    dim = int(cell.row[9:]) if cell.row.startswith("head_dim_") else 64
    base = cell.row if cell.row in (*DTYPES, "fp8") else cell.base
    dtype = torch.float32 if base == "fp8" else getattr(torch, base)
    q, k, v = qkv(
        q_len=2 * q_len if packed else q_len, k_len=K_LEN, dim=dim, dtype=dtype,
        batch=1 if packed else batch, value_dim=128 if cell.row == "value_dim" else None,
    )  # fmt: skip
    options = _options(cell.row, q.shape[2], batch) | {"wants_lse": cell.row == "lse"}
    return Given(*_stored(cell.row, base, q, k, v), options)


def _options(row: str, q_len: int, batch: int) -> dict[str, Any]:
    """The options of `attend` that a row is about."""
    mask = {
        "all": Mask(causal=False), "window": Mask(window=50), "sinks": Mask(window=50, sinks=3),
    }  # fmt: skip
    allowed = torch.ones(1, 1, -(-q_len // 128), -(-K_LEN // 128), dtype=torch.bool)
    allowed[..., -1, 0] = False
    options = {
        "key_padding": {"key_padding": torch.rand(batch, K_LEN) > 0.3},
        "kv_lens": {"kv_lens": torch.tensor([K_LEN, K_LEN - 20])[:batch]},
        "q_offset": {"q_offset": torch.tensor([K_LEN - q_len, K_LEN - q_len - 5])[:batch]},
        "cu_seqlens": {
            "cu_seqlens": (torch.tensor([0, q_len // 2, q_len]), torch.tensor([0, 90, K_LEN]))
        },
        "blocks": {"blocks": BlockSelection(allowed=allowed, q_block=128, k_block=128)},
        "attn_mask": {"attn_mask": torch.rand(batch, 1, q_len, K_LEN) > 0.3},
        "softcap": {"softcap": 2.0},
        "sink_logits": {"sink_logits": normal(4)},
        "alibi_slopes": {"alibi_slopes": torch.rand(4)},
        "learned_slopes": {"alibi_slopes": torch.rand(4)},
        "growing": {"kv_lens": torch.tensor([K_LEN, K_LEN - 20])[:batch]},
    }
    return {"mask": mask.get(row, Mask())} | options.get(row, {})


def _stored(row: str, base: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, KVView]:
    """Queries, and keys and values in the view that a row is about."""
    if row in ("int8", "int4", "quantized_fp8", "growing"):
        bits = 4 if row == "int4" else 8
        view = views.quantized(k, v, recent=64, bits=bits, fp8=row == "quantized_fp8")
        return q, views.growing(view) if row == "growing" else view
    if row == "ragged":
        kept = torch.rand(k.shape[:3]) > 0.4
        return q, views.ragged(k, v, kept)
    if row in ("ring", "paged"):
        return q, views.ring(k, v) if row == "ring" else views.paged(k, v, 16)
    if base == "fp8":
        keys, values = quantize_fp8_per_head(k), quantize_fp8_per_head(v)
        view = PerHeadFP8KV(DenseKV(keys.qdata, values.qdata), keys.scale, values.scale)
        return quantize_fp8_per_head(q), view
    return q, DenseKV(k, v)


def _with_leaves(given: Given, cell: Cell) -> Given:
    """The same call with gradients to q, to plain keys and values, and to what a row learns."""
    options, learned = dict(given.options), ()
    name = {"sink_logits": "sink_logits", "learned_slopes": "alibi_slopes"}.get(cell.row)
    if name is not None:
        options[name] = options[name].clone().requires_grad_()
        learned = (options[name],)
    q, kv = given.q.clone().requires_grad_(), given.kv
    if not (isinstance(kv, DenseKV) and kv.is_plain):
        return Given(q, kv, options, (q, *learned))
    k, v = kv.k.clone().requires_grad_(), kv.v.clone().requires_grad_()
    return Given(q, DenseKV(k, v), options, (q, k, v, *learned))


def on_cuda(given: Given) -> Given:
    """The same call on a GPU; leaves are leaves again."""

    def move(x: Any) -> Any:
        if isinstance(x, Tensor):
            moved = x.detach().to("cuda")
            return moved.requires_grad_() if x.requires_grad else moved
        if isinstance(x, tuple):
            parts = [move(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        if isinstance(x, dict):
            return {name: move(value) for name, value in x.items()}
        fields = getattr(x, "__dataclass_fields__", {})
        return replace(x, **{name: move(getattr(x, name)) for name in fields}) if fields else x

    q, kv, options = move(given.q), move(given.kv), move(given.options)
    leaves = (q, kv.k, kv.v) if given.leaves else ()
    return Given(q, kv, options, leaves)


def _on_meta(x: Any) -> Any:
    """Tensors without memory, which stand for those on a GPU."""
    return replace(x, qdata=x.qdata.to("meta"), scale=x.scale.to("meta")) if hasattr(
        x, "qdata"
    ) else x.to("meta")  # fmt: skip


def _view_on_meta(kv: KVView) -> KVView:
    if isinstance(kv, PerHeadFP8KV):
        scales = {"k_scale": kv.k_scale.to("meta"), "v_scale": kv.v_scale.to("meta")}
        return replace(kv, qdata=_view_on_meta(kv.qdata), **scales)
    assert isinstance(kv, DenseKV)
    return DenseKV(kv.k.to("meta"), kv.v.to("meta"))


def markdown() -> str:
    """The matrix as docs/support.md shows it."""
    lines = [
        "# What each backend computes",
        "",
        "Rows are features of a call of `saccade.attention` or `saccade.attend`, columns the "
        "backends that `backend=` names (`sdpa` on the CPU and on a GPU). P: prompts of many "
        "queries; D: decoding, one query; G: gradients; `-`: the backend raises `Unsupported` with "
        'the reason. `backend="auto"` takes one that supports the call. In the column of '
        "`gluon_fp8` queries, keys and values are fp8, elsewhere they are bf16 or fp32 unless the "
        "row names a dtype. Every cell is tested (`tests/ops/test_support_matrix.py`): run where "
        "the hardware allows it, else compared with the backend's `refusal`. This page is written "
        "from `tests/support/matrix.py`: `python -m tests.support.matrix > docs/support.md`.",
        "",
        *_table(OURS),
        "",
        *ABOUT_PEERS,
        *_table(PEER_COLUMNS),
    ]
    return "\n".join(lines) + "\n"


ABOUT_PEERS = (
    "Keys may have up to 576 channels in `cpu`, and in `triton` where at most 16 queries in 16 "
    "bits read dense keys, rings or pages. Where values are the first channels of keys, in the "
    "same memory (`attention(q, k, k[..., :512])`, absorbed MLA), `triton` reads those once.",
    "",
    "## Packages of others",
    "",
    "Four backends are thin adapters to packages that need not be installed: none is imported "
    "before a call on a GPU that it could take. `auto` takes one only where it is installed and a "
    "measured rule of this GPU puts it first (`saccade.explain` names the rule and its record); "
    '`backend="fa3"` takes it by name.',
    "",
    "| backend | package | from | what else it asks for |",
    "|---|---|---|---|",
    "| `fa3` | `flash_attn_3`, or `fa3-fwd` | Hopper | `fa3-fwd` has no windows, float16 and "
    "gradients: what a build lacks is read from its own flags. Values that are the first 256 to "
    "512 channels of keys, in the same memory (absorbed MLA: 576 and 512), are read once |",
    "| `fa4` | `flash-attn-4` | Hopper | seconds of compiling for every new kind of call; not "
    "offered on Blackwell, where nobody tried the adapter |",
    "| `flash_attn` | `flash-attn` 2.6 or newer | Ampere | pages of a multiple of 256 slots, which "
    "it reads in place; over pages and `kv_lens` every query has to see all keys of its row |",
    "| `flashinfer` | `flashinfer-python` | Ampere | a batch of one row, heads of 64, 128 or 256; "
    "it compiles its kernels with nvcc where no binary of them is installed |",
    "",
    "All take bfloat16 or float16, head dimensions that are multiples of 8 up to 256 (but for "
    "MLA), and the last query at the last key. `fa3` and `fa4` multiply what lies behind a row's "
    "keys by 0, so NaN there would reach the result: they take no pages and no `kv_lens`. Inside "
    "`torch.compile` they serve `auto` without gradients, and not by name. Adapters are tested "
    "against fakes of the published signatures (`tests/support/peers.py`), and on a GPU where the "
    "package can be imported (`tests/ops/test_peers.py`). On a card `fa3` has passed them (fa3-fwd "
    "0.0.3, one H200, torch 2.11); the other adapters have not run on one yet.",
    "",
)


def _table(columns: tuple[str, ...]) -> list[str]:
    """The rows of some backends."""
    lines = ["| | " + " | ".join(map(_title, columns)) + " | |", "|---" * (len(columns) + 2) + "|"]
    for row, kinds in ROWS.items():
        shown = (NOTHING.get(kinds[name], " ".join(kinds[name])) for name in columns)
        lines.append(f"| `{row}` | " + " | ".join(shown) + f" | {MEANING.get(row, row)} |")
    return lines


def _title(column: str) -> str:
    return "`sdpa`, GPU" if column == "sdpa_cuda" else f"`{column}`"


if __name__ == "__main__":
    print(markdown(), end="")
