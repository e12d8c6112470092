"""Numbers of docs/gpu.md on selected blocks, each computed from a stored record."""

from __future__ import annotations

from collections.abc import Callable

from scripts.records import record, span, times


def _prompt(keys: int) -> dict[str, float]:
    """Milliseconds of attention over a prompt."""
    rows = record("h200_sparse")["rows"]
    return next(r["ms"] for r in rows if (r["part"], r["keys"]) == ("prompt", keys))


def _step(storage: str) -> dict[str, float]:
    """Milliseconds of a captured step behind 128k keys."""
    rows = record("h200_sparse_steps")["rows"]
    return next(r["ms"] for r in rows if (r["keys"], r["storage"]) == (131072, storage))


def h200_sparse_prompt() -> str:
    """128k tokens in chunks of 8k, an eighth of the blocks: dense by selecting and attending."""
    ms = _prompt(131072)
    return times([ms["dense"] / x for name, x in ms.items() if name in ("block top-k", "quest")])


def h200_sparse_share() -> str:
    """The same for 95 % of the estimated attention."""
    ms = _prompt(131072)
    return times([ms["dense"] / ms["block top-p"]])


def h200_sparse_short() -> str:
    """32k tokens in chunks of 4k, an eighth of the blocks of 32k."""
    ms = _prompt(32768)
    return times([ms["dense"] / x for name, x in ms.items() if name in ("block top-k", "quest")])


def h200_sparse_pairs() -> str:
    """Random blocks at 25 and 50 %: time by the dense time and by the share of the pairs."""
    row = next(r for r in record("h200_sparse")["rows"] if r["part"] == "operator")
    found = [x for name, x in row["by_pairs"].items() if not name.endswith("10%")]
    return f"{min(found):.2f} to {max(found):.2f} times"


def h200_sparse_few_pairs() -> str:
    """The same at 10 %."""
    row = next(r for r in record("h200_sparse")["rows"] if r["part"] == "operator")
    found = [x for name, x in row["by_pairs"].items() if name.endswith("10%")]
    return f"{min(found):.2f} to {max(found):.2f} times"


def h200_sparse_step() -> str:
    """Captured steps behind 128k keys in bf16 that read 2k: dense by selecting and attending."""
    ms = _step("bf16")
    return f"{ms['dense'] / ms['quest']:.1f} and {ms['dense'] / ms['block top-k']:.1f} times"


def h200_sparse_selection() -> str:
    """Selecting alone in those steps, by the dense attention."""
    ms = _step("bf16")
    return f"{span(100 * x / ms['dense'] for name, x in ms.items() if 'select' in name)} %"


def h200_sparse_int4() -> str:
    """The same over int4 keys."""
    ms = _step("int4")
    return f"{ms['dense'] / ms['quest']:.1f} and {ms['dense'] / ms['block top-k']:.1f} times"


def h200_sparse_model_step() -> str:
    """Steps of the whole model behind 128k tokens: the dense time by theirs."""
    steps = record("h200_sparse_model")["steps"]
    dense = steps["dense"]["ms_per_token"]
    found = (dense / steps[name]["ms_per_token"] for name in ("quest", "block top-k"))
    return " and ".join(f"{x:.1f}" for x in found) + " times"


def h200_sparse_model_prompt() -> str:
    """The whole model's first token behind 128k tokens: dense, an eighth of the blocks, strided."""
    return _first_tokens("130816")


def h200_sparse_model_short() -> str:
    """The same behind 32k tokens."""
    return _first_tokens("32768")


def _first_tokens(length: str) -> str:
    found = record("h200_sparse_model")
    dense, *few = (found[name][length] for name in ("dense", "block top-k", "strided"))
    seconds = " and ".join(f"{x['first_token_s']:.2g}" for x in few)
    return f"{seconds} s instead of {dense['first_token_s']:.2g}"


SPARSE_FACTS: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        h200_sparse_few_pairs,
        h200_sparse_int4,
        h200_sparse_model_prompt,
        h200_sparse_model_short,
        h200_sparse_model_step,
        h200_sparse_pairs,
        h200_sparse_prompt,
        h200_sparse_selection,
        h200_sparse_share,
        h200_sparse_short,
        h200_sparse_step,
    )
}
