"""Options that several commands have: ContextParams and sampling, in the spelling of llama.cpp.

One table each: adding a field of ContextParams is one line here, and a test finds what is missing.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saccade.cli.failure import UsageError, raised_by_us
from saccade.cli.values import budget, file_name, number, one_of, switch, utf8_text, whole_number

if TYPE_CHECKING:
    from saccade.runtime import Sampler
    from saccade.runtime.params import ContextParams
    from saccade.sparse import Pattern

MODEL_HELP = "a .gguf file, a folder saved by transformers, or a name (smollm2)"
Model = Annotated[
    str,
    typer.Option("--model", "-m", metavar="PATH|NAME", parser=file_name, help=MODEL_HELP),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda",
        parser=utf8_text,
        help="where it runs (default: a GPU if there is one)",
    ),
]
DTYPES = {"auto": None, "f32": "float32", "bf16": "bfloat16", "f16": "float16"}
DType = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="|".join(DTYPES),
        parser=one_of(*DTYPES),
        help="of what is computed and of plain weights (default: as the folder says; for GGUF "
        "f32, on a GPU bf16)",
    ),
]
WEIGHTS = ("file", "int8", "int4", "bf16", "f32")
WEIGHTS_OPTION: Any = typer.Option(
    "--weights",
    metavar="|".join(WEIGHTS),
    parser=one_of(*WEIGHTS),
    help="how weights lie in memory: as in the file (default), rounded to 8 or 4 bits, plain",
)
Weights = Annotated[str, WEIGHTS_OPTION]
NPredict = Annotated[
    Any,
    typer.Option(
        "--n-predict", "-n", metavar="N", parser=whole_number(1), help="most tokens to write"
    ),
]
Values = dict[str, Any]
"""The values of a table of options by field, None where an option was not given."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        field: the name of its value; flags: its spellings, the one to show in messages first.
        parse: text to value; choices: what the value may be, where it is a word.
        metavar: what help shows in place of a value; None: the choices, or N.
    """

    field: str
    flags: tuple[str, ...]
    help: str
    parse: Callable[[str], Any] = utf8_text
    metavar: str | None = None
    choices: tuple[str, ...] = ()

    def parameter(self) -> inspect.Parameter:
        """What typer reads from a function that has this option."""
        check, metavar = one_of(*self.choices), self.metavar or "|".join(self.choices) or "N"
        parse = (lambda text: check(self.parse(text))) if self.choices else self.parse
        info = typer.Option(*self.flags, parser=parse, metavar=metavar, help=self.help)
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.field, kind, default=None, annotation=Annotated[Any, info])


STORAGE = ("f32", "bf16", "f16", "int8", "int4", "fp8")
CONTEXT = (
    Option("n_ctx", ("--ctx-size", "-c"),
           "most tokens in context (default: what the model was trained for)", whole_number(1)),
    Option("n_batch", ("--batch-size", "-b"),
           "most tokens read in one step (default: 512, on a GPU 2048)", whole_number(1)),
    Option("flash_attn", ("--flash-attn", "-fa"),
           "auto, enabled (or on), disabled (or off: materialized scores)",
           lambda text: {"on": "enabled", "off": "disabled"}.get(text, text),
           choices=("auto", "enabled", "disabled")),
    Option("type_k", ("--cache-type-k", "-ctk", "--type-k"), "storage of keys", choices=STORAGE),
    Option("type_v", ("--cache-type-v", "-ctv", "--type-v"), "storage of values", choices=STORAGE),
    Option("page_size", ("--page-size",),
           "keep keys in pages of N tokens instead of one buffer", whole_number(1)),
    Option("offload_kqv", ("--kv-offload",),
           "off keeps keys in host memory, fetched layer by layer (default: on)", switch, "on|off"),
    Option("rope_scaling_type", ("--rope-scaling",), "how positions are stretched",
           choices=("none", "linear", "ntk", "dynamic", "yarn")),
    Option("rope_scale", ("--rope-scale",), "factor of the stretch", number, "FACTOR"),
    Option("rope_freq_base", ("--rope-freq-base",), "base of the rotary frequencies", number),
    Option("rope_freq_scale", ("--rope-freq-scale",), "1 / factor of the stretch", number),
    Option("yarn_orig_ctx", ("--yarn-orig-ctx",),
           "length the model was trained for before stretching", whole_number(1)),
    Option("yarn_ext_factor", ("--yarn-ext-factor",),
           "1 mixes in unscaled high frequencies, 0 interpolates them all", number),
    Option("yarn_attn_factor", ("--yarn-attn-factor",), "magnitude of the rotary tables", number),
    Option("yarn_beta_fast", ("--yarn-beta-fast",), "upper end of the ramp, in rotations", number),
    Option("yarn_beta_slow", ("--yarn-beta-slow",), "lower end of the ramp, in rotations", number),
    Option("n_keep", ("--keep",),
           "when the context is full, keep the first N tokens and forget half of the rest",
           whole_number(0)),
    Option("n_swa", ("--swa",),
           "window: a token attends to the last N tokens, itself counted", whole_number(1)),
    Option("n_sinks", ("--sinks",),
           "first tokens that stay visible outside the window", whole_number(0)),
    Option("ctx_checkpoints", ("--ctx-checkpoints",),
           "positions that sliding layers can be taken back to (default: 0)", whole_number(0)),
    Option("sparse", ("--sparse",),
           "read only chosen blocks of keys: strided, block_topk, block_topp, quest; for steps "
           "kascade; for prompts triangle_mix, dilated, big_bird, flash_prefill, xattention, "
           "vertical_slash; auto measures what pays",
           metavar="PATTERN",
           choices=("strided", "block_topk", "block_topp", "quest", "kascade", "triangle_mix",
                    "dilated", "big_bird", "flash_prefill", "xattention", "vertical_slash",
                    "auto")),
    Option("sparse_plan", ("--sparse-plan",),
           "what --sparse kascade was calibrated to; generate calibrates it on the prompt where "
           "the file is missing, and writes it", file_name, "FILE"),
    Option("n_draft", ("--draft", "--draft-max"),
           "draft up to N tokens (8 at most) under --sparse, which all else then reads densely; "
           "the dense model verifies them at once: the text is that without drafts",
           whole_number(1, 8)),
    Option("kv_policy", ("--kv-policy",),
           "how the cache is compressed after the prompt: snapkv, kvzip, h2o, expected_attention, "
           "ada_snapkv, tova, ... (docs/compression.md)", metavar="NAME"),
    Option("kv_budget", ("--kv-budget",),
           "what it keeps of the prompt: tokens (512), a share (0.25, 25%) or the bytes of all "
           "caches (512MiB)", budget, "N|SHARE|SIZE"),
    Option("kv_every", ("--kv-every",),
           "compress again whenever N keys more than the budget are stored, while reading and "
           "while generating (default: once, behind the prompt)", whole_number(1)),
    Option("backend", ("--backend",),
           "the attention backend by name, which never falls back", metavar="NAME"),
    Option("fused_layers", ("--fused-layers",),
           "fused norms, linear layers and MLPs (default: on for a GPU, and for decoding on a CPU)",
           switch, "on|off"),
)  # fmt: skip

SAMPLING = (
    Option("temperature", ("--temperature", "--temp"),
           "0 always takes the most likely token (default)", number, "T"),
    Option("top_k", ("--top-k",), "sample among the N most likely tokens (default: 0, all)",
           whole_number(0)),
    Option("top_p", ("--top-p",),
           "sample among the most likely tokens that together reach P (default: 1)", number, "P"),
    Option("seed", ("--seed", "-s"), "the same seed gives the same tokens (default: 0)",
           whole_number(0, 2**64 - 1)),
)  # fmt: skip


def takes(**tables: tuple[Option, ...]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command the options of each table; their values come as its argument of that name."""

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(command)
        def run(**given: Any) -> int:
            values = {
                name: {option.field: given.pop(option.field) for option in table}
                for name, table in tables.items()
            }
            return command(**given, **values)

        signature = inspect.signature(command, eval_str=True)
        own = [p for name, p in signature.parameters.items() if name not in tables]
        shared = [option.parameter() for table in tables.values() for option in table]
        run.__signature__ = signature.replace(parameters=own + shared)  # type: ignore[attr-defined]
        run.__annotations__ = {}  # the signature says everything
        return run

    return decorate


AUTO = "auto"
"""The name under which `saccade generate` chooses a sparse pattern by measuring the prompt."""


def context_params(values: Values) -> ContextParams:
    """The ContextParams of the values of CONTEXT.

    Raises:
        UsageError: options that contradict each other, in the words of the command line.
    """
    from saccade.runtime.params import ContextParams
    from saccade.sparse import PATTERNS, Kascade

    given = {name: value for name, value in values.items() if value is not None}
    if given.get("sparse") == AUTO:
        raise UsageError(
            "--sparse auto measures the prompt of `saccade generate`. Name a pattern here: "
            f"{', '.join(PATTERNS)}."
        )
    if "sparse" in given:
        given["sparse"] = PATTERNS[given["sparse"]]()
    plan = given.pop("sparse_plan", None)
    if plan is not None or isinstance(given.get("sparse"), Kascade):
        given["sparse"] = _planned(plan, given.get("sparse"))
    factor = given.pop("rope_scale", None)
    if factor is not None:
        if "rope_freq_scale" in given:
            raise UsageError("--rope-scale and --rope-freq-scale say the same thing. Give one.")
        if factor < 1:
            raise UsageError(f"--rope-scale is a factor of at least 1, got {factor:g}.")
        given["rope_freq_scale"] = 1 / factor
    try:
        return ContextParams(**given)
    except ValueError as error:
        raise UsageError(with_flags(str(error), values)) from error


def _planned(plan: str | None, pattern: Pattern | None) -> Pattern:
    """Kascade with the plan of a file."""
    from saccade.sparse import Kascade, KascadePlan

    if not isinstance(pattern, Kascade):
        raise UsageError("--sparse-plan is a plan of --sparse kascade. Give both, or neither.")
    if plan is None:
        raise UsageError(
            "--sparse kascade needs --sparse-plan FILE here; `saccade generate` writes one."
        )
    try:
        return Kascade(plan=KascadePlan.load(Path(plan).expanduser()))
    except OSError as error:
        raise UsageError(f"--sparse-plan {plan} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"--sparse-plan {error}") from error


GPU_BATCH = 2048
"""Tokens that a GPU reads in one step where --batch-size is not given: 512 leave it waiting."""


def for_device(params: ContextParams, values: Values, device: str) -> ContextParams:
    """`params` with as many tokens a step as this kind of device reads best, unless given."""
    if device != "cuda" or values["n_batch"] is not None:
        return params
    return replace(params, n_batch=GPU_BATCH)


def with_flags(message: str, typed: Mapping[str, Any] | None = None) -> str:
    """A message about fields of ContextParams and Sampler, about options instead.

    Args:
        typed: values of CONTEXT, for a field that two options set: the one that was given is named.
    """
    if (typed or {}).get("rope_freq_scale") is None:  # the plainer one, unless it was not typed
        message = re.sub(r"\brope_freq_scale=([\d.e-]*\d)", _as_factor, message)
        message = re.sub(r"\brope_freq_scale\b", "--rope-scale", message)
    for option in (*CONTEXT, *SAMPLING):
        if "_" in option.field:  # the others are words of English too
            end = "(?==)" if option.field == "flash_attn" else r"\b"  # a backend has that name
            message = re.sub(rf"(?<![\w-]){option.field}{end}", option.flags[0], message)
    message = re.sub(r"^temperature(?= has to)", "--temperature", message)
    message = re.sub(r"\b(rope|yarn)_\*", r"--\1-*", message)
    message = re.sub(r'\battention\(backend="(\w+)"\)', r"--backend \1", message)
    message = re.sub(r'\bUse backend="auto" or "(\w+)"', r"Leave it out, or use \1", message)
    message = re.sub(r"\bbackend='(\w+)'", r"--backend \1", message)
    message = re.sub(r"(--[\w-]+)=None\b", r"no \1", message)
    return re.sub(r"(--[\w-]+)=('[^']*'|True|False|[\d.,e+-]*\d)", _as_word, message)


def _as_factor(found: re.Match[str]) -> str:
    """`rope_freq_scale=0.25` as the option that has the factor: `--rope-scale 4`."""
    return f"--rope-scale {1 / float(found[1]):g}"


def _as_word(found: re.Match[str]) -> str:
    """A value as it is typed: `--kv-offload=False` is `--kv-offload off`, 1,024 is 1024."""
    value = {"True": "on", "False": "off"}.get(found[2], found[2].strip("'"))
    return f"{found[1]} {value.replace(',', '')}"


@contextmanager
def in_words_of_options(typed: Values) -> Iterator[None]:
    """Inside, what saccade refuses is said of options instead of fields of ContextParams.

    Args:
        typed: values of CONTEXT.

    Raises:
        UsageError: instead of the ValueError; one that another package raised stays as it is.
    """
    try:
        yield
    except ValueError as error:
        if not raised_by_us(error):
            raise
        raise UsageError(with_flags(str(error), typed)) from error


def sampler_of(values: Values, saved: Sampler | None = None, *, later: bool = False) -> Sampler:
    """The sampler of the values of SAMPLING; what is not given stays as a saved one has it.

    Args:
        later: a session that is read later may say the temperature.

    Raises:
        UsageError: a value out of range, or --top-k and --top-p without a temperature.
    """
    from saccade.runtime import Sampler

    given = {name: value for name, value in values.items() if value is not None}
    kept = {} if saved is None else {name: getattr(saved, name) for name in values}
    try:
        sampler = Sampler(**kept | given)
    except ValueError as error:
        raise UsageError(with_flags(str(error))) from error
    if saved is not None and "seed" not in given:
        sampler.restore(saved.state())
    flags = [flag for flag in idle_flags(values, sampler) if flag != "--seed"]
    if flags and "temperature" not in given and not later:
        raise UsageError(
            f"{' and '.join(flags)}: nothing is sampled without a temperature, the most likely "
            f"token is always taken. Add --temp 0.8, say, or leave {' and '.join(flags)} out."
        )
    return sampler


def idle_flags(values: Values, sampler: Sampler) -> list[str]:
    """The options of SAMPLING that were given and change nothing, since decoding is greedy."""
    if sampler.temperature != 0:
        return []
    usual = {"top_k": 0, "top_p": 1, "seed": None}
    return [
        option.flags[0]
        for option in SAMPLING
        if option.field in usual and values[option.field] not in (None, usual[option.field])
    ]
