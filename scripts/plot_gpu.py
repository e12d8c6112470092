"""Draw the GPU records: prefill in TFLOP/s and decoding in GB/s by length, against peers.

python scripts/plot_gpu.py   (reads benchmarks/results, writes docs/img/gpu-attention.png)
"""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
INK, SOFT, FAINT = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = {
    "saccade, Gluon": "#2563a8",
    "saccade, Triton": "#0f8a6c",
    "cuDNN": "#c2410c",
    "FlashAttention-2": "#b8860b",
}
NAMES = {
    "gluon": "saccade, Gluon",
    "triton": "saccade, Triton",
    "cudnn": "cuDNN",
    "flash2": "FlashAttention-2",
}
Series = dict[str, dict[int, float]]


def read(name: str) -> dict:
    """A record by the name of its file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def prefill() -> tuple[Series, float]:
    """Causal D 128, TFLOP/s by length, and the rate of a large matrix product."""
    record = read("h200_attention")
    rows = [r for r in record["rows"] if r["case"] == "forward" and r["head_dim"] == 128]
    rows = [r for r in rows if r.get("causal", True)]
    return _series(rows, NAMES, "tflop"), record["ceilings"]["matmul_tflops"]


def decode() -> tuple[Series, float]:
    """Batch 1, bfloat16, GB/s by number of keys, and the read ceiling."""
    record = read("h200_attention")
    rows = [r for r in record["rows"] if r["case"] == "decode"]
    rows = [r for r in rows if not {"batch", "storage", "window"} & set(r)]
    return _series(rows, NAMES, "gbytes"), record["ceilings"]["read_gbs"]


def _series(rows: list[dict], names: dict[str, str], work: str) -> Series:
    """Work a second by number of keys, for each of the backends."""
    return {
        title: {r["keys"]: 1e3 * r[work] / r["ms"][key] for r in rows if key in r["ms"]}
        for key, title in names.items()
    }


def draw(axes: Axes, series: Series, ceiling: float, title: str, unit: str, limit: str) -> None:
    """One panel: a line for each implementation under the ceiling of the same run."""
    for name, found in series.items():
        ours = name.startswith("saccade")
        points = sorted(found.items())
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=name,
            color=COLORS[name],
            marker="o",
            markerfacecolor=COLORS[name] if ours else "white",
            linewidth=2 if ours else 1.2,
        )
    axes.axhline(ceiling, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(limit, (1, ceiling), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    lengths = sorted({x for found in series.values() for x in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    axes.set_ylim(0, 1.1 * ceiling)
    axes.set_title(title, loc="left", color=INK, weight="bold")
    axes.set_ylabel(unit, color=SOFT)
    axes.grid(axis="y", color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=8)


def main() -> None:
    """Draw both panels into one picture."""
    figure = Figure(figsize=(10.4, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw(left, *prefill(), "Prefill, causal, D 128", "TFLOP/s", "matrix product")
    draw(right, *decode(), "Decoding, batch 1, by keys", "GB/s", "reading alone")
    figure.savefig(ROOT / "docs/img/gpu-attention.png")


if __name__ == "__main__":
    main()
