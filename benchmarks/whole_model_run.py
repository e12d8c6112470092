"""One measurement of `benchmarks.whole_model` by saccade or by transformers, in this process.

python -m benchmarks.whole_model_run request.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.llamacpp_peer import Clock, answer, forget_peak, memory, rates

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def begun(request: dict[str, Any]) -> dict[str, Any]:
    """The memory before anything is loaded."""
    torch.set_num_threads(request["threads"])
    found = {"before": memory()}
    forget_peak()
    return found


def ready(request: dict[str, Any], clock: Clock) -> dict[str, Any]:
    """What loading took."""
    return clock.read() | {"ready_s": time.time() - request["spawned"], "loaded": memory()}


def of_saccade(request: dict[str, Any]) -> tuple[Any, Any]:
    """(loaded model, params) of the request's options."""
    from saccade.hf.load import load_model
    from saccade.runtime import ContextParams

    options = request["options"]
    given: dict[str, Any] = {}
    if "weights" in options:
        given["weights"] = options["weights"]
    if "dtype" in options:
        given["dtype"] = DTYPES[options["dtype"]]
    params = {name: options[name] for name in ("type_k", "type_v") if name in options}
    return load_model(request["model"], device="cpu", **given), ContextParams(**params)


def saccade(request: dict[str, Any]) -> dict[str, Any]:
    """A Context as its user opens it; the first one of a model checks itself, untimed."""
    from saccade.hf.context import Context

    found, clock = begun(request), Clock()
    model, params = of_saccade(request)
    found |= ready(request, clock)
    ids = torch.tensor(request["ids"])
    with Context(model, params) as ctx:
        list(ctx.stream(ids[:16], n_predict=2))
    forget_peak()
    with Context(model, params) as ctx:
        begin = time.perf_counter()
        stream = ctx.stream(ids, n_predict=1 + request["written"] * request["runs"])
        moments = [time.perf_counter() for _ in stream]
        found |= {"first_token_s": moments[0] - begin, "cache_bytes": ctx.cache_bytes}
    return found | {"decode_tps": rates(moments, request["runs"]), "ended": memory(),
                    **_weights(model)}  # fmt: skip


def _weights(model: Any) -> dict[str, Any]:
    """What the loader says of the weights."""
    names = ("weights", "weights_bytes")
    return {name: getattr(model, name) for name in names if hasattr(model, name)}


def transformers(request: dict[str, Any]) -> dict[str, Any]:
    """transformers with its own loader, cache and attention; the prompt is read at once."""
    from saccade.evals.subject import Theirs

    found, clock = begun(request), Clock()
    model = _theirs(request)
    found |= ready(request, clock)
    ids = torch.tensor(request["ids"])
    first = Theirs(model, len(ids))
    first.read(ids[:16])
    first.write(ids[:1])
    forget_peak()
    subject = Theirs(model, len(ids))
    begin = time.perf_counter()
    subject.read(ids)
    steps = subject.write(ids[: request["written"] * request["runs"]])
    return found | {
        "first_token_s": steps.stamps[0] - begin,
        "decode_tps": rates(steps.stamps, request["runs"]),
        "cache_bytes": subject.cache_bytes,
        "ended": memory(),
    }


def _theirs(request: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    path = Path(request["model"])
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=DTYPES[request["options"]["dtype"]],
        attn_implementation="sdpa", local_files_only=True,
    ).eval()  # fmt: skip


def saccade_logits(request: dict[str, Any]) -> dict[str, Any]:
    """The last `scored` logits of a text, written to the file `out`."""
    import numpy as np

    from saccade.hf.context import Context

    torch.set_num_threads(request["threads"])
    model, params = of_saccade(request)
    with Context(model, params) as ctx:
        hidden = ctx.append(torch.tensor(request["ids"]), wanted=request["scored"])
        parts: list[Tensor] = [ctx.logits(part).float() for part in hidden.split(64)]
    np.save(request["out"], torch.cat(parts).numpy())
    return _weights(model)


JOBS = {"saccade": saccade, "transformers": transformers, "logits": saccade_logits}


def main() -> None:
    """Run one request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("request", type=Path, help="JSON that benchmarks.whole_model wrote")
    request = json.loads(parser.parse_args().request.read_text())
    answer(request, JOBS)


if __name__ == "__main__":
    main()
