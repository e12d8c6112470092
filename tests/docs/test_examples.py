"""Every example runs and prints what it is there to show."""

import ast
import re
import runpy
from functools import cache
from pathlib import Path

import pytest

import saccade

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOWN = {
    "operator": r"changes queries from position 132 on\n(.*\n)*.*cpu +(chosen|supported|cannot)",
    "quantized_generate": r"int8 .* 2\d% of f32, .* by \d\.\de-0[4-9]\nint4 .* 1\d% of f32",
    "saved_prefix": r"217 of \d+ tokens were known: The keeper was called Marta[^$]*built in 1871",
    "shorter_prompt": r"27 tokens: .*bridge over Tam",
    "streaming": r"132 tokens read, ([\d.]+ MiB)(.*\n)* 264 tokens read, \1",
    "yarn": r"unscaled +12 of(.*\n)*linear +0 of(.*\n)*YaRN +0 of 32 +1.00 rad\n.*Paris",
}
"""What each example has to print."""


@pytest.fixture(scope="module")
def _model_is_loaded_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saccade, "load_model", cache(saccade.load_model), raising=False)
        yield


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.real_model
@pytest.mark.parametrize("name", sorted(SHOWN))
@pytest.mark.usefixtures("_model_is_loaded_once")
def test_it_shows_what_it_is_for(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert re.search(SHOWN[name], capsys.readouterr().out)


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_it_is_short_and_says_what_it_shows(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) < 40
    assert ast.get_docstring(ast.parse(text))
