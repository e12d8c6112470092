"""Importing the package has no effects and loads no optional dependency."""

import subprocess
import sys

HEAVY = ("triton", "transformers", "matplotlib", "rich", "gguf", "accelerate", "jinja2")


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_heavy():
    assert loaded_after("import saccade") == set()


def test_the_operator_loads_nothing_heavy():
    # torch itself may bring triton where it is installed, so ask what we add to plain torch.
    plain = loaded_after("import torch; import torch.nn.functional")
    assert loaded_after("import saccade; saccade.attention; saccade.Mask") <= plain


def test_this_test_can_fail():
    assert loaded_after("import rich") == {"rich"}


def test_public_names_resolve():
    import saccade

    for name in saccade.__all__:
        assert getattr(saccade, name) is not None


def test_unknown_name():
    import saccade

    try:
        saccade.no_such_name  # noqa: B018
    except AttributeError as error:
        assert "no_such_name" in str(error)
    else:
        raise AssertionError
