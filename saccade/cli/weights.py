"""What the weights of a model would take in each form, and how far that moves its outputs."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.cli.advice import weights_said
from saccade.cli.failure import UsageError
from saccade.cli.shared_options import WEIGHTS
from saccade.units import as_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FormOfWeights:
    """The weights of a model in one form.

    Attributes:
        option: of `--weights`; kinds: what they are then, in words.
        bytes: in memory; dtype: of activations.
        kl: divergence from float32 weights of the same file in nats a token; None without a record.
        evidence: what it was measured on, a sentence.
    """

    option: str
    kinds: str
    bytes: int
    dtype: str
    kl: float | None
    evidence: str


def forms(model: str) -> list[FormOfWeights]:
    """Every form that `--weights` can ask for; the first is the default.

    Raises:
        UsageError: no model, or one whose sizes are not known before it is loaded.
    """
    from saccade.advice.evidence import evidence_for_weights
    from saccade.advice.machine import machine
    from saccade.advice.recommend import quality_of_weights
    from saccade.cli.plan import blueprint
    from saccade.core import BadInput, Unsupported

    found: list[FormOfWeights] = []
    try:
        for option in WEIGHTS:
            sizes = blueprint(model, None, option, machine("auto", None).kind)
            name = option if option in ("f32", "bf16") else sizes.held
            known = evidence_for_weights(name)
            found.append(FormOfWeights(
                option=option, kinds=weights_said(sizes), bytes=sizes.weights_bytes,
                dtype=str(sizes.facts.dtype).removeprefix("torch."),
                kl=None if known is None else known.kl, evidence=quality_of_weights(name),
            ))  # fmt: skip
    except (BadInput, Unsupported) as error:
        raise UsageError(str(error)) from error
    return found


def table(found: list[FormOfWeights]) -> str:
    """A line for each form."""
    width = max(len(form.kinds) for form in found)
    return "\n".join(
        f"  --weights {form.option:5} {as_bytes(form.bytes):>9}  {form.kinds:{width}}  "
        f"{form.evidence}"
        for form in found
    )
