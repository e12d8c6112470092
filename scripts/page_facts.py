"""Numbers that stand in sentences of README and docs, each computed from a stored record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saccade.units import significant
from scripts.page_facts_sparse import SPARSE_FACTS
from scripts.page_facts_speculation import SPECULATION_FACTS
from scripts.records import RESULTS, record, span


def cpu_fma_share() -> str:
    """Share of the FMA peak that the CPU kernels reach while reading prompts in float32."""
    found = record("cpu")
    ours = [r for r in found["rows"] if r["work"] == "prefill" and r["ours"]]
    dense = [r for r in ours if r["case"].startswith("prefill") and r["label"] == "fp32"]
    peak = found["ceilings"]["fma_peak"]
    return f"{span(100 * r['flops'] / r['seconds'] / peak for r in dense)} %"


def cpu_decode_intensity() -> str:
    """Operations a byte of decoding over bf16, int8 and int4 keys."""
    rows = {r["label"]: r for r in record("cpu")["rows"] if r["ours"] and r["work"] == "decode"}
    found = [rows[kind]["flops"] / rows[kind]["nbytes"] for kind in ("bf16", "int8", "int4")]
    return ", ".join(f"{value:.1f}" for value in found)


def h200_prefill() -> str:
    """Gluon prefill at D 128, causal, from 8k tokens on."""
    return f"{span(_tflops(r) for r in _prefill() if r['queries'] >= 8192)} TFLOP/s"


def h200_fp8_gain() -> str:
    """fp8 over bf16, both ours, D 128, causal, 16k."""
    bf16 = next(r for r in _prefill() if r["queries"] == 16384)
    fp8 = next(
        r
        for r in record("h200_attention")["rows"]
        if r["case"] == "e4m3"
        and (r["queries"], r["head_dim"], r.get("causal")) == (16384, 128, bf16.get("causal"))
    )
    return f"{bf16['ms']['gluon'] / fp8['ms']['gluon_fp8']:.1f} times"


def _prefill() -> list[Any]:
    rows = record("h200_attention")["rows"]
    return [
        r
        for r in rows
        if r["case"] == "forward" and r["head_dim"] == 128 and r.get("causal") is not False
    ]


def _tflops(row: Any) -> float:
    return 1e3 * row["tflop"] / row["ms"]["gluon"]


def h200_matmul() -> str:
    """A large matrix product on the GPU of the record."""
    return f"{record('h200_attention')['ceilings']['matmul_tflops']:.0f} TFLOP/s"


def h200_reading() -> str:
    """Reading memory alone on the GPU of the record."""
    return f"{record('h200_attention')['ceilings']['read_gbs']:.0f} GB/s"


def h200_host() -> str:
    """Host time of one call through `auto`: many queries, one query."""
    return _host("auto")


def h200_host_sdpa() -> str:
    """The same of SDPA, called directly."""
    return _host("sdpa_direct")


def _host(name: str) -> str:
    rows = record("h200_host")["rows"]
    return " and ".join(f"{r['host_us'][name]:.0f} µs" for r in rows if r["case"] == "host")


def llama_token_128k() -> str:
    """A decoding step of the 8B shape behind 128k tokens."""
    return f"{significant(_llama()['decode']['130816']['ms_per_token'])} ms"


def llama_first_128k() -> str:
    """Reading 128k tokens with the 8B shape."""
    return f"{significant(_llama()['decode']['130816']['first_token_s'])} s"


def llama_peak_128k() -> str:
    """Peak memory while the 8B shape reads 128k tokens, weights included."""
    return f"{significant(_llama()['decode']['130816']['prefill_peak_gib'])} GiB"


def llama_int8_128k() -> str:
    """A decoding step of the 8B shape behind 128k tokens over an int8 cache."""
    return f"{significant(_llama()['int8']['ms_per_token'])} ms"


def llama_int8_cache() -> str:
    """Bytes of that int8 cache."""
    return f"{significant(_llama()['int8']['cache_gib'])} GiB"


def llama_of_memory() -> str:
    """Share of the speed that memory allows, bf16, by length."""
    floor, ours = record("h200_llama")["floor_ms"], _llama()["decode"]
    return f"{span(100 * floor[f'bf16 {n}'] / ours[n]['ms_per_token'] for n in ours)} %"


def llama_errors() -> str:
    """Errors of one step against float32: SDPA in bf16, ours in bf16, over int8, over int4."""
    check = record("h200_llama")["check"]
    return ", ".join(
        f"{name} {significant(check[key]['step'], 2)}"
        for name, key in (("SDPA", "sdpa"), ("ours", "bf16"), ("int8", "int8"), ("int4", "int4"))
    )


def llama_sdpa_chunks() -> str:
    """SDPA reading 32k tokens in chunks of 8k."""
    return f"{significant(record('h200_llama')['sdpa']['chunks_s'])} s"


def _llama() -> Any:
    return record("h200_llama")["ours"]


def mistral_growth() -> str:
    """How much longer a token takes behind 32 times as many tokens, over rings."""
    ours = record("h200_mistral")["ours"]
    ratio = ours["130816"]["ms_per_token"] / ours["4096"]["ms_per_token"]
    return f"{100 * (ratio - 1):.1f} %"


def mistral_cache() -> str:
    """Bytes of the rings of the 7B shape, whatever the length."""
    return f"{significant(record('h200_mistral')['cache_gib'])} GiB"


def families_exact() -> str:
    """Model classes of transformers that are exact through saccade, of all that were tried."""
    path = RESULTS.parents[1] / "docs/families.md"
    return path.read_text().split("own eager attention: ")[1].split(" ")[0]


def demo_seconds() -> str:
    """Wall time of the demo's comparison."""
    seconds = record("compare-smollm2-quick")["seconds"]
    return f"{seconds:.0f} seconds"


def sparse_prefill() -> str:
    """Dense time by the time over a fifth of the pairs, blocks of 64 and 128."""
    rows = [r["of_dense"] for r in record("sparse_cpu")["rows"] if r["name"].startswith("prefill")]
    times = [1 / r[f"{block} 20%"] for r in rows for block in (64, 128)]
    return f"{min(times):.1f} to {max(times):.1f} times"


def sparse_decode() -> str:
    """Dense time by the time of selecting and attending to 2k keys, for one token."""
    rows = [r["of_dense"] for r in record("sparse_cpu")["rows"] if r["name"].startswith("decode")]
    times = [1 / (r["select"] + r["attend"]) for r in rows]
    return f"{min(times):.1f} to {max(times):.1f} times"


def sparse_selection() -> str:
    """Selection in C++ by the dense time, for one token."""
    rows = [r["of_dense"] for r in record("sparse_cpu")["rows"] if r["name"].startswith("decode")]
    return f"{span(100 * r['select in C++'] for r in rows)} %"


def _selecting(kind: str, queries: str) -> str:
    """Selections for chunks of so many queries by the dense time, over all numbers of keys."""
    rows = [r for r in record("sparse_prompts")["rows"] if f"for {queries} queries" in r["name"]]
    shares = [x for r in rows for name, x in r["of_dense"].items() if name.startswith(kind)]
    return f"{span(100 * x for x in shares)} %"


def sparse_xattention() -> str:
    """Selecting by XAttention for 2,048 queries, by the dense time."""
    return _selecting("XAttention", "2,048")


def sparse_xattention_512() -> str:
    """Selecting by XAttention for 512 queries, by the dense time."""
    return _selecting("XAttention", "512")


def sparse_vertical_slash() -> str:
    """Selecting by VerticalSlash for 2,048 queries, by the dense time."""
    return _selecting("VerticalSlash", "2,048")


def sparse_vertical_slash_512() -> str:
    """Selecting by VerticalSlash for 512 queries, by the dense time."""
    return _selecting("VerticalSlash", "512")


def _at_half(length: int) -> dict[str, Any]:
    """Of the patterns that read at most half of the pairs, the one with the least divergence."""
    rows = [r for r in record("sparse_quality")["rows"] if r["length"] == length]
    return min((r for r in rows if r["density"] <= 0.5), key=lambda r: r["kl"])


def sparse_best() -> str:
    """What diverges least of what reads at most half of the pairs, at 8,192 tokens."""
    row = _at_half(8192)
    row = {**row, "name": row["name"].replace("block=64, ", "")}
    same = f"{100 * row['same_top']:.1f} %"
    return f"`{row['name']}`, reads {100 * row['density']:.0f} % and keeps {same}"


def h200_latent() -> str:
    """Share of the reading bandwidth of large batches over latents, 16 and 128 heads."""
    rows = [r for r in record("h200_latent")["rows"] if r["keys"] == 32768 and "batch" in r]
    shares = [max(r["reading"]["triton"] for r in rows if r["heads"] == n) for n in (16, 128)]
    return " and ".join(f"{100 * x:.0f} %" for x in shares)


def h200_latent_products() -> str:
    """Two products with a softmax between them, by our time; the same rows."""
    rows = [r for r in record("h200_latent")["rows"] if r["keys"] == 32768 and "batch" in r]
    found = [r["ms"]["products"] / r["ms"]["triton"] for r in rows]
    return f"{min(found):.2f} to {max(found):.2f} times"


def kvzip_needles() -> str:
    """Needles that KVzip finds with half and with a quarter of the keys."""
    found = _needles()
    return " and ".join(str(found["kvzip", share]) for share in (0.5, 0.25))


def other_needles() -> str:
    """The most that another policy finds with half and with a quarter of the keys."""
    found = _needles()
    most = (
        max(n for (name, kept), n in found.items() if name != "kvzip" and kept == share)
        for share in (0.5, 0.25)
    )
    return " and ".join(map(str, most))


def _needles() -> dict[tuple[str, float | None], int]:
    rows = record("kv-policies")["rows"]
    return {(row["policy"], row.get("budget")): row["needles"] for row in rows}


def sparse_model() -> str:
    """Steps of the whole model: the dense time by that of Quest and of block top-k."""
    row = next(r for r in record("sparse_cpu")["rows"] if r["name"].startswith("a step"))
    found = row["of_dense"]
    return f"{1 / found['quest']:.1f} and {1 / found['block_topk']:.1f} times"


FACTS: dict[str, Callable[[], str]] = (
    SPARSE_FACTS
    | SPECULATION_FACTS
    | {
        f.__name__: f
        for f in (
            cpu_decode_intensity,
            cpu_fma_share,
            demo_seconds,
            families_exact,
            h200_fp8_gain,
            h200_host,
            h200_latent,
            h200_latent_products,
            kvzip_needles,
            other_needles,
            sparse_best,
            sparse_decode,
            sparse_model,
            sparse_prefill,
            sparse_selection,
            sparse_vertical_slash,
            sparse_vertical_slash_512,
            sparse_xattention,
            sparse_xattention_512,
            h200_host_sdpa,
            h200_matmul,
            h200_prefill,
            h200_reading,
            llama_errors,
            llama_first_128k,
            llama_int8_128k,
            llama_int8_cache,
            llama_of_memory,
            llama_peak_128k,
            llama_sdpa_chunks,
            llama_token_128k,
            mistral_cache,
            mistral_growth,
        )
    }
)
