"""Importing the package has no effects and loads no optional dependency."""

import subprocess
import sys

from tests.architecture.source import ROOT

HEAVY = ("triton", "transformers", "matplotlib", "rich", "gguf", "accelerate", "jinja2")
HEAVY += ("fa3_fwd_interface", "flash_attn_interface", "flash_attn", "flashinfer")


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_heavy():
    assert loaded_after("import saccade") == set()


def test_the_operator_loads_nothing_heavy():
    # torch itself may bring triton where it is installed, so compare with plain torch.
    plain = loaded_after("import torch; import torch.nn.functional")
    assert loaded_after("import saccade; saccade.attention; saccade.Mask") <= plain


def test_this_test_can_fail():
    assert loaded_after("import rich") == {"rich"}


def test_importing_the_package_does_not_load_torch():
    code = "import sys, saccade; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_version_is_that_of_the_project():
    import tomllib

    import saccade

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert saccade.__version__ == project["version"]


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
