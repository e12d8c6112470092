"""Tiny models made once a session, and inputs with padding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import saccade.hf  # noqa: F401  (registers the attention implementation)
from tests.tiny_models import CONFIGS, tiny_config, tiny_model

transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on several threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FAMILIES = tuple(CONFIGS)
OWN_CACHE_FAMILIES = tuple(name for name in FAMILIES if name != "deepseek_v3")


@cache
def _model(name: str, implementation: str) -> PreTrainedModel:
    return tiny_model(tiny_config(name), implementation)


class Pair:
    """One set of weights twice: on transformers' eager attention and on ours."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.eager = _model(name, "eager")
        self.ours = _model(name, "saccade")


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Every family."""
    return Pair(request.param)


@pytest.fixture(params=OWN_CACHE_FAMILIES)
def cache_pair(request: pytest.FixtureRequest) -> Pair:
    """Every family that can run on our caches."""
    return Pair(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A llama of its own on eager attention, for tests that change it."""
    return tiny_model(tiny_config("llama"))


@pytest.fixture
def ids() -> Tensor:
    """Two rows of 24 tokens."""
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def padded(ids: Tensor) -> Tensor:
    """Attention mask of `ids` with five pads on the left of row 0."""
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return mask
