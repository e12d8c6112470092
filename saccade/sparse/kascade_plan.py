"""Which layers of a model choose blocks for which others: what Kascade was calibrated to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from saccade.core import BadInput
from saccade.core.writing import writing_to

FORMAT: Final = "saccade kascade plan 1"


class Reuse(NamedTuple):
    """Where a layer has its blocks from.

    Attributes:
        anchor: the layer that chooses them: an earlier one, or the layer itself.
        heads: for each KV head of the layer the KV head of the anchor whose blocks it reads.
        recall: share of the layer's softmax weights that fell on them in the calibration.
    """

    anchor: int
    heads: tuple[int, ...]
    recall: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class KascadePlan:
    """Anchors and the layers that reuse their blocks, of one model; saved as a JSON file.

    Args:
        model: class of the model.
        weights: fingerprint of its norms, see `saccade.hf.kascade`.
        layers: of each layer of the model; None: it reads all keys.
        tokens: that were read for the calibration.
        block, top: of the blocks that it measured.

    Raises:
        BadInput: layers that have their blocks from no anchor before them.
    """

    model: str
    weights: str
    layers: tuple[Reuse | None, ...]
    tokens: int
    block: int
    top: int

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            if layer is None:
                continue
            anchor = self.layers[layer.anchor] if 0 <= layer.anchor <= index else None
            chooses = anchor is not None and anchor.anchor == layer.anchor
            heads = range(len(anchor.heads) if anchor is not None and chooses else 0)
            if not all(head in heads for head in layer.heads):
                raise BadInput(
                    f"layer {index} of the plan has its blocks from heads {list(layer.heads)} of "
                    f"layer {layer.anchor}, expected heads of a layer up to its own that chooses "
                    "for itself. Calibrate anew."
                )
        if not self.anchors:
            raise BadInput("the plan has no layer that chooses blocks. Calibrate anew.")

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.as_json().encode()).hexdigest()[:12]
        anchors = ", ".join(map(str, self.anchors))
        return f"KascadePlan({self.model}, anchors {anchors} of {len(self.layers)}, {digest})"

    @property
    def anchors(self) -> tuple[int, ...]:
        """Layers that choose."""
        pairs = enumerate(self.layers)
        return tuple(i for i, layer in pairs if layer is not None and layer.anchor == i)

    @property
    def recall(self) -> float:
        """Mean share of the softmax weights that layers with blocks keep."""
        found = [layer.recall for layer in self.layers if layer is not None]
        return sum(found) / len(found)

    def as_json(self) -> str:
        """The text of its file."""
        values = asdict(self)
        values["layers"] = [layer and layer._asdict() for layer in self.layers]
        rows = ",\n    ".join(json.dumps(layer) for layer in values.pop("layers"))
        head = json.dumps({"format": FORMAT, **values}, indent=2).removesuffix("\n}")
        return f'{head},\n  "layers": [\n    {rows}\n  ]\n}}\n'

    def save(self, path: str | Path) -> None:
        """Write the plan to a file.

        Raises:
            OSError: the file cannot be written.
        """
        with writing_to(Path(path)):
            Path(path).write_text(self.as_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> KascadePlan:
        """A plan that was saved.

        Raises:
            OSError: the file cannot be read.
            BadInput: it holds no plan.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(found, dict) or cast(Any, found).get("format") != FORMAT:
                raise BadInput(f"{path} is no plan of Kascade, expected {FORMAT!r} as its format.")
            return _read(cast("dict[str, Any]", found))
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise BadInput(
                f"{path} holds no whole plan of Kascade ({type(error).__name__}: {error}). "
                "Calibrate anew."
            ) from error


def _read(found: dict[str, Any]) -> KascadePlan:
    layers = [None if layer is None else _layer(layer) for layer in found["layers"]]
    return KascadePlan(
        model=_text(found["model"]), weights=_text(found["weights"]), layers=tuple(layers),
        tokens=_number(found["tokens"]), block=_number(found["block"]), top=_number(found["top"]),
    )  # fmt: skip


def _layer(found: dict[str, Any]) -> Reuse:
    heads, recall = tuple(_number(head) for head in found["heads"]), found["recall"]
    if not heads or isinstance(recall, bool) or not isinstance(recall, int | float):
        raise TypeError(f"heads and recall of a layer are {found['heads']} and {recall!r}")
    return Reuse(_number(found["anchor"]), heads, float(recall))


def _number(x: object) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"expected a whole number, got {x!r}")
    return x


def _text(x: object) -> str:
    if not isinstance(x, str):
        raise TypeError(f"expected a text, got {x!r}")
    return x
