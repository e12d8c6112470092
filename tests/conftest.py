"""What all tests share."""

import os

import pytest
import torch
from hypothesis import settings

from tests.support.random_inputs import SEED

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each take every core spend their time waiting for one another.
    torch.set_num_threads(1)

# The same examples in every run: a failure in CI can be repeated anywhere.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton's kernels are then interpreted on the CPU and tested there.
    from tests.support.bounds import checked_bounds
    from tests.support.interpreted import patch_interpreter

    patch_interpreter()

    @pytest.fixture(autouse=True)
    def _kernels_stay_inside_their_tensors(monkeypatch):
        """Every address of every interpreted kernel belongs to a tensor of its launch."""
        with checked_bounds(monkeypatch):
            yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory):
    """Nothing is written to, or read from, the cache folder of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run():
    torch.manual_seed(SEED)
