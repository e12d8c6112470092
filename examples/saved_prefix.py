"""A long prefix is read once, saved to disk, and reused for every question about it."""

import tempfile
import time
from pathlib import Path

import saccade

model = saccade.load_model("smollm2")
document = "The lighthouse was built in 1871. Its keeper was called Marta. " * 12
prefix = model.tokenizer(document).input_ids
file = Path(tempfile.mkdtemp()) / "document.session"

with saccade.Context(model) as ctx:
    start = time.perf_counter()
    ctx.append(prefix)
    reading = time.perf_counter() - start
    saccade.save_session(file, ctx)
print(f"read {len(prefix)} tokens, saved {file.stat().st_size / 2**20:.1f} MiB")

for question in ("The keeper was called", "The lighthouse was built in"):
    prompt = prefix + model.tokenizer(question).input_ids
    with saccade.Context(model) as ctx:  # as if in another process, another day
        start = time.perf_counter()
        saccade.load_session(file, ctx)
        known = ctx.reuse(prompt)
        answer = [each.token for each in ctx.stream(prompt[known:], n_predict=5)]
        took = time.perf_counter() - start
    print(f"{known} of {len(prompt)} tokens were known: {question}{model.tokenizer.decode(answer)}")
    print(f"   (load and answer {took:.1f} s; reading the prefix alone took {reading:.1f} s)")
