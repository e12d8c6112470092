"""`saccade eval`: tasks with known answers under policies, cache types and sparse patterns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli.failure import UsageError, need
from saccade.cli.lengths import length
from saccade.cli.loading import check_model, load
from saccade.cli.notes import Notes
from saccade.cli.outputs import check_outputs, file_option, names_of_a_part
from saccade.cli.shared_options import GPU_BATCH, STORAGE, Device, DType, Model, Weights
from saccade.cli.tokens import tokenizer_of
from saccade.cli.values import budget, file_name, list_of, number, one_of, whole_number

if TYPE_CHECKING:
    from saccade.evals.evaluate import Plan
    from saccade.report.evaluation import Evaluation
    from saccade.report.leaderboard import Prediction

EXAMPLES = """examples:
  saccade eval niah_single_1 qa_fact -m smollm2 --context 512,1k
  saccade eval ruler -m model.gguf --context 4k --policy snapkv,ada_snapkv --budget 50%,25%
  saccade eval all -m model.gguf --context 4k,16k --cache-type int8,int8/int4 --keep run.jsonl
  saccade eval ruler -m model.gguf --policy snapkv --budget 0.5 --leaderboard results

Tasks: niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt, cwe and fwe
(all of them: ruler; the first eight: niah), aggregate_count, aggregate_user, aggregate_compare and
aggregate_time (aggregate), qa_fact and qa_hop (qa), multiturn; all. Texts are made from the seed.
Lists are combined: every policy with every budget, cache type and pattern; none leaves one out.
"""
SAMPLES = 20


def run(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="what is asked")],
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: DType = "auto",
    weights: Weights = "file",
    context: Annotated[Any, typer.Option(
        "--context", metavar="N,...", parser=list_of(length),
        help="tokens of a prompt and its answers, such as 512,4k (default: 1k)",
    )] = None,
    policy: Annotated[Any, typer.Option(
        "--policy", metavar="NAME,...", parser=list_of(str),
        help="which keys a cache keeps, as --kv-policy of `generate` takes them, or none",
    )] = None,
    budgets: Annotated[Any, typer.Option(
        "--budget", metavar="N|SHARE|SIZE,...", parser=list_of(budget),
        help="how much each policy keeps: tokens (512), a share (50%) or bytes (512MiB)",
    )] = None,
    cache_type: Annotated[Any, typer.Option(
        "--cache-type", metavar="TYPE[/TYPE],...", parser=list_of(str),
        help=f"storage of keys/values ({', '.join(STORAGE)}, none)",
    )] = None,
    sparse: Annotated[Any, typer.Option(
        "--sparse", metavar="NAME,...", parser=list_of(str),
        help="which blocks of keys are read (strided, block_topk, none)",
    )] = None,
    asked: Annotated[str, typer.Option(
        "--question", metavar="after|before|both", parser=one_of("after", "before", "both"),
        help="when a policy compresses: the question is read after, before, or a column for each",
    )] = "both",
    samples: Annotated[Any, typer.Option(
        "--samples", metavar="N", parser=whole_number(1, 10_000),
        help=f"of each task and length (default: {SAMPLES})",
    )] = SAMPLES,
    seed: Annotated[Any, typer.Option(
        "--seed", metavar="N", parser=whole_number(0, 2**63), help="of the texts (default: 42)",
    )] = 42,
    gate: Annotated[Any, typer.Option(
        "--gate", metavar="P", parser=number,
        help="score that the model itself needs for policies to be scored (default: 0.8)",
    )] = 0.8,
    text: Annotated[
        str | None, file_option("--text", "UTF-8 text to hide needles in (default: Python's help)")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="no chat template around the prompt")] = False,
    batch_size: Annotated[Any, typer.Option(
        "--batch-size", "-b", metavar="N", parser=whole_number(1),
        help="most tokens read in one step (default: 512, on a GPU 2048)",
    )] = None,
    keep: Annotated[str | None, file_option(
        "--keep", "finished samples, one a line; the same call again goes on from there"
    )] = None,
    json: Annotated[str | None, typer.Option(
        "--json", metavar="FILE|-", parser=file_name,
        help="the record; - is the last line of stdout",
    )] = None,
    leaderboard: Annotated[str | None, typer.Option(
        "--leaderboard", metavar="FOLDER", parser=file_name,
        help="write answers in the layout of kvpress' leaderboard",
    )] = None,
) -> int:  # fmt: skip
    """Score tasks with known answers, made without downloads, with and without compression."""
    check_model(model)
    if not 0 <= gate <= 1:
        raise UsageError(f"saccade eval: --gate: expected a share from 0 to 1, got {gate:g}.")
    _check(keep, json, leaderboard)
    from saccade.evals.tasks import chosen

    chosen(tasks)  # refused before a model is loaded
    grid = (policy or (), budgets or (), cache_type or (), sparse or ())
    _rows(grid, 512)
    words = None if text is None else _text(text)
    loaded = load(model, device, dtype, weights)
    tokenizer_of(loaded)
    on_gpu = loaded.model.device.type == "cuda"
    n_batch = batch_size or (GPU_BATCH if on_gpu else 512)
    from saccade.evals.evaluate import BOTH, Plan

    plan = Plan(
        tasks=tasks, contexts=context or [1024], rows=_rows(grid, n_batch),
        asked=[each for each in BOTH if asked in (each, "both")], samples=samples, seed=seed,
        gate=gate, text=words, raw=raw, n_batch=n_batch,
    )  # fmt: skip
    report, predictions = _scored(loaded, plan, keep)
    if text is not None:
        report.settings["essay"] = Path(text).name
    return _show(report, predictions, json, leaderboard, kept=keep is not None)


def _check(keep: str | None, json: str | None, leaderboard: str | None) -> None:
    """Refuse now what would fail after minutes."""
    from saccade.evals.kept import check_kept

    check_outputs({"--keep": keep, "--json": None if json == "-" else json})
    if keep is not None:
        check_kept(Path(keep).expanduser())
    if leaderboard is not None:
        path = Path(leaderboard).expanduser()
        if path.exists() and not path.is_dir():
            raise UsageError(f"--leaderboard {leaderboard} is a file; expected a folder.")
        check_outputs({"--leaderboard": str(path / "x") if path.is_dir() else str(path)})
    need("transformers", purpose="saccade eval")
    need("rich", purpose="the table of saccade eval")


def _rows(grid: tuple[Any, Any, Any, Any], n_batch: int) -> list[Any]:
    from saccade.core import BadInput
    from saccade.evals.grid import rows_of

    try:
        return rows_of(*grid, n_batch=n_batch)
    except BadInput as error:
        raise UsageError(_with_flags(str(error))) from error


def _with_flags(said: str) -> str:
    """A message about fields of ContextParams in the words of this command."""
    said = said.replace("policies and budgets go", "--policy and --budget go")
    said = said.replace("kv_policy", "--policy").replace("kv_budget", "--budget")
    return said.replace("type_k", "--cache-type")


def _text(name: str) -> str:
    from saccade.evals.text import read_text

    return read_text(Path(name).expanduser())


def _scored(loaded: Any, plan: Plan, keep: str | None) -> tuple[Evaluation, list[Prediction]]:
    from saccade.cli.progress import progress
    from saccade.core import BadInput
    from saccade.evals import evaluate

    path = None if keep is None else Path(keep).expanduser()
    _note_scaling(loaded, plan)
    try:
        with progress() as show:
            return evaluate.run(loaded, plan, keep=path, on_progress=show)
    except BadInput as error:
        raise UsageError(_with_flags(str(error))) from error


def _note_scaling(loaded: Any, plan: Plan) -> None:
    """Say of every length beyond the trained one how positions reach it."""
    from saccade.hf.model import HFModel
    from saccade.runtime import ContextParams
    from saccade.runtime.auto_scaling import INSIST, reaching

    facts, notes = HFModel(loaded.model, loaded.name, loaded.n_ctx_train).facts, Notes()
    for tokens in plan.contexts:
        _, said = reaching(ContextParams(n_batch=plan.n_batch), facts, tokens)
        if said:
            notes.note(said.replace(f" {INSIST}", ""))  # there is no such option here


def _show(
    report: Evaluation,
    predictions: list[Prediction],
    json: str | None,
    leaderboard: str | None,
    *,
    kept: bool,
) -> int:
    """Tables, files, JSON line; the exit code."""
    from saccade.report.terminal import print_evaluation, to_stdout

    print_evaluation(report, to_stdout())
    if not report.complete:
        json = names_of_a_part({"json": json})["json"]
    if json is not None and json != "-":
        report.write(Path(json).expanduser())
        print(f"Wrote {json}", file=sys.stderr)
    if leaderboard is not None and report.complete:
        from saccade.report.leaderboard import export

        for folder in export(report, predictions, Path(leaderboard).expanduser()):
            print(f"Wrote {folder}", file=sys.stderr)
    if json == "-":
        print(report.to_json(), flush=True)
    if report.complete:
        return 0
    why = report.settings.get("stopped_by")
    scored = any(result.scores for result in report.results)
    rest = "The finished samples are kept." if kept else (
        "What was scored is above; with --keep the same call goes on from there."
        if scored else "Nothing was scored yet."
    )  # fmt: skip
    print(f"Stopped{': ' + why if why else '.'} {rest}", file=sys.stderr)
    if leaderboard is not None:
        print("Nothing was written for --leaderboard: it needs the whole run.", file=sys.stderr)
    return 2 if why else 130
