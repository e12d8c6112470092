"""transformers' own generate() over keys and values in int8 and int4: a smaller cache.

The model is a small random one, so that this runs in seconds; any other goes in its place.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import saccade

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(0, 1000, (1, 3000))

sizes, logits = {}, {}
for kind in ("f32", "int8", "int4"):
    with saccade.attach(model, saccade.ContextParams(type_k=kind, type_v=kind)) as attached:
        cache = attached.new_cache(reserve=3008)
        out = model.generate(
            prompt, past_key_values=cache, max_new_tokens=8, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    sizes[kind], logits[kind] = cache.nbytes, torch.stack(out.logits)
    error = (logits[kind] - logits["f32"]).norm() / logits["f32"].norm()
    print(
        f"{kind:5} {cache.nbytes / 2**20:5.1f} MiB, {sizes[kind] / sizes['f32']:4.0%} of f32, "
        f"logits differ by {float(error):.1e}"
    )
