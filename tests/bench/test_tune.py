"""Finding launches: what is refused, what is passed over, what is kept, on disk and on screen.

The kernels of most tests are invented; one run goes through the real ones in the interpreter.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
import torch

from saccade.bench import tune, tune_options, tune_table, tune_work
from saccade.bench.gate import limits
from saccade.bench.tune import BrokenGPU, Found
from saccade.bench.tune_options import Bench
from saccade.bench.tune_work import Problem, Sizes, Work
from saccade.cli import main as cli
from saccade.core import BadInput
from saccade.ops.tuning import files as launches
from saccade.ops.tuning import tables as tuning
from saccade.ops.tuning.files import Launch

NOW, FAST, WRONG, LARGE = Launch(32, 16, 4, 1), Launch(64, 64, 4, 2), Launch(16, 16, 1, 1), "large"
FORWARD = tuning.FORWARD
TINY = Sizes(
    heads=2, kv_heads=1, check=(9, 40), prefill=40, narrow=40, window=12, blocks=40, training=24,
    decode=((1, 40),), cold=0,
)  # fmt: skip


class OutOfResources(Exception):
    """As Triton names it."""


def launch_now():
    return tuning.pick(FORWARD, torch.empty(0), 64)


@pytest.fixture
def kernel(monkeypatch):
    """An invented kernel: its results, times and failures by launch."""
    truth = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    behaves = {"seconds": {NOW: 4e-3, FAST: 2e-3}, "wrong": [WRONG], "raises": {}, "asked": []}

    def run():
        launch = launch_now()
        if launch in behaves["raises"]:
            raise behaves["raises"][launch]
        return (truth.float() * (1.1 if launch in behaves["wrong"] else 1),)

    def work(*_):
        expected = limits("out", torch.arange(5), truth, truth.float(), torch.float32)
        return Work(Problem((run,), (expected,)), (lambda: Problem((run,)),))

    def timer(runs):
        behaves["asked"].append(launch_now())
        return behaves["seconds"].get(launch_now(), 1.0)

    monkeypatch.setattr(tune_work, "work", work)
    behaves |= {"work": work, "timer": timer}
    return behaves


def tried(kernel, *candidates):
    found = Found("forward", 64, NOW)
    tune.tune(found, kernel["work"], candidates, kernel["timer"])
    return found


def status(found):
    return {str(trial.launch): trial.status for trial in found.trials}


def test_the_fastest_right_launch_wins(kernel):
    found = tried(kernel, FAST, WRONG)
    assert found.best.launch == FAST and found.seconds_now == pytest.approx(4e-3)
    assert status(found) == {str(NOW): "ok", str(FAST): "ok", str(WRONG): "WRONG"}
    assert "times the allowed error" in found.trials[-1].note
    assert kernel["asked"] == [NOW, FAST]  # a wrong one is never timed


def test_noise_changes_nothing(kernel):
    kernel["seconds"][FAST] = 3.95e-3
    assert tried(kernel, FAST).best.launch == NOW


def test_what_does_not_fit_is_passed_over(kernel):
    kernel["raises"] = {FAST: OutOfResources("shared memory\n too small"), NOW: ValueError("odd")}
    other = Launch(64, 32, 4, 2)
    found = tried(kernel, FAST, other)
    assert status(found) == {str(NOW): "failed", str(FAST): "cannot", str(other): "ok"}
    assert found.trials[1].note == "shared memory too small"
    assert found.best.launch == other and found.seconds_now is None


def test_hopeless_launches_are_no_candidates_for_best(kernel):
    found = tried(kernel, Launch(128, 128, 8, 2))
    assert found.trials[-1].status == "slow" and found.trials[-1].note == "250.0 times the best"


def test_nothing_right(kernel):
    kernel["wrong"] = [NOW, WRONG]
    assert tried(kernel, WRONG).best is None


def test_a_large_result_unlike_the_first(kernel, monkeypatch):
    small = kernel["work"]().small

    def large():
        return (torch.ones(4) if launch_now() == NOW else torch.full((4,), 1.05),)

    found = Found("forward", 64, NOW)
    work = Work(small, (lambda: Problem((large,)),))
    tune.tune(found, lambda: work, [FAST], kernel["timer"])
    assert found.trials[1].status == "WRONG" and "away from that of another" in found.trials[1].note


def bench(kernel):
    def cold():
        return {"matmul_tflops": 1.0, "read_gbs": 2.0}

    return Bench("cpu", torch.float32, kernel["timer"], lambda quick: TINY, cold)


def run(capsys, kernel, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_options, "on_gpu", lambda: bench(kernel))
        code = cli.main(["bench", "tune", "--device", "cuda", "--traceback", *words])
    return code, capsys.readouterr()


def forward(path, *more):
    return "--kernels", "forward", "--out", str(path), *more


def test_the_file_can_be_used_and_says_how_it_was_measured(kernel, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "candidates", lambda *_, quick: [FAST])
    path = tmp_path / "t.json"
    code, said = run(capsys, kernel, *forward(path, "--dims", "64"))
    assert code == 0 and f"export SACCADE_TUNING={path}" in said.out
    assert "2.00x" in said.out and "64x64 4w 2s" in said.out
    file = launches.read(path, tuning.KERNELS)
    assert file.kernels == {"forward": ((64, FAST),)} and len(file.trials) == 2
    assert {"gpu", "revision", "command", "environment", "date", "ceilings"} <= set(file.measured)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.clear_cache()
    assert launch_now() == FAST
    monkeypatch.undo()
    tuning.clear_cache()


def test_a_second_run_keeps_what_is_there(kernel, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "candidates", lambda *_, quick: [FAST])
    path = tmp_path / "t.json"
    run(capsys, kernel, *forward(path, "--dims", "64"))
    kernel["asked"].clear()
    _, said = run(capsys, kernel, *forward(path, "--dims", "128", "64"))
    assert "forward 64: kept from" in said.err and len(kernel["asked"]) == 2
    assert [dim for dim, _ in launches.read(path, tuning.KERNELS).kernels["forward"]] == [64, 128]
    _, said = run(capsys, kernel, *forward(path, "--dims", "64", "--again"))
    assert "kept" not in said.err and len(launches.read(path, tuning.KERNELS).trials) == 4


def test_stopping_leaves_the_finished_rows(kernel, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "candidates", lambda *_, quick: [FAST])
    path, timer = tmp_path / "t.json", kernel["timer"]

    def stopped(runs):
        if len(kernel["asked"]) == 2:
            raise KeyboardInterrupt
        return timer(runs)

    kernel["timer"] = stopped
    code, said = run(capsys, kernel, *forward(path, "--dims", "64", "128"))
    assert code == 130 and "Stopped early" in said.out and "goes on with the rest" in said.out
    assert [dim for dim, _ in launches.read(path, tuning.KERNELS).kernels["forward"]] == [64]


def test_a_gpu_that_breaks_down_ends_the_run(kernel, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "candidates", lambda *_, quick: [FAST])

    def broken(error):
        raise BrokenGPU("illegal access")

    monkeypatch.setattr(tune, "_still_alive", broken)
    kernel["raises"] = {FAST: RuntimeError("illegal access")}
    code, said = run(capsys, kernel, *forward(tmp_path / "t.json"))
    assert code == 130 and "The GPU broke down: illegal access" in said.err


def test_another_gpus_table_is_not_overwritten(kernel, capsys, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(launches.to_json(launches.LaunchFile(architecture="sm_89")))
    with pytest.raises(BadInput, match="is a table for sm_89, and this GPU is interpreter"):
        run(capsys, kernel, *forward(path))


def test_a_wrong_launch_is_shown_and_never_as_markup(kernel):
    kernel["wrong"] = [WRONG]
    found = tried(kernel, WRONG)
    found.trials[-1] = tune.Trial(WRONG, "WRONG", note="[bold]x")
    from rich.console import Console

    console = Console(file=io.StringIO(), width=160)
    tune_table.print_found({"gpu": "[red]name"}, [found], console, complete=True)
    text = console.file.getvalue()
    assert "[red]name, torch None" in text and "WRONG  forward 64, 16x16 1w 1s: [bold]x" in text
    assert "the same" in text and "1 of 2" in text


def test_candidates_of_every_kernel():
    for name in tune_work.SHAPES:
        for dim in (16, 64, 128, 256, 512):
            assert tune.candidates(name, dim) or dim == 512, (name, dim)
        assert len(tune.candidates(name, 64, quick=True)) <= tune.FEW
    assert set(tune_work.SHAPES) == set(tuning.KERNELS) - {"float32"}


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "tune", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("saccade: launches are measured on an NV")
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tune", "--kernels", "foward"], "--kernels: expected one of forward, "),
        (["tune", "--dims", "8"], "--dims: expected a whole number from 16 to 512, got '8'"),
        (["tune", "--dim", "64"], "no option --dim. Did you mean --dims?"),
        (["tune", "--out", "no/folder/t.json"], "there is no folder no/folder"),
        (["tun"], "saccade bench: No such command 'tun'. Did you mean 'tune'?"),
        ([], "saccade bench: Missing command. There are cpu, tune"),
    ],
    ids=" ".join,
)
def test_bad_command_lines(capsys, words, said):
    assert cli.main(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_help_of_both(capsys):
    for words, said in ((["--help"], "tune "), (["tune", "--help"], "--kernels NAME")):
        assert cli.main(["bench", *words]) == 0
        assert said in capsys.readouterr().out


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="is what this test starts")
def test_every_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    command += ["-k", "test_real_kernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.startswith(".")


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_real_kernels(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda *_, quick: [Launch(16, 32, 2, 1)])
    launched = {"n": 0}

    def timer(runs):
        launched["n"] += 1
        return 1.0 / launched["n"]

    path = tmp_path / "t.json"
    code, _ = run(capsys, {"timer": timer}, "--dims", "16", "--out", str(path))
    trials = json.loads(path.read_text())["trials"]
    assert code == 0, [(t["kernel"], t["note"]) for t in trials if "note" in t]
    assert {t.get("kernel") for t in trials} == set(tune_work.SHAPES), trials[:1]
    assert all(t["status"] == "ok" for t in trials)
    assert len(launches.read(path, tuning.KERNELS).kernels) == len(tune_work.SHAPES)


def test_what_is_timed_runs_tritons_own_kernels(monkeypatch):
    asked = []
    right = tune_work.attend

    def attend(*args, backend, **options):
        asked.append(backend)
        return right(*args, backend="tiled" if backend == "triton" else backend, **options)

    monkeypatch.setattr(tune_work, "attend", attend)
    for name in tune_work.SHAPES:
        made = tune_work.work(name, 16, TINY, "cpu", torch.float32)
        for problem in (made.small, *(large() for large in made.large)):
            for run in problem.runs:
                run()
    assert set(asked) == {"triton", "reference"}
