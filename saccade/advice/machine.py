"""Machine: where a plan is to run, its memory, and how fast it is.

A CPU is measured on random matrices of the model's shapes, a GPU by its roofline.  Both are
measured once and remembered under the names of processor and PyTorch; a GPU that is not here is
taken from a record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeVar

import torch

from saccade.advice import store
from saccade.advice.calls import Calls, recorded
from saccade.advice.costs import AttentionCosts, Costs, measured_attention, measured_costs
from saccade.advice.gpu_speed import RECORDED, Roofline, gpu_speed, measured_roofline
from saccade.advice.speed import Speed, speed_of
from saccade.core import BadInput
from saccade.core.hardware import available_memory
from saccade.report.environment import cpu_name
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.plan_blueprint import Blueprint
from saccade.units import as_bytes

DEVICES: Final = ("auto", "cpu", "cuda")
CUDA_ITSELF: Final = 512 * 2**20
"""Bytes of a GPU that PyTorch's allocator never sees: the context and loaded kernels."""
_AGREE: Final = 0.2
"""Two measurements that differ by more were disturbed by other programs."""
_Costs = TypeVar("_Costs", Costs, AttentionCosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A device.

    Attributes:
        kind: "cpu" or "cuda"; name: what it is called, and where its speed is known from.
        budget: bytes that may be used; said: where that number comes from.
        calls: what Python takes on a CPU.
        busy: what was timed while other programs ran, so that it is rough and not remembered.
    """

    kind: str
    name: str
    budget: int
    said: str
    calls: Calls = field(default_factory=recorded, compare=False)
    busy: list[str] = field(default_factory=list[str], compare=False)

    def speed(self, blueprint: Blueprint, params: ContextParams, tokens: int) -> Speed:
        """Time to the first token and tokens a second."""
        if self.kind == "cuda":
            return gpu_speed(blueprint, params, tokens, _roofline(blueprint.facts.dtype))
        rows = min(params.n_batch, tokens)
        shape = (blueprint.hidden, blueprint.inner, blueprint.facts.head_dim, rows)
        measure = lambda: measured_costs(blueprint, rows)  # noqa: E731
        costs = self._remembered(
            "costs", Costs, measure, *_processor(), blueprint.facts.dtype, shape,
            sorted(f"{form} {n}" for form, n in blueprint.read_in().items()), blueprint.head_in(),
        )  # fmt: skip

        def attention(layer: ModelFacts) -> AttentionCosts:
            heads = (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.windows)
            kept = (params.type_k, params.type_v, params.n_swa, params.n_sinks, params.page_size)
            how = (params.flash_attn, params.backend, params.kv_policy, rows, tokens > rows)
            parts = (*_processor(), layer.dtype, heads, kept, how)
            measure = lambda: measured_attention(layer, params, tokens)  # noqa: E731
            return self._remembered("attention", AttentionCosts, measure, *parts)

        return speed_of(blueprint, params, tokens, costs, attention, self.calls)

    def _remembered(
        self, kind: str, make: type[_Costs], measure: Callable[[], _Costs], *parts: object
    ) -> _Costs:
        """What was measured before under these parts; or now, twice, and kept if both agree."""
        known: Any = store.recall(kind, *parts)
        try:
            return make(**known)
        except TypeError:  # nothing there, or of another version
            first, second = measure(), measure()
        found = first.faster(second)
        pairs = zip(first.sums(), second.sums(), strict=True)
        if all(max(pair) <= (1 + _AGREE) * min(pair) for pair in pairs):
            store.remember(kind, asdict(found), *parts)
        else:
            self.busy.append(kind)
        return found


def machine(wanted: str, memory: int | None) -> Machine:
    """The device that is meant, with its memory unless another number of bytes is given.

    Raises:
        BadInput: not one of DEVICES, or a GPU that is not here and whose memory is not said.
    """
    if wanted not in DEVICES:
        raise BadInput(f"expected one of {', '.join(DEVICES)} as device, got {wanted!r}.")
    here = wanted != "cpu" and torch.cuda.is_available()
    if wanted == "cuda" and not here and memory is None:
        raise BadInput(
            "there is no GPU here whose memory could be asked. Say how much it has, such as "
            "--memory 24GiB, or plan for --device cpu."
        )
    if wanted == "cuda" or here:
        return _gpu(memory, here)
    budget = available_memory() if memory is None else memory
    said = "what is available now" if memory is None else "as asked"
    return Machine(kind="cpu", name=f"{cpu_name()}, {_threads()}", budget=budget, said=said)


def _gpu(memory: int | None, here: bool) -> Machine:
    budget, said = 0, f"as asked, less {as_bytes(CUDA_ITSELF)} for CUDA itself"
    if memory is not None:
        budget = max(0, memory - CUDA_ITSELF)
    if not here:
        recorded = next(iter(RECORDED.values()))
        name = f"a GPU that is not here (times of an {recorded.device})"
        return Machine(kind="cuda", name=name, budget=budget, said=said)
    if memory is None:
        budget, said = torch.cuda.mem_get_info()[0], "what is free on the GPU"
    return Machine(kind="cuda", name=torch.cuda.get_device_name(), budget=budget, said=said)


def _roofline(dtype: torch.dtype) -> Roofline:
    if not torch.cuda.is_available():
        return next(iter(RECORDED.values()))
    parts = (torch.cuda.get_device_name(), torch.__version__, dtype)
    known: Any = store.recall("roofline", *parts)
    try:
        return Roofline(**known)
    except TypeError:  # nothing there, or of another version
        found = measured_roofline(dtype)
        store.remember("roofline", asdict(found), *parts)
        return found


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def _processor() -> tuple[object, ...]:
    return cpu_name(), torch.get_num_threads(), torch.__version__
