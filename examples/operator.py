"""The operator: grouped heads, a window with sinks, and the log-sum-exp that joins two results."""

import torch

import saccade

torch.manual_seed(0)
q = torch.randn(1, 8, 1000, 64)  # [batch, query heads, length, head_dim]
k, v = torch.randn(2, 1, 2, 1000, 64)  # 2 KV heads: each serves 4 query heads, nothing is repeated

full = saccade.attention(q, k, v)
windowed = saccade.attention(q, k, v, window=128, sinks=4)
difference = (full - windowed).abs().amax((0, 1, 3))  # of each query
first = int((difference > 1e-5).nonzero()[0])
print(f"a window of 128 keys and 4 sinks changes queries from position {first} on")

# The last query over all keys, computed in two halves and joined by their log-sum-exp.
last = q[:, :, -1:]
old, old_lse = saccade.attention(last, k[:, :, :500], v[:, :, :500], return_lse=True)
new, new_lse = saccade.attention(last, k[:, :, 500:], v[:, :, 500:], return_lse=True)
weight = torch.sigmoid(old_lse - new_lse)[..., None]  # share of the older keys
joined = weight * old + (1 - weight) * new
error = (joined - full[:, :, -1:]).abs().max().item()
print(f"two halves joined differ from all keys at once by {error:.0e}")

print("backends for this call:")
for backend, verdict in saccade.explain(q, k, v, window=128, sinks=4):
    print(f"  {backend:12} {verdict}")
