"""ContextParams: options of a running model, with the names of llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from saccade.compress import POLICIES, Budget
from saccade.ops.attention.dispatch import BACKENDS
from saccade.sparse import Kascade, Pattern
from saccade.sparse.pattern import decodes_densely
from saccade.units import Bytes

FLASH_ATTN = ("auto", "enabled", "disabled")
CACHE_TYPES = ("f32", "bf16", "f16", "int8", "int4", "fp8")
QUANTIZED = ("int8", "int4", "fp8")
ROPE_SCALING_TYPES = ("none", "linear", "ntk", "dynamic", "yarn")
MOST_DRAFTED: Final = 8
"""Tokens that are drafted at once: a step of the C++ layers verifies them with the one before."""
_LARGEST: Final = 2**48
"""Above every number that makes sense; tensors could not even name sizes far beyond."""
_WHOLE_NUMBERS: Final = {
    "n_ctx": 1,
    "n_batch": 1,
    "n_swa": 1,
    "page_size": 1,
    "yarn_orig_ctx": 1,
    "n_sinks": 0,
    "ctx_checkpoints": 0,
    "n_keep": 0,
    "kv_every": 1,
    "n_draft": 1,
}
"""Whole numbers and the least each may be."""
_NEVER_NONE: Final = ("n_batch", "n_sinks", "ctx_checkpoints")
_NO_DRAFTS: Final = {
    "n_swa": "whose rings overwrite keys that rejected drafts would need back",
    "kv_policy": "which removes keys that the dense model would read",
    "type_k": "whose groups would be quantized at other tokens than without drafts",
}
_NUMBERS: Final = (
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextParams:
    """Options of a running model; None always means "as the model is configured".

    Args:
        n_ctx: largest number of tokens in context; None: the length the model was trained for.
        n_batch: most tokens that are read at once (chunked prefill).
        flash_attn: "enabled": O(N) memory or an error; "disabled": materialized scores, the
            standard attention of textbooks; "auto": the fastest backend that supports each call.
        type_k, type_v: storage of cached keys and values: f32, bf16, f16, int8, int4 or fp8 (e4m3);
            None: the dtype of the model.  Quantized types need both to be quantized, fp8 both fp8.
        rope_scaling_type: none, linear, ntk, dynamic or yarn; None: as the model was configured.
            dynamic reads the whole context again for every token past the trained length.
        rope_freq_base: base of the rotary frequencies.
        rope_freq_scale: 1 / factor; None: the factor is max(1, n_ctx / yarn_orig_ctx).  Without
            rope_scaling_type: of linear scaling, or of the rule that the model has of its own.
        yarn_ext_factor: 1 mixes in unscaled high frequencies (YaRN), 0 interpolates them all.
        yarn_attn_factor: magnitude of the rotary tables; None: 0.1 ln(factor) + 1.
        yarn_beta_fast, yarn_beta_slow: rotations that bound the ramp (default 32 and 1).
        yarn_orig_ctx: length the model was trained for before scaling.
        n_swa: sliding window, the number of last keys a token attends to, itself counted.
        n_sinks: first tokens that stay visible outside the window, in layers that are full
            attention in the model.
        ctx_checkpoints: positions that sliding layers can roll back to, for prompts with a common
            prefix (`Context.reuse`): one after every chunk of a prompt, the most redundant freed.
        n_keep: first tokens kept by the context shift of a full context during generation; None:
            a full context ends the generation.
        page_size: tokens of a page, which sequences and beams share (paged cache); None: one
            buffer a layer.  Sliding layers have rings either way.
        offload_kqv: keep caches on the device that computes; False keeps them in host memory and
            prefetches each layer's keys during the layer before.  Without effect on a CPU.
        sparse: a Pattern that selects blocks of keys for each call (saccade.sparse).
        n_draft: most tokens, up to 8, that are drafted under `sparse` before the model reads all
            keys for them at once and keeps those that it chooses itself (MagicDec, 2408.11049;
            TriForce, 2404.11912).  Everything but drafts is dense then.
        kv_policy: name of a policy that compresses the cache after the prompt, one of
            `saccade.compress.POLICIES` ("snapkv", "kvzip", "expected_attention", "h2o", ...).
        kv_budget: tokens a compressed cache keeps (int), the share of what was read (float), or
            what the caches of all layers may take behind a compression (`saccade.Bytes("2GiB")`).
        kv_every: compress again whenever so many keys more than the budget are stored, at the ends
            of chunks of a prompt and while decoding, so that memory stays at budget + kv_every +
            n_batch; None: once, behind each prompt.
        backend: a backend of `saccade.attention` by name; overrides flash_attn.
        fused_layers: replace norms, linear layers, MLPs and decoder layers of known transformers
            classes by fused kernels, and apply RoPE while keys are stored; None: on for a Context
            on a GPU, off for `attach` there; on a CPU, steps of up to nine rows by C++ layers
            (`hf.fused_decoder`), which leave the layers of the model alone; False: neither.

    Raises:
        ValueError: an option with a value that is not listed above.
    """

    n_ctx: int | None = None
    n_batch: int = 512
    flash_attn: str = "auto"
    type_k: str | None = None
    type_v: str | None = None
    rope_scaling_type: str | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    yarn_orig_ctx: int | None = None
    n_swa: int | None = None
    n_sinks: int = 0
    ctx_checkpoints: int = 0
    n_keep: int | None = None
    page_size: int | None = None
    offload_kqv: bool = True
    sparse: Pattern | None = field(default=None)
    n_draft: int | None = None
    kv_policy: str | None = None
    kv_budget: Budget | None = None
    kv_every: int | None = None
    backend: str | None = None
    fused_layers: bool | None = None

    def __post_init__(self) -> None:
        _one_of("flash_attn", self.flash_attn, FLASH_ATTN)
        _one_of("type_k", self.type_k, (*CACHE_TYPES, None))
        _one_of("type_v", self.type_v, (*CACHE_TYPES, None))
        _one_of("rope_scaling_type", self.rope_scaling_type, (*ROPE_SCALING_TYPES, None))
        _one_of("kv_policy", self.kv_policy, (*POLICIES, None))
        _one_of("backend", self.backend, (*BACKENDS, None))
        _one_of("offload_kqv", self.offload_kqv, (True, False))
        _one_of("fused_layers", self.fused_layers, (True, False, None))
        for name, least in _WHOLE_NUMBERS.items():
            _whole_number(name, getattr(self, name), least)
        for name in _NUMBERS:
            _number(name, getattr(self, name))
        self._check_pattern()
        self._check_rope()
        self._check_storage()
        self._check_policy()
        self._check_draft()
        if self.n_sinks and self.n_swa is None:
            raise ValueError(f"n_sinks={self.n_sinks} needs a window: set n_swa.")

    def _check_pattern(self) -> None:
        select: object = getattr(self.sparse, "select", None)
        if self.sparse is not None and (isinstance(self.sparse, type) or not callable(select)):
            raise ValueError(
                f"sparse must be a pattern with its sizes, such as saccade.sparse.Strided(...), "
                f"got {self.sparse!r}. Make one, or leave sparse unset."
            )
        if isinstance(self.sparse, Kascade) and self.sparse.plan and self.kv_policy is not None:
            raise ValueError(
                "sparse=Kascade(plan=...) reads the blocks of one layer in others, but under "
                "kv_policy each layer keeps other tokens. Leave one of the two out."
            )

    @property
    def attends_by(self) -> Pattern | None:
        """The pattern of everything but drafts; None for all keys."""
        return None if self.n_draft is not None else self.sparse

    def of_drafts(self) -> ContextParams:
        """The options that drafts are computed under."""
        return replace(self, n_draft=None)

    def _check_draft(self) -> None:
        if self.n_draft is None:
            return
        if self.n_draft > MOST_DRAFTED:
            raise ValueError(f"n_draft must be at most {MOST_DRAFTED}, got {self.n_draft}.")
        if decodes_densely(self.sparse):
            raise ValueError(
                f"n_draft={self.n_draft} drafts by a pattern that reads few keys while decoding, "
                f"got sparse={self.sparse!r}. Set one, such as saccade.sparse.BlockTopK()."
            )
        for name, why in _NO_DRAFTS.items():
            value = getattr(self, name)
            if value is not None and (name != "type_k" or value in QUANTIZED):
                raise ValueError(
                    f"n_draft={self.n_draft} does not go with {name}={value!r}, {why}. Leave one "
                    "of them out."
                )

    def _check_rope(self) -> None:
        if self.rope_freq_scale is not None and not 0 < self.rope_freq_scale <= 1:
            raise ValueError(
                f"rope_freq_scale is 1 / factor, in (0, 1], got {self.rope_freq_scale}."
            )
        if self.rope_scaling_type == "none" and self.rope_freq_scale not in (None, 1):
            raise ValueError(
                f"rope_freq_scale={self.rope_freq_scale:g} stretches positions, and "
                "rope_scaling_type='none' leaves them as they are. Leave one of them out."
            )
        for name in ("rope_freq_base", "yarn_attn_factor"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}. Leave it unset.")

    def _check_policy(self) -> None:
        if (self.kv_policy is None) != (self.kv_budget is None):
            raise ValueError(
                "kv_policy and kv_budget go together, a policy and how much it may keep: got "
                f"kv_policy={self.kv_policy!r} and kv_budget={self.kv_budget!r}. Give both."
            )
        if isinstance(self.kv_budget, float):
            if not 0 < self.kv_budget <= 1:
                raise ValueError(f"kv_budget as a share must be in (0, 1], got {self.kv_budget}.")
        elif isinstance(self.kv_budget, str):
            raise ValueError(
                f"kv_budget must be a number of keys, a share of them or saccade.Bytes, got "
                f"{self.kv_budget!r:.40}. Write 512, 0.25 or saccade.Bytes('512MiB')."
            )
        elif not isinstance(self.kv_budget, Bytes):
            _whole_number("kv_budget", self.kv_budget, 1)
        if self.kv_every is not None and self.kv_policy is None:
            raise ValueError(
                f"kv_every={self.kv_every} needs a policy: set kv_policy and kv_budget too."
            )
        if self.kv_policy is None:
            return
        if self.kv_every is not None and POLICIES[self.kv_policy]().observes.rereading is not None:
            raise ValueError(
                f"kv_policy={self.kv_policy!r} reads the whole prompt again, of which kv_every="
                f"{self.kv_every} keeps a part. Leave kv_every unset, or choose another kv_policy, "
                "such as 'h2o'."
            )
        if self.n_keep is None:
            return
        if POLICIES[self.kv_policy]().floor is None:
            raise ValueError(
                f"kv_policy={self.kv_policy!r} with n_keep={self.n_keep}: a compressed cache "
                "cannot be shifted, because its positions have gaps. Use "
                "kv_policy='ada_snapkv', which stores positions, or leave n_keep unset."
            )

    def _check_storage(self) -> None:
        quantized = [t for t in (self.type_k, self.type_v) if t in QUANTIZED]
        if len(quantized) == 1 or quantized.count("fp8") == 1:
            raise ValueError(
                f"type_k={self.type_k!r} with type_v={self.type_v!r}: quantized caches store both "
                "keys and values as int8 or int4, or both as fp8. Set both."
            )
        if not quantized and self.type_k != self.type_v:
            raise ValueError(f"type_k={self.type_k!r} and type_v={self.type_v!r} must be equal.")
        if quantized and self.kv_policy and POLICIES[self.kv_policy]().floor is not None:
            raise ValueError(
                f"kv_policy={self.kv_policy!r} lets heads keep different numbers of keys, which a "
                "quantized cache cannot hold. Choose one that keeps equally many, such as "
                "'snapkv', or leave type_k and type_v unset."
            )
        stored = ("type_k", "type_v") if quantized else ()
        if not self.offload_kqv:
            what = "offload_kqv=False keeps plain keys in host memory"
            self._check_alone(what, *stored, "page_size", "kv_policy")
        if self.page_size is not None:
            what = f"page_size={self.page_size} needs plain keys of all tokens"
            self._check_alone(what, *stored, "n_swa", "kv_policy")

    def _check_alone(self, what: str, *others: str) -> None:
        """Raise ValueError where one of these options is set beside `what`."""
        for name in others:
            value = getattr(self, name)
            if value is not None:
                raise ValueError(f"{what}, which {name}={value!r} does not: leave one of them out.")


def _one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    # Types too: 1 is no bool, although it equals True.
    if not any(type(value) is type(each) and value == each for each in known):
        listed = ", ".join(str(each) for each in known if each is not None)
        raise ValueError(f"unknown {name} {value!r}; expected one of {listed}.")


def _whole_number(name: str, value: object, least: int) -> None:
    if value is None and name not in _NEVER_NONE:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"{name} must be a whole number, got {value!r}. Give an int of at least {least}."
        )
    if not least <= value <= _LARGEST:
        bound = f"at least {least}" if value < least else f"at most {_LARGEST}"
        raise ValueError(f"{name} must be {bound}, got {str(value)[:40]}.")


def _number(name: str, value: float | None) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if value is not None and (wrong or not -_LARGEST < value < _LARGEST):
        raise ValueError(
            f"{name} must be a finite number of a size below {_LARGEST:.2g}, got {value!r:.40}."
        )
