"""A GGUF file of a known model's shape with random weights, for measuring speed and memory.

    python -m benchmarks.shaped_gguf --shape qwen2.5-1.5b --kind F16 --out qwen-1.5b-F16.gguf
    python -m benchmarks.shaped_gguf --shape qwen2.5-1.5b --kind Q4_K_M --out qwen-1.5b.gguf \\
        --peer-python llama/bin/python

Weights are normal numbers as large as training leaves them, so that activations neither vanish nor
grow; the output's scale makes predictions about as sure as a trained model's.  Tokens and merges
are another file's, filled up to the shape's vocabulary.  F32, F16 and BF16 are written here, one
tensor at a time; other kinds (llama.cpp's names: Q4_0, Q8_0, Q4_K_M, ...) by llama.cpp, of an F16
file beside, which is removed.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from saccade.hf.gguf.file import GGUFFile, parse_file
from saccade.runtime.located import located

PEER = Path(__file__).with_name("llamacpp_peer.py")
PLAIN = {"F32": gguf.GGMLQuantizationType.F32, "F16": gguf.GGMLQuantizationType.F16,
         "BF16": gguf.GGMLQuantizationType.BF16}  # fmt: skip
TOKENIZER_KEYS = {"model", "pre", "add_bos_token", "add_space_prefix", "bos_token_id",
                  "eos_token_id", "unknown_token_id", "padding_token_id"}  # fmt: skip
UNUSED = 5  # the kind of a token that stands for no text
ROWS = 16384  # rows of a matrix that are drawn at once
EMBEDDED = 0.02  # spread of embeddings, which branches soon drown, so that no token repeats itself
CONFIDENCE = 3.0  # spread of the logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a file says of a model beside its weights; one without `output` ties it."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    context: int
    theta: float
    biases: bool = False
    norms: bool = False
    tied: bool = True
    window: int = 0


SHAPES = {
    "tiny": Shape(architecture="qwen2", layers=2, hidden=256, heads=4, kv_heads=2, head_dim=64,
                  ffn=512, vocabulary=49408, context=4096, theta=1e6, biases=True),
    "qwen2.5-0.5b": Shape(architecture="qwen2", layers=24, hidden=896, heads=14, kv_heads=2,
                          head_dim=64, ffn=4864, vocabulary=151936, context=32768, theta=1e6,
                          biases=True),
    "qwen2.5-1.5b": Shape(architecture="qwen2", layers=28, hidden=1536, heads=12, kv_heads=2,
                          head_dim=128, ffn=8960, vocabulary=151936, context=32768, theta=1e6,
                          biases=True),
    "qwen3-0.6b": Shape(architecture="qwen3", layers=28, hidden=1024, heads=16, kv_heads=8,
                        head_dim=128, ffn=3072, vocabulary=151936, context=40960, theta=1e6,
                        norms=True),
    "llama3.2-1b": Shape(architecture="llama", layers=16, hidden=2048, heads=32, kv_heads=8,
                         head_dim=64, ffn=8192, vocabulary=128256, context=131072, theta=5e5),
    "llama3.1-8b": Shape(architecture="llama", layers=32, hidden=4096, heads=32, kv_heads=8,
                         head_dim=128, ffn=14336, vocabulary=128256, context=131072, theta=5e5,
                         tied=False),
    "gemma3-270m": Shape(architecture="gemma3", layers=18, hidden=640, heads=4, kv_heads=1,
                         head_dim=256, ffn=2048, vocabulary=262144, context=32768, theta=1e6,
                         norms=True, window=512),
}  # fmt: skip
"""Qwen2.5, Qwen3, Llama 3 and Gemma 3 as their configs have them; "tiny" is for trying."""


def matrices(shape: Shape) -> Iterator[tuple[str, tuple[int, int], float]]:
    """(name, [out, in], spread of its numbers) of every matrix, in a file's order."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    deep = (2 * shape.layers) ** -0.5  # what each of the branches adds to the residual stream
    yield "token_embd", (shape.vocabulary, shape.hidden), EMBEDDED
    if not shape.tied:
        yield "output", (shape.vocabulary, shape.hidden), EMBEDDED
    for layer in range(shape.layers):
        for name, out, width, scale in (
            ("attn_q", queries, shape.hidden, 1.0),
            ("attn_k", keys, shape.hidden, 1.0),
            ("attn_v", keys, shape.hidden, 1.0),
            ("attn_output", shape.hidden, queries, deep),
            ("ffn_gate", shape.ffn, shape.hidden, 1.0),
            ("ffn_up", shape.ffn, shape.hidden, 1.0),
            ("ffn_down", shape.hidden, shape.ffn, deep),
        ):
            yield f"blk.{layer}.{name}", (out, width), scale * width**-0.5


def vectors(shape: Shape) -> Iterator[tuple[str, int, float]]:
    """(name, length, mean) of norms (mean 1, but for the last) and biases (mean 0)."""
    yield "output_norm.weight", shape.hidden, CONFIDENCE / (EMBEDDED * shape.hidden**0.5)
    gemma = shape.architecture == "gemma3"
    names = ["attn_norm", "ffn_norm", *(["post_attention_norm", "post_ffw_norm"] * gemma)]
    for layer in range(shape.layers):
        for name in names:
            yield f"blk.{layer}.{name}.weight", shape.hidden, 1.0
        for name in ("attn_q_norm", "attn_k_norm") if shape.norms else ():
            yield f"blk.{layer}.{name}.weight", shape.head_dim, 1.0
        for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            if shape.biases:
                yield f"blk.{layer}.attn_{name}.bias", heads * shape.head_dim, 0.0


def write(shape: Shape, name: str, kind: str, path: Path, tokenizer_of: Path, seed: int) -> None:
    """Write a file of plain numbers, never more than one matrix in memory."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_name(name)
    _add_facts(writer, shape, kind)
    _add_tokens(writer, shape.vocabulary, parse_file(tokenizer_of))
    matrix_type, vector_type = PLAIN[kind], np.dtype(np.float32)
    size = np.dtype(np.float32 if kind == "F32" else np.float16)
    for matrix, (out, width), _ in matrices(shape):
        bytes_of = out * width * size.itemsize
        writer.add_tensor_info(f"{matrix}.weight", [out, width], size, bytes_of, matrix_type)
    for vector, length, _ in vectors(shape):
        writer.add_tensor_info(vector, [length], vector_type, length * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(seed)
    for _, size_of, spread in matrices(shape):
        writer.write_tensor_data(_drawn(random, size_of, spread, kind))
    for _, length, mean in vectors(shape):
        numbers = mean + 0.1 * random.standard_normal(length, np.float32)
        writer.write_tensor_data(numbers.astype(np.float32))
    writer.close()


def _drawn(
    random: np.random.Generator, size: tuple[int, int], spread: float, kind: str
) -> np.ndarray[Any, Any]:
    """A matrix of normal numbers, stored as `kind`."""
    whole = np.empty(size, np.float32 if kind == "F32" else np.uint16)
    for begin in range(0, size[0], ROWS):
        rows = (min(ROWS, size[0] - begin), size[1])
        numbers = random.standard_normal(rows, np.float32) * np.float32(spread)
        stored = numbers if kind == "F32" else gguf.quantize(numbers, PLAIN[kind])
        whole[begin : begin + rows[0]] = stored.view(whole.dtype).reshape(rows)
    return whole


def _add_facts(writer: gguf.GGUFWriter, shape: Shape, kind: str) -> None:
    writer.add_file_type(
        {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16,
         "BF16": gguf.LlamaFileType.MOSTLY_BF16}[kind]
    )  # fmt: skip
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(1e-6)
    if shape.architecture == "llama":
        writer.add_rope_dimension_count(shape.head_dim)
    if shape.window:
        writer.add_sliding_window(shape.window)


def _add_tokens(writer: gguf.GGUFWriter, size: int, source: GGUFFile) -> None:
    """The tokenizer of another file, with tokens that stand for nothing behind its own."""
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in source.keys.items()
            if key.startswith("tokenizer.ggml.")}  # fmt: skip
    tokens = keys["tokens"]
    if len(tokens) > size:
        raise SystemExit(
            f"the tokenizer has {len(tokens):,} tokens, the shape {size:,}: expected fewer."
        )
    missing = size - len(tokens)
    writer.add_token_list([*tokens, *(f"<|unused_{i}|>".encode() for i in range(missing))])
    writer.add_token_types([*keys["token_type"], *[UNUSED] * missing])
    writer.add_token_merges(keys["merges"])
    for name in TOKENIZER_KEYS & keys.keys():
        key, value = f"tokenizer.ggml.{name}", keys[name]
        add = (writer.add_bool if isinstance(value, bool) else
               writer.add_uint32 if isinstance(value, int) else writer.add_string)  # fmt: skip
        add(key, value)
    if template := source.keys.get("tokenizer.chat_template"):
        writer.add_chat_template(template)


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--kind", default="F16", help="F32, F16, BF16, or a name of llama.cpp's")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer-of", default="smollm2", help="a GGUF file with byte-level BPE")
    parser.add_argument("--peer-python", help="of an environment with llama-cpp-python")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quantized = arguments.kind not in PLAIN
    if quantized and arguments.peer_python is None:
        parser.error(f"--kind {arguments.kind} is made by llama.cpp: --peer-python is needed.")
    plain = arguments.out.with_suffix(".f16.gguf") if quantized else arguments.out
    write(SHAPES[arguments.shape], arguments.shape, "F16" if quantized else arguments.kind, plain,
          located(arguments.tokenizer_of), arguments.seed)  # fmt: skip
    if quantized:
        words = [arguments.peer_python, str(PEER), "quantize", str(plain), str(arguments.out)]
        subprocess.run([*words, arguments.kind], check=True)
        plain.unlink()
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
