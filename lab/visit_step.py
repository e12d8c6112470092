"""What replacing pieces of a decoding step is worth: 8 layers of the 8B shape, and products alone.

python lab/visit_step.py steps products lengths rings families
"""

import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from gpu_end_to_end import over_codes
from gpu_subjects import LONG, SHAPE, Ours, rate, relative, tokens
from gpu_windows import SHAPE as WINDOWED
from profile_step import table
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

from saccade.ops.gemv import api as one_row
from saccade.ops.gemv import kernel as kernels
from saccade.ops.gemv.kernel import Cut

CUTS = [Cut(1, 1024, 4), Cut(1, 2048, 4), Cut(2, 1024, 4), Cut(2, 2048, 4), Cut(2, 512, 2),
        Cut(4, 512, 2), Cut(4, 1024, 4), Cut(8, 512, 4), Cut(1, 4096, 8)]  # fmt: skip
SHAPES = {"qkv": (4096, [4096, 1024, 1024]), "o": (4096, [4096]), "down": (14336, [4096]),
          "gate": (4096, [14336, 14336]), "head": (4096, [128256])}  # fmt: skip


def steps() -> None:
    """A step without and with the kernels of one row, cuts of the gate; where its time goes."""
    config = LlamaConfig(**(SHAPE | {"num_hidden_layers": 8}))
    ours = Ours(config, 8192)
    ours.read(tokens(4096, config.vocab_size), 4096)
    never = patch.object(one_row, "_measured_on", lambda _: False)
    cases = {"library": never, "one row": patch.object(kernels, "GATED", kernels.GATED)}
    for cut in (Cut(1, 1024, 4), Cut(2, 2048, 4)):
        cases[f"gate {tuple(cut)}"] = patch.object(kernels, "GATED", cut)
    for cut in (Cut(1, 1024, 4), Cut(8, 512, 4)):
        cases[f"products {tuple(cut)}"] = patch.object(kernels, "PRODUCTS", cut)
    exact = None
    for name, case in cases.items():
        for layer in ours.ctx.cache.layers:
            layer.truncate(4096)
        ours.decode = None
        with case:
            logits = ours.step(7).clone()
            exact = logits if exact is None else exact
            found = [rate(ours, 48)["ms_per_token"] for _ in range(2)]
            error = relative(logits, exact)
            print(f"{name:24s} {found[0]:.3f} {found[1]:.3f} ms {error:.1e}", flush=True)
            if name == "one row":
                table(name, lambda: ours.step(5), 12)


def graph_us(run, times: int) -> float:
    """Microseconds of one of `times` calls in a graph."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(times):
            run(i)
    found = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) * 1e3 / times)
    return sorted(found)[3]


@torch.no_grad()
def products() -> None:
    """Products of one row: the library and every cut, weights of many layers in turn."""
    for name, (columns, rows) in SHAPES.items():
        nbytes = 2 * columns * sum(rows)
        count = max(2, min(24, int(4e8 // nbytes) + 1))
        x = torch.randn(columns, device="cuda", dtype=torch.bfloat16)
        weights = [
            [torch.randn(n, columns, device="cuda", dtype=torch.bfloat16) for n in rows]
            for _ in range(count)
        ]

        def theirs(i, name=name, weights=weights, x=x, count=count):
            found = [F.linear(x[None], w) for w in weights[i % count]]
            return F.silu(found[0]) * found[1] if name == "gate" else found

        def mine(i, cut, name=name, weights=weights, x=x, count=count):
            w = weights[i % count]
            if name == "gate":
                return kernels.gated(x, *w, cut)
            return kernels.products(x, w, [None] * len(w), cut)

        us = sorted((graph_us(lambda i, c=c, m=mine: m(i, c), 2 * count), c) for c in CUTS)
        line = " ".join(f"{t:.1f}:{'/'.join(map(str, cut))}" for t, cut in us)
        print(f"{name:5s} memory {nbytes / 4.4e6:.1f} library {graph_us(theirs, 2 * count):.1f} us,"
              f" ours {line}", flush=True)  # fmt: skip


@torch.inference_mode()
def fill(ours: Ours, length: int) -> None:
    """Random keys and values in place of a text: only steps are timed."""
    heads = ours.model.config.num_key_value_heads
    for layer in ours.ctx.cache.layers:
        layer.reset()
        layer.append(*torch.randn(2, 1, heads, length, 128, device="cuda", dtype=torch.bfloat16))


def kv_lens(layers: int = 32, texts: tuple[int, ...] = (4096, 32768, LONG - 256)) -> None:
    """The whole shape behind each length, then over codes behind the last."""
    ours = Ours(LlamaConfig(**(SHAPE | {"num_hidden_layers": layers})), LONG)
    for length in texts:
        fill(ours, length)
        exact = ours.step(7).clone()
        print(f"bf16 {length}: {rate(ours)['ms_per_token']:.2f} ms", flush=True)
    for layer in ours.ctx.cache.layers:
        layer.truncate(texts[-1] + 1)
    for kind in ("int8", "fp8", "int4"):
        found = over_codes(ours, kind, exact)
        print(f"{kind} {found['ms_per_token']:.2f} ms, error {found['error']:.3f}", flush=True)


def compiling() -> None:
    """Every kernel of `lengths`, in little memory."""
    kv_lens(2, (4096, 32768))


def rings() -> None:
    """16 layers of Mistral's shape behind contexts of falling length, then of growing."""
    ours = Ours(MistralConfig(**(WINDOWED | {"num_hidden_layers": 16})), LONG)
    for length in (LONG - 256, 32768, 4096, 4096, 32768, LONG - 256):
        fill(ours, length)
        print(f"rings {length}: {rate(ours)['ms_per_token']:.3f} ms", flush=True)


def families() -> None:
    """8 layers of other shapes behind 4k tokens, without and with the kernels of one row."""
    common = {"num_hidden_layers": 8, "max_position_embeddings": 8192}
    shapes = {
        "Qwen3-8B": Qwen3Config(
            **common, vocab_size=151936, hidden_size=4096, intermediate_size=12288,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        ),
        "Gemma-3-12B": Gemma3TextConfig(
            **common, vocab_size=262208, hidden_size=3840, intermediate_size=15360,
            num_attention_heads=16, num_key_value_heads=8, head_dim=256, sliding_window=1024,
        ),
    }  # fmt: skip
    for name, config in shapes.items():
        ours = Ours(config, 8192)
        scale = getattr(ours.model.model.embed_tokens, "embed_scale", None)
        if scale is not None:  # a buffer, which random weights leave out
            scale.fill_(config.hidden_size**0.5)
        ours.read(tokens(3000, config.vocab_size), 4096)
        times = []
        for measured in (False, True):
            ours.decode = None
            with patch.object(one_row, "_measured_on", lambda _, measured=measured: measured):
                times.append(rate(ours)["ms_per_token"])
        print(f"{name}: library {times[0]:.3f}, one row {times[1]:.3f} ms", flush=True)
        ours.ctx.close()


if __name__ == "__main__":
    for part in sys.argv[1:]:
        {"steps": steps, "products": products, "lengths": kv_lens, "rings": rings,
         "families": families, "compiling": compiling}[part]()  # fmt: skip
