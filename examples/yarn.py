"""Past the trained length: which rotary angles a model would see for the first time, and YaRN."""

import math

import torch

import saccade
from saccade.rope import Linear, NTKAware, Unscaled, YaRN, inverse_frequencies

TRAINED, FACTOR = 8192, 4.0  # the demo model, and four times its length
rules = {
    "unscaled": Unscaled(),
    "linear": Linear(factor=FACTOR),
    "NTK": NTKAware(factor=FACTOR),
    "YaRN": YaRN(factor=FACTOR, original_max_position=TRAINED),
}
trained, _ = inverse_frequencies(Unscaled(), base=100_000.0, rotary_dim=64)
print(
    f"at {FACTOR:g} times the trained length    pairs at unseen angles    turn per token, fast pair"
)
for name, rule in rules.items():
    frequencies, _ = inverse_frequencies(rule, base=100_000.0, rotary_dim=64)
    seen = (TRAINED * trained).clamp_max(2 * math.pi)  # a whole turn holds every angle
    reached = (FACTOR * TRAINED * frequencies).clamp_max(2 * math.pi)
    unseen = torch.count_nonzero(reached > seen * 1.001)
    print(f"{name:32} {unseen:14} of 32 {frequencies[0]:21.2f} rad")

model = saccade.load_model("smollm2")
params = saccade.ContextParams(n_ctx=int(FACTOR * TRAINED), rope_scaling_type="yarn")
with saccade.Context(model, params) as ctx:
    prompt = model.tokenizer("The capital of France is").input_ids
    answer = [each.token for each in ctx.stream(prompt, n_predict=6)]
    print(f"a context of {ctx.n_ctx:,} tokens: ...is{model.tokenizer.decode(answer)}")
