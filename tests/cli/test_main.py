"""One sentence, the right exit code, no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from saccade.cli import failure, main
from saccade.cli.failure import UsageError
from saccade.core import BadInput, Unsupported

COMMANDS = ["compare", "generate", "chat", "plan", "bench", "bench cpu", "bench tune", "doctor"]


def call(capsys, *words):
    code = main.main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


BAD_LINES = [
    (["compre"], "No such command 'compre'. Did you mean 'compare'?"),
    (["zzz"], "No such command 'zzz'. There are compare, generate, chat, plan, doctor, bench."),
    (["--verbose"], "saccade has no option --verbose. Did you mean --version?"),
    (["compare", "--contxt", "5"], "no option --contxt. Did you mean --context?"),
    (["compare", "--cont=5"], "no option --cont. Did you mean --context?"),  # no abbreviations
    (["compare", "--zzz"], "no option --zzz. Run saccade compare --help"),
    (
        ["compare", "extra"],
        "unexpected extra argument(s) (extra). Run saccade compare --help",
    ),
    (["compare", "--context", "0"], "whole number of at least 1, got '0'"),
    (["compare", "--context", "-5"], "whole number of at least 1, got '-5'"),
    (["compare", "--context", "4k"], "whole number of at least 1, got '4k'"),
    (["compare", "--context"], "saccade: Option '--context' requires an argument."),
    (["compare", "--rows", " , "], "--rows: expected at least one"),
    (["compare", "--text", "no/such/file"], "no/such/file"),
    (["compare", "--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
    (["compare", "--html", "."], "--html . is a folder"),
    (["compare", "--html", "-"], "--html needs the name of a file"),
    (["compare", "--png", "x", "--html", "x"], "name the same file x"),
    (["generate", "--prompt", "hi"], "saccade generate: --model/-m: this option is required."),
    (["generate", "--model", "m"], "--prompt"),
    (["generate", "--modle", "m"], "Did you mean --model?"),
    (["plan"], "saccade plan: --model/-m: this option is required."),
    (["plan", "--model", "m", "--memory", "8 giraffes"], "--memory: expected a size such as 8GiB"),
    (["plan", "--model", "m", "--context", "0"], "at least 1, got '0'"),
    (["plan", "--model", "m", "--type-k", "int8"], "--cache-type-k='int8'"),
    (["chat", "--model", "m", "--sinks", "4"], "set --swa"),
    (["generate", "--model", "m", "--prompt", ""], "the prompt is empty"),
    (["generate", "--model", "m", "--prompt", " \n"], "the prompt is empty"),
    (["generate", "--model", "m", "--prompt-file", "no/file"], "No such file"),
    (["generate", "--model", "m", "--prompt", "a", "--prompt-file", "b"], "Give one"),
    (["generate", "--model", "m", "--prompt", "a", "--swa", "0"], "at least 1, got '0'"),
    (["generate", "--model", "m", "--prompt", "a", "--sinks", "4"], "set --swa"),
    (
        ["generate", "--model", "m", "--prompt", "a", "-ctk", "q8_0"],
        "int8, int4, fp8, got 'q8_0'.",
    ),
    (["generate", "--model", "m", "--prompt", "a", "-ctk", "int8"], "--cache-type-k='int8'"),
    (
        ["generate", "--model", "m", "--prompt", "a", "--flash-attn", "yes"],
        "expected one of auto",
    ),
    (["generate", "--model", "m", "--prompt", "a", "--kv-budget", "x"], "tokens (512) or a share"),
    (["generate", "--model", "m", "--prompt", "a", "--kv-budget", "8"], "--kv-policy and --kv-bud"),
    (["generate", "--model", "m", "--prompt", "a", "--rope-scale", "0.5"], "at least 1, got 0.5"),
    (["generate", "--model", "m", "--prompt", "a", "--rope-freq-base", "nan"], "expected a number"),
    (["generate", "--model", "m", "--prompt", "a", "--top-p", "2"], "top_p"),
    (["generate", "--model", "m", "--prompt", "a", "--temperature", "-1"], "temperature"),
    (["doctor", "--jsno"], "Did you mean --json?"),
]


@pytest.mark.parametrize(
    ("words", "said"), BAD_LINES, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_bad_command_lines(capsys, fake, words, said):
    code, out, err = call(capsys, *words)
    assert code == 2 and out == ""
    assert said in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("saccade")
    assert not fake.calls  # nothing long was begun


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UsageError("words"), "words"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--ctx-size"),
        (FileNotFoundError(2, "No such file or directory", "a.gguf"), "a.gguf: No such file"),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), 'pip install ".[hf,report]"'),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "PyTorch is not installed"),
        (BadInput("one\n  sentence"), "one sentence"),
        (TypeError("from the depths"), "--traceback"),
    ],
)
def test_errors_of_a_command(capsys, fake, error, said):
    fake.error = error
    code, _, err = call(capsys, "compare")
    assert code == 2 and said in err and "Traceback" not in err


def test_our_own_sentences_come_without_advice_to_debug():
    from saccade.core import Mask

    with pytest.raises(ValueError) as caught:
        Mask(window=0)
    said = failure.sentence(caught.value)
    assert said.startswith("window must be at least 1") and "--traceback" not in said


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyError("bug"), ImportError("bug")])
def test_bugs_keep_their_traceback(fake, error):
    fake.error = error
    with pytest.raises(type(error)):
        main.main(["compare"])


def test_traceback_can_be_asked_for(fake):
    fake.error = Unsupported("no")
    with pytest.raises(Unsupported):
        main.main(["compare", "--traceback"])


def test_ctrl_c_before_anything_is_finished(capsys, fake):
    fake.error = KeyboardInterrupt()
    code, _, err = call(capsys, "compare")
    assert code == 130 and err.strip().endswith("Stopped.") and "Traceback" not in err


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(capsys, words):
    code, out, _ = call(capsys, *words)
    assert code == 0 and all(f"\n  {name} " in out for name in COMMANDS if " " not in name)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples(capsys, command):
    code, out, _ = call(capsys, *command.split(), "--help")
    assert code == 0 and f"saccade {command}" in out
    assert command == "bench" or "examples:" in out
    assert call(capsys, *command.split(), "-h")[1] == out
    assert max(map(len, out.splitlines())) <= 80


def test_several_words_of_an_option():
    words = ["bench", "tune", "--kernels", "forward", "decode", "--quick", "--dims", "64", "128"]
    for spelling in (
        words,
        ["bench", "tune", "--kernels=forward,decode", "--quick", "--dims", "64,128"],
    ):
        values = main.parse(spelling).params
        assert values["kernels"] == ["forward", "decode"] and values["dims"] == [64, 128]
        assert values["quick"]


def test_version(capsys):
    import saccade

    assert call(capsys, "--version")[1] == f"saccade {saccade.__version__}\n"


def _python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_help_and_typos_are_answered_without_torch():
    code = (
        "import sys; from saccade.cli.main import main;"
        "main([]); main(['compre']); main(['generate', '--modle']); main(['bench', 'tune', '-h']);"
        "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = _python(code)
    assert done.returncode == 0 and done.stderr.strip().endswith("set()")


def test_the_reader_of_the_output_is_gone():
    """The reading end of the pipe is closed before the first word."""
    code = (
        "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1);"
        "from saccade.cli.main import main; sys.exit(main([]))"
    )
    done = _python(code)
    assert done.returncode == 141 and done.stderr == ""
