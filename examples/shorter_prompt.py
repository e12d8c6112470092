"""A shorter prompt: the tokens that surprise the model are kept, the others are dropped."""

import torch

import saccade
from saccade.runtime.importance import self_information

model = saccade.load_model("smollm2")
text = (
    "The meeting was held in the office. The meeting was long and the meeting was dull. "
    "At the end it was decided that the bridge over the Tamar will be closed in May. "
    "The meeting was then closed, as the meeting was over, and everybody left the meeting."
)
tokens = torch.tensor(model.tokenizer(text).input_ids)

with saccade.Context(model) as ctx:
    scores = self_information(ctx, tokens)  # -log p of each token given those before

kept = saccade.compress_context(tokens, scores, target_len=len(tokens) // 2)
print(f"{len(tokens)} tokens: {text}")
print(f"{len(kept)} tokens: {model.tokenizer.decode(kept)}")
