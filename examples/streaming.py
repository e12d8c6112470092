"""Endless text: a window with sinks keeps the cache at one size, whatever the length."""

import saccade

model = saccade.load_model("smollm2")
params = saccade.ContextParams(n_swa=128, n_sinks=4, n_batch=64)
poem = model.tokenizer("The tide comes in, the tide goes out.\n").input_ids

with saccade.Context(model, params) as ctx:
    for _ in range(4):
        ctx.append(poem * 6)
        print(f"{ctx.seen:4} tokens read, {ctx.cache_bytes / 2**20:.1f} MiB of cache")
    answer = [each.token for each in ctx.stream(n_predict=10)]

print("and it goes on:", model.tokenizer.decode(answer).strip())
