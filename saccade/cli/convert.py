"""`saccade convert`: a model with another number of KV heads, saved, and what that cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli import shared_options
from saccade.cli.failure import UsageError, need
from saccade.cli.loading import check_model, load
from saccade.cli.values import file_name, one_of, whole_number

if TYPE_CHECKING:
    from saccade.evals.converting import Converted

EXAMPLES = """examples:
  saccade convert -m smollm2 --kv-heads 1 --out smollm2-mqa
  saccade convert -m smollm2 --kv-heads 1 --distill 30 --out smollm2-mqa
  saccade convert -m folder --kv-heads 4 --method mean --text book.txt --out folder-4
"""


def run(
    model: shared_options.Model,
    kv_heads: Annotated[
        Any,
        typer.Option(
            "--kv-heads",
            metavar="K",
            parser=whole_number(1),
            help="KV heads of each layer; 1 is MQA, as many as query heads is MHA",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            parser=file_name,
            help="a new folder for the converted model, which transformers loads",
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="aligned|mean",
            parser=one_of("aligned", "mean"),
            help="how heads are merged: in a basis that they share, or by their mean",
        ),
    ] = "aligned",
    distill: Annotated[
        Any,
        typer.Option(
            "--distill",
            metavar="STEPS",
            parser=whole_number(0, 100_000),
            help="steps of training of each layer against the one it replaces (default: 0)",
        ),
    ] = 0,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            "-f",
            metavar="FILE",
            parser=file_name,
            help="text to learn from; its end is kept to judge by (default: Python's help topics)",
        ),
    ] = None,
    seed: Annotated[
        Any,
        typer.Option(
            "--seed",
            "-s",
            metavar="N",
            parser=whole_number(0, 2**63 - 1),
            help="the same seed gives the same model (default: 0)",
        ),
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print a record as JSON")] = False,
    device: shared_options.Device = "auto",
    dtype: shared_options.DType = "auto",
) -> int:
    """Save a model with another number of KV heads; say what that does to quality and cache."""
    check_model(model)
    need("transformers", "safetensors", purpose="saccade convert")
    from saccade.evals.text import default_text, read_text

    folder = Path(out).expanduser()
    read = default_text() if text is None else read_text(Path(text).expanduser())
    from saccade.hf.convert_save import check_folder

    check_folder(folder)
    from saccade.cli.progress import progress
    from saccade.evals.converting import Options, convert

    loaded = load(model, device, dtype, _plain(model, device, dtype))
    check_folder(folder, loaded.weights_bytes // 2)  # at least: fewer heads take away less
    if loaded.tokenizer is None:
        raise UsageError(f"{loaded.name} has no tokenizer. Give a model that brings one.")
    options = Options(kv_heads=kv_heads, method=method, distill=distill, seed=seed)
    with progress() as show:
        record = convert(loaded, read, folder, options, on_progress=show)
    print(record.to_json() if as_json else table(record))
    for note in record.notes:
        print(f"Note: {note}", file=sys.stderr)
    print(f"Wrote {folder} ({record.bytes_on_disk / 1e6:.0f} MB).", file=sys.stderr)
    if not record.complete:
        print("Stopped: layers that were trained by then are in it.", file=sys.stderr)
    return 0 if record.complete else 130


def _plain(model: str, device: str, dtype: str) -> str:
    """The form of weights that can be changed and saved: plain numbers, whatever the file has."""
    from saccade.runtime.located import located
    from saccade.runtime.placement import device_of

    if located(model).is_dir() or device_of(device).type != "cpu":
        return "file"
    return "bf16" if dtype == "bf16" else "f32"


def table(record: Converted) -> str:
    """What the conversion did to the cache, and quality after each stage on each text."""
    kept = record.cache_bytes[1] / record.cache_bytes[0]
    lines = [
        f"{record.model}: {record.kv_heads[0]} -> {record.kv_heads[1]} KV heads; cache of a token "
        f"{record.cache_bytes[0]:,} -> {record.cache_bytes[1]:,} bytes ({kept:.0%})",
        "",
        f"{'stage':28}{'text':22}{'perplexity':>18}  {'KL':>16}  same top",
    ]
    for stage, texts in record.quality.items():
        for name, q in texts.items():
            lines.append(
                f"{stage:28}{name:22}{q['perplexity']:10,.1f} +- {q['perplexity_se']:<5.1f}"
                f"{q['kl']:9.3f} +- {q['kl_se']:.3f}  {q['same_top']:7.1%}"
            )
    return "\n".join(lines)
