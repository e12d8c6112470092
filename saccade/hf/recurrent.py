"""Recurrent and convolution layers of transformers' caches, with states that can be copied.

The models update these states by transformers' own code; only reading, replacing and forgetting
all of them at once is added, which checkpoints, sessions and `reset` need.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer


class RecurrentLayer(LinearAttentionLayer):
    """The states of one layer.

    Args:
        number_of_states: how many states of each kind the layer keeps.
    """

    is_croppable = False  # type: ignore[assignment]

    def __init__(self, number_of_states: int = 1, **_: Any) -> None:
        super().__init__(number_of_states=number_of_states)

    def read(self) -> dict[str, Tensor]:
        """`conv.0`, `recurrent.0`, `conv.1` ...: what is stored, without copies."""
        found: dict[str, Tensor] = {}
        for index, known in self.has_previous_state.items():
            parts = {"conv": self.conv_states, "recurrent": self.recurrent_states}
            for name, states in parts.items():
                state = states[index]
                if known and state is not None:
                    found[f"{name}.{index}"] = state
        return found

    def write(self, states: Mapping[str, Tensor]) -> None:
        """Replace all states by these tensors, which belong to the layer from now on."""
        for index in self.has_previous_state:
            conv, recurrent = states.get(f"conv.{index}"), states.get(f"recurrent.{index}")
            self.conv_states[index], self.recurrent_states[index] = conv, recurrent
            self.is_conv_states_initialized[index] = conv is not None
            self.is_recurrent_states_initialized[index] = recurrent is not None
            self.has_previous_state[index] = conv is not None or recurrent is not None
            if conv is not None:
                self.conv_kernel_size[index] = conv.shape[-1]
                self.device, self.dtype = conv.device, conv.dtype

    def reset(self) -> None:
        """Forget everything."""
        self.write({})

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row beam_idx[i]."""
        self.write(
            {name: x.index_select(0, beam_idx.to(x.device)) for name, x in self.read().items()}
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        self.write({name: x.repeat_interleave(repeats, dim=0) for name, x in self.read().items()})

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows (indices, or one bool per row)."""
        self.write({name: x[indices.to(x.device)] for name, x in self.read().items()})
