"""What a row of the table does beyond renaming keys: each step sets some values of the config.

The steps follow what llama.cpp's converter writes and its loader assumes where a key is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from saccade.hf.gguf.facts import Facts
from saccade.hf.gguf.rope import rotary

Values = dict[str, Any]
Step = Callable[[Facts, Values], None]


def vocabulary(facts: Facts, values: Values) -> None:
    rows = facts.shape("token_embd.weight")[0]
    keys = facts.file.keys
    tokens = keys.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        if len(tokens) > rows:  # pyright: ignore[reportUnknownArgumentType]
            raise facts.wrong("vocab_size", f"at least {len(tokens)}, the number of tokens", rows)
        facts.get("vocab_size")  # llama.cpp counts the tokens instead
    elif facts.integer("vocab_size", rows) != rows:
        raise facts.wrong("vocab_size", f"{rows}, the rows of token_embd", facts.get("vocab_size"))
    values["vocab_size"] = rows
    values["tie_word_embeddings"] = "output.weight" not in facts.file.tensors
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    for name, short in names.items():
        token = keys.get(f"tokenizer.ggml.{name}_token_id")
        fits = type(token) is int and 0 <= token < rows
        values[f"{short}_token_id"] = token if fits else None


def heads(facts: Facts, values: Values) -> None:
    """Heads, groups of heads that share keys, and their size; the rows of attn_q must be theirs."""
    heads = values["num_attention_heads"]
    groups = facts.integer("attention.head_count_kv", heads)
    rows = facts.file.tensors.get("blk.0.attn_q.weight")
    width = rows.shape[0] if rows else values["hidden_size"]
    dim = _head_dim(facts, width, heads)
    if heads % groups:
        raise facts.wrong("attention.head_count_kv", f"a divisor of {heads} heads", groups)
    if rows and width != heads * dim:
        raise facts.wrong("attention.head_count", f"{width} rows of attn_q / {dim}", heads)
    values |= {"num_key_value_heads": groups, "head_dim": dim}
    _usual_scale(facts, values)


def _head_dim(facts: Facts, width: int, heads: int) -> int:
    dim = facts.integer("attention.key_length", max(1, width // heads))
    facts.must_be("attention.value_length", dim, "as large as key_length")
    facts.must_be("attention.causal", True, "a language model")
    return dim


def _usual_scale(facts: Facts, values: Values) -> None:
    if "query_pre_attn_scalar" not in values and "attention_multiplier" not in values:
        facts.must_be("attention.scale", values["head_dim"] ** -0.5, "1 / sqrt(head_dim)")


def rope(**options: Any) -> Step:
    def step(facts: Facts, values: Values) -> None:
        values["rope_parameters"] = rotary(
            facts,
            head_dim=values.get("head_dim")
            or values["hidden_size"] // values["num_attention_heads"],
            context=values["max_position_embeddings"],
            **options,
        )

    return step


def trained_length(_: Facts, values: Values) -> None:
    """Phi-3's config has the length that its `longrope` switches at outside of the rule, too."""
    rope = values["rope_parameters"]
    key = "original_max_position_embeddings"
    values[key] = rope.get(key, values["max_position_embeddings"])


def present(**tensors_of: str) -> Step:
    """Settings that are true where the file has such a tensor."""

    def step(facts: Facts, values: Values) -> None:
        for name, pattern in tensors_of.items():
            values[name] = facts.any_tensor(pattern)

    return step


def absent(**tensors_of: str) -> Step:
    def step(facts: Facts, values: Values) -> None:
        for name, pattern in tensors_of.items():
            values[name] = not facts.any_tensor(pattern)

    return step


def constant(**settings: Any) -> Step:
    def step(_: Facts, values: Values) -> None:
        values |= settings

    return step


def must_be(why: str, **wanted: Any) -> Step:
    """Keys (dots written as `__`) that the model of transformers has in one way only."""

    def step(facts: Facts, values: Values) -> None:
        for key, value in wanted.items():
            facts.must_be(key.replace("__", "."), value, why)

    return step


def window(facts: Facts, values: Values) -> None:
    """A window in every layer."""
    values["sliding_window"] = facts.integer("attention.sliding_window", 0, least=0) or None


def windows(period: int, *, default: int = 0) -> Step:
    """A window in all layers but every `period`-th; 0: in all.  The file may have its own."""

    def step(facts: Facts, values: Values) -> None:
        layers = values["num_hidden_layers"]
        window = facts.integer("attention.sliding_window", default, least=0) or None
        given = facts.get("attention.sliding_window_pattern")
        if isinstance(given, list):
            sliding = given
        else:
            every = facts.integer("attention.sliding_window_pattern", period, least=0)
            sliding = [every == 0 or i % every < every - 1 for i in range(layers)]
        if len(sliding) != layers or not all(type(item) is bool for item in sliding):
            raise facts.wrong("attention.sliding_window_pattern", "true or false a layer", given)
        kinds = ["sliding_attention" if window and item else "full_attention" for item in sliding]
        values |= {"sliding_window": window, "layer_types": kinds}

    return step


def qwen_windows(facts: Facts, values: Values) -> None:
    windows(0)(facts, values)
    values["use_sliding_window"] = values["sliding_window"] is not None
    if values["use_sliding_window"]:
        values["max_window_layers"] = 0


def experts(count: str, *, width: str, gating: tuple[int, ...], normed: bool | None = None) -> Step:
    """Experts; `gating` are llama.cpp's numbers of what the model does.

    1 is a softmax over all experts, 3 one over the chosen ones, 2 a sigmoid.

    `normed`: whether the weights of the chosen ones sum to 1 unless the file says otherwise; None
    for models that always do.
    """

    def step(facts: Facts, values: Values) -> None:
        values[count] = facts.integer("expert_count")
        values["num_experts_per_tok"] = facts.integer("expert_used_count")
        if values["num_experts_per_tok"] > values[count]:
            raise facts.wrong(
                "expert_used_count", f"up to {values[count]}", values["num_experts_per_tok"]
            )
        rows = values.get(width) or facts.shape("blk.*.ffn_gate_exps.weight", dims=3)[1]
        values[width] = facts.integer("expert_feed_forward_length", rows, least=0) or rows
        given = facts.integer("expert_gating_func", gating[0])
        facts.must_be("expert_gating_func", given if given in gating else gating[0], "its class")
        facts.must_be("expert_weights_scale", 1.0, "transformers' model has no other")
        if normed is None:
            facts.must_be("expert_weights_norm", True, "transformers' model always does")
        else:
            values["norm_topk_prob"] = facts.flag("expert_weights_norm", normed)

    return step


def qwen2_moe_windows(facts: Facts, values: Values) -> None:
    """transformers makes the mask of sliding layers even where none slides: give it some window."""
    qwen_windows(facts, values)
    if not values["use_sliding_window"]:
        values |= {
            "use_sliding_window": True,
            "sliding_window": values["max_position_embeddings"],
        }


def shared_expert(facts: Facts, values: Values) -> None:
    rows = facts.shape("blk.*.ffn_gate_shexp.weight")[0]
    key = "expert_shared_feed_forward_length"
    values["shared_expert_intermediate_size"] = facts.integer(key, rows, least=0) or rows
    facts.must_be("expert_shared_count", 1, "one shared expert")


def multipliers(facts: Facts, values: Values) -> None:
    """What Granite scales by; the first two must be there, as for llama.cpp."""
    values["attention_multiplier"] = facts.real("attention.scale")
    values["logits_scaling"] = facts.real("logit_scale")
    values["embedding_multiplier"] = facts.real("embedding_scale", 1.0)
    values["residual_multiplier"] = facts.real("residual_scale", 1.0)


def layer_norm_eps(name: str) -> Step:
    """The epsilon of models that files give under either name."""

    def step(facts: Facts, values: Values) -> None:
        rms = facts.real("attention.layer_norm_rms_epsilon", None)
        values[name] = facts.real("attention.layer_norm_epsilon", rms) or facts.real(
            "attention.layer_norm_epsilon"
        )

    return step


def softcaps(attention: float | None, final: float | None) -> Step:
    def step(facts: Facts, values: Values) -> None:
        values["attn_logit_softcapping"] = facts.real("attn_logit_softcapping", attention)
        values["final_logit_softcapping"] = facts.real("final_logit_softcapping", final)

    return step


def gemma_scale(layers_27b: int) -> Step:
    """llama.cpp knows the one size whose scores are scaled otherwise by its number of layers."""

    def step(facts: Facts, values: Values) -> None:
        given = facts.real("attention.scale", None)
        scalar = 256
        if given is not None:
            scalar = round(given**-2, 3)
        elif values["num_hidden_layers"] == layers_27b:
            scalar = values["hidden_size"] // values["num_attention_heads"]
        elif facts.get("attention.key_length") != 256:
            facts.notes.append(
                "the file does not say by what scores are scaled: 1 / sqrt(256) is assumed, as in "
                "every Gemma of this kind but the largest."
            )
        values["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar

    return step


def gemma3_rope(facts: Facts, values: Values) -> None:
    """Full layers have their own base and scaling; sliding ones are never scaled."""
    sliding = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base_swa", 10000.0)}
    rope(theta=1000000.0)(facts, values)
    full = values["rope_parameters"]
    values["rope_parameters"] = {"full_attention": full, "sliding_attention": sliding}


def falcon(facts: Facts, values: Values) -> None:
    heads = values["num_attention_heads"]
    groups = facts.integer("attention.head_count_kv", 1)
    norms = 2 if facts.any_tensor("blk.*.attn_norm_2.weight") else 1
    new = norms == 2 or groups > 1
    values |= {
        "num_kv_heads": groups,
        "new_decoder_architecture": new,
        "multi_query": not new,
        "num_ln_in_parallel_attn": norms if new else None,
    }
    dim = _head_dim(facts, values["hidden_size"], heads)
    facts.must_be("attention.key_length", values["hidden_size"] // heads, "embedding / heads")
    facts.must_be("attention.scale", dim**-0.5, "1 / sqrt(head_dim)")
    facts.must_be("tensor_data_layout", "jploski", "the only one")


def mamba(facts: Facts, values: Values) -> None:
    inner, hidden = facts.integer("ssm.inner_size"), values["hidden_size"]
    if inner % hidden:
        raise facts.wrong("ssm.inner_size", f"a multiple of {hidden}", inner)
    values["expand"] = inner // hidden
    for unused in ("feed_forward_length", "attention.head_count", "context_length"):
        facts.get(unused)
    values["use_bias"] = facts.any_tensor("blk.*.ssm_in.bias")


def lfm2(facts: Facts, values: Values) -> None:
    groups = facts.get("attention.head_count_kv")
    layers = values["num_hidden_layers"]
    expected = f"{layers} whole numbers, 0 for a convolution and one other number"
    if not isinstance(groups, list) or len(groups) != layers or len({*groups} - {0}) != 1:
        raise facts.wrong("attention.head_count_kv", expected, groups)
    values["num_key_value_heads"] = max(groups)
    values["layer_types"] = ["full_attention" if number else "conv" for number in groups]
    values["head_dim"] = _head_dim(facts, values["hidden_size"], values["num_attention_heads"])
    _usual_scale(facts, values)


def qkv_heads_are_heads(facts: Facts, values: Values) -> None:
    """Models without groups of heads."""
    heads = values["n_head"]
    hidden = values.get("hidden_size") or values["n_embd"]
    facts.must_be("attention.head_count_kv", heads, "as many as head_count")
    if hidden % heads:
        raise facts.wrong("attention.head_count", f"a divisor of {hidden}", heads)
    dim = _head_dim(facts, hidden, heads)
    facts.must_be("attention.key_length", hidden // heads, "embedding / heads")
    facts.must_be("attention.scale", dim**-0.5, "1 / sqrt(head_dim)")
