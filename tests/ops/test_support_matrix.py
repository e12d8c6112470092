"""The support matrix (tests/support/matrix.py) is what the backends do: each cell is tested.

Supported cells equal the reference; all others raise Unsupported with the reason.  Without a GPU
only `refusal` of GPU backends is tested, with their check of the device patched.
"""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch

from saccade.core import Unsupported
from saccade.ops import attend
from saccade.ops.attention import dispatch
from saccade.ops.attention.api import make_call
from tests.support import matrix
from tests.support.gpu import pretend_hopper
from tests.support.tolerance import ALLOWANCE, largest_error

DOCS = Path(__file__).parents[2] / "docs" / "support.md"
HERE = ("reference", "tiled", "cpu", "sdpa")
RUN = [c for c in matrix.cells() if c.backend in HERE and c.row != "cuda_tensors"]
ASKED = [c for c in matrix.cells() if c not in RUN]


def solve(cell, backend):
    """(output, lse or None, gradients) of a cell by a backend, with the same inputs each time."""
    torch.manual_seed(1)
    given = matrix.call_of(cell)
    result = attend(make_call(given.q, given.kv, **given.options), backend=backend)
    grads = []
    if cell.kind == "G":
        torch.manual_seed(2)
        loss = (result.out * torch.randn_like(result.out)).sum()
        if cell.row == "lse":
            loss = loss + (result.lse * torch.randn_like(result.lse)).sum()
        grads = torch.autograd.grad(loss, given.leaves)
    return result.out, result.lse if cell.row == "lse" else None, grads


@pytest.mark.parametrize("cell", RUN, ids=str)
def test_runs_and_equals_the_reference_or_refuses(cell):
    if not cell.supported:
        with pytest.raises(Unsupported, match="cannot run this call: "):
            solve(cell, cell.backend)
        return
    out, lse, grads = solve(cell, cell.backend)
    true_out, true_lse, true_grads = solve(cell, "reference")
    near = 1e-5 if out.dtype.itemsize > 2 else 2 * ALLOWANCE[out.dtype]
    assert out.dtype == true_out.dtype and largest_error(out, true_out) <= near
    if lse is not None:
        assert largest_error(lse, true_lse) <= 1e-4
    for found, true in zip(grads, true_grads, strict=True):
        assert largest_error(found, true) <= 2 * near * max(1.0, float(true.abs().max()))


@pytest.mark.parametrize("cell", ASKED, ids=str)
def test_takes_or_refuses(cell, monkeypatch):
    given = matrix.call_of(cell)
    call = make_call(given.q, given.kv, **given.options)
    if cell.row != "cpu_tensors":
        pretend_hopper(monkeypatch)
    backend = dispatch.load(cell.backend.removesuffix("_cuda"))
    if cell.backend == "sdpa_cuda":
        call = on_cuda(call)
    reason = backend.refusal(call)
    assert (reason is None) == cell.supported, reason
    assert reason is None or len(reason) > 10


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)


def on_cuda(x):
    """A call, view or tensor, all tensors of which say that they are on a GPU."""
    if isinstance(x, torch.Tensor):
        return x.detach().as_subclass(OnCuda).requires_grad_(x.requires_grad)
    if isinstance(x, tuple):
        parts = [on_cuda(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if not is_dataclass(x):
        return x
    given = [part.name for part in fields(x) if part.init]
    return type(x)(**{name: on_cuda(getattr(x, name)) for name in given})


def test_the_matrix_is_about_every_backend():
    assert set(matrix.COLUMNS) == {*dispatch.BACKENDS, "sdpa_cuda"}
    assert set(matrix.MEANING) | set(matrix.DTYPES) == set(matrix.ROWS)


def test_the_documentation_shows_the_matrix():
    assert DOCS.read_text() == matrix.markdown(), (
        "docs/support.md is out of date; write it with `python -m tests.support.matrix > "
        "docs/support.md`"
    )
