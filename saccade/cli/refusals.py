"""Options that no model needs to be loaded for to be refused: loading takes seconds and more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.cli.failure import UsageError
from saccade.cli.loading import check_placement
from saccade.cli.shared_options import Values, in_words_of_options

if TYPE_CHECKING:
    import torch

    from saccade.runtime import ContextParams


def check_before_loading(
    model: tuple[str, str, str, str],
    params: ContextParams,
    typed: Values,
    *,
    longest: int | None,
) -> None:
    """Raise UsageError for what these options cannot be on this machine and for this model.

    Args:
        model: values of --model, --device, --dtype and --weights.
        typed: values of CONTEXT.
        longest: tokens that the text can have; None: not known.
    """
    device = check_placement(*model)
    if params.backend is not None:
        _check_backend(params.backend, device)
    with in_words_of_options(typed):
        _check_positions(model[0], params, longest)


def _check_backend(name: str, device: torch.device) -> None:
    """Raise UsageError for a backend that can run no call here, whatever its shapes."""
    import torch

    from saccade.ops import explain

    said: list[str] = []
    for dtype in (torch.float32, torch.bfloat16):
        for queries in (1, 64):
            q = torch.zeros(1, 2, queries, 64, device=device, dtype=dtype)
            k = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype)
            said.append(dict(explain(q, k, k))[name])
    if all(each.startswith("cannot") for each in said):
        raise UsageError(
            f"--backend {name} cannot run here: {said[-1].removeprefix('cannot: ')}. Leave it out: "
            "the fastest that can is chosen (`saccade doctor` lists them)."
        )


def _check_positions(name: str, params: ContextParams, longest: int | None) -> None:
    """Raise ValueError for scaling that the files of the model alone show to be impossible."""
    import torch

    from saccade.runtime.located import NAMES, located
    from saccade.runtime.plan_files import blueprint_of
    from saccade.runtime.rope_options import asks_for_rope, rule_under

    if not asks_for_rope(params):
        return
    path = located(name) if name in NAMES else Path(name).expanduser()
    found = blueprint_of(path, None, torch.float32)
    if found is None or found.facts.positions.rule is None:
        return  # it takes transformers to know
    trained = found.facts.n_ctx_train
    if params.n_ctx is None and (longest is None or longest > trained):
        params = replace(params, n_ctx=trained + 1)  # as a text of that length will set it
    rule_under(found.facts.positions.rule, params, trained)
