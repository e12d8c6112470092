"""cuDNN through torch for a chunk over earlier keys: speed, and what a new shape costs at first.

python lab/cudnn_pieces.py
"""

import time

import torch

HEADS, KV_HEADS, DIM, CHUNK = 32, 8, 128, 8192


def main() -> None:
    """First and second call for several lengths of keys, and the lse against float32."""
    q = torch.randn(1, HEADS, CHUNK, DIM, device="cuda", dtype=torch.bfloat16)
    store = torch.randn(2, 1, KV_HEADS, 131072, DIM, device="cuda", dtype=torch.bfloat16)
    call = torch.ops.aten._scaled_dot_product_cudnn_attention
    for length in (8192, 16384, 24576, 65536, 122880):
        k, v = store[0, :, :, :length], store[1, :, :, :length]
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            found = call(q, k, v, None, True, 0.0, False, False)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        rate = 4 * HEADS * DIM * CHUNK * length / min(times) / 1e12
        out, lse = found[0], found[1]
        scores = (q[0, :1, :64].float() @ k[0, 0].float().T) * DIM**-0.5
        truth = scores.logsumexp(-1)
        error = (lse.reshape(HEADS, CHUNK)[:1, :64] - truth).abs().max().item()
        print(length, [round(t * 1e3, 2) for t in times], f"{rate:.0f} TF/s", tuple(lse.shape),
              out.stride(), f"lse error {error:.1e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
