"""Split-KV decoding over dense or paged keys of 16 bits on Hopper: each warp has keys of its own.

A CTA is a few warps; warp w takes every WARPS-th tile of sixteen keys.  A warp fills a ring of
stages in its part of shared memory by cp.async, several tiles ahead, and synchronizes with the
others only at the end, so no barrier stands between memory and the copies.  Page numbers are loaded
two tiles before the copies that need them.  Keys and values are the A operands of both products,

    S^T [keys, rows]       = K @ Q^T
    O^T [channels, rows]  += V^T @ P^T

whose eight columns are a tile of query rows (heads of a group times queries); two such tiles share
the keys that a warp has read.  Which lane holds what: see ptx/mma.py; P becomes a B operand by
transposing 8 x 8 matrices in registers (movmatrix).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from saccade.ops.attention.nvidia.gluon.decode.epilogue import (
    BLOCK_M,
    store_output,
    store_warp_partial,
)
from saccade.ops.attention.nvidia.gluon.decode.smem import (
    copy_offsets,
    cp_async_rows,
    ldmatrix_offsets,
    load_a_fragments,
)
from saccade.ops.attention.nvidia.gluon.ptx.async_copy import (
    cp_async_commit,
    cp_async_wait,
    warp_sync,
)
from saccade.ops.attention.nvidia.gluon.ptx.convert import pack
from saccade.ops.attention.nvidia.gluon.ptx.memory import dynamic_shared_memory, ld_global
from saccade.ops.attention.nvidia.gluon.ptx.mma import (
    column_allreduce_max,
    mma_m16n8k16,
    movmatrix_trans,
)
from saccade.ops.gpu.triton_lang import LOG2E, LOWEST, key_tiles, pdl_begin, split_range

WARP_N = gl.constexpr(16)  # keys of a warp's tile


@gluon.jit
def load_q_fragments(gmem, D: gl.constexpr):
    """B fragments of Q^T: a query row's channels 2t, 2t + 1 of every eight."""
    found = ld_global(gmem, 0, 1)
    for i in gl.static_range(1, D // 8):
        found = found + ld_global(gmem, 16 * i, 1)
    return found


@gluon.jit
def kv_len_of(seqlen_info, b, kv_head, k_len):
    """How many keys a sequence has."""
    if seqlen_info.kv_lens is not None:
        at = b * seqlen_info.kv_lens_batch + kv_head * seqlen_info.kv_lens_head
        k_len = gl.minimum(k_len, gl.load(seqlen_info.kv_lens + at).to(gl.int32))
    return k_len


@gluon.jit
def tile_start(i, num_sinks, first, warp_n, BLOCK_N: gl.constexpr):
    """First key of a warp's tile in step i: sink tiles come first, then those of the window."""
    return gl.where(i < num_sinks, i, i - num_sinks + first) * BLOCK_N + warp_n


@gluon.jit
def load_page(table, k_pos, k_end, PAGE_SIZE: gl.constexpr):
    """Number of the page that holds key `k_pos`; 0 from `k_end` on."""
    page = k_pos
    if PAGE_SIZE != 0:
        page = gl.load(table + k_pos // PAGE_SIZE, mask=k_pos < k_end, other=0)
    return page


@gluon.jit
def issue_kv_copies(smem, k_base, v_base, pages, page, k_pos, row, k_end, D: gl.constexpr,
                    PAGE_SIZE: gl.constexpr, K_STRIDE: gl.constexpr,
                    V_STRIDE: gl.constexpr):  # fmt: skip
    """One group of copies: keys and values from position `k_pos` on, zeros from `k_end` on."""
    if PAGE_SIZE == 0:
        k_gmem = k_base + k_pos.to(gl.int64) * K_STRIDE
        v_gmem = v_base + k_pos.to(gl.int64) * V_STRIDE
    else:
        slot = (k_pos % PAGE_SIZE).to(gl.int64)
        k_gmem = k_base + page.to(gl.int64) * pages.k_page * 2 + slot * K_STRIDE
        v_gmem = v_base + page.to(gl.int64) * pages.v_page * 2 + slot * V_STRIDE
    num_valid = k_end - k_pos - row
    cp_async_rows(smem, k_gmem, num_valid, D, K_STRIDE)
    cp_async_rows(smem + WARP_N * (2 * D), v_gmem, num_valid, D, V_STRIDE)
    cp_async_commit(smem)


@gluon.jit
def mma_qk(keys, q, D: gl.constexpr, DTYPE: gl.constexpr):
    """S^T = K @ Q^T: keys g (two scores) and g + 8 of query rows 2t and 2t + 1."""
    zero = gl.full(q[0].shape, 0.0, gl.float32, q[0].type.layout)
    even = (zero, zero, zero, zero)
    odd = even
    for j in gl.static_range(D // 32):
        even = mma_m16n8k16(keys[2 * j], (q[4 * j], q[4 * j + 1]), even, DTYPE)
        odd = mma_m16n8k16(keys[2 * j + 1], (q[4 * j + 2], q[4 * j + 3]), odd, DTYPE)
    return even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]


@gluon.jit
def mask_score(s, k_pos, q_pos, k_len, mask_args, CAUSAL: gl.constexpr):
    """A score, -inf where its query does not attend to its key."""
    visible = k_pos < k_len
    if CAUSAL:
        visible = visible & (k_pos <= q_pos)
    if mask_args.window is not None:
        near = q_pos - k_pos < mask_args.window
        if mask_args.sinks is not None:
            near = near | (k_pos < mask_args.sinks)
        visible = visible & near
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def online_softmax(s_low, s_high, row_max, scale_log2):
    """(new row_max, rescale factor of old sums, weights of two keys) of a query row."""
    new_max = gl.maximum(row_max, column_allreduce_max(gl.maximum(s_low, s_high)))
    scaled_max = new_max * scale_log2
    return (
        new_max,
        gl.exp2((row_max - new_max) * scale_log2),
        gl.exp2(s_low * scale_log2 - scaled_max),
        gl.exp2(s_high * scale_log2 - scaled_max),
    )


@gluon.jit
def attend_tile(state, keys, values, q, k_pos, q_pos, full, k_len, scale_log2, mask_args,
                D: gl.constexpr, DTYPE: gl.constexpr, CAUSAL: gl.constexpr):  # fmt: skip
    """(row_max, row_sum, O^T) of rows 2t and 2t + 1 after sixteen more keys."""
    m0, m1, l0, l1, acc = state
    s0, s1, s2, s3 = mma_qk(keys, q, D, DTYPE)
    if not full:
        s0 = mask_score(s0, k_pos, q_pos[0], k_len, mask_args, CAUSAL)
        s1 = mask_score(s1, k_pos, q_pos[1], k_len, mask_args, CAUSAL)
        s2 = mask_score(s2, k_pos + 8, q_pos[0], k_len, mask_args, CAUSAL)
        s3 = mask_score(s3, k_pos + 8, q_pos[1], k_len, mask_args, CAUSAL)
    m0, rescale0, s0, s2 = online_softmax(s0, s2, m0, scale_log2)
    m1, rescale1, s1, s3 = online_softmax(s1, s3, m1, scale_log2)
    l0, l1 = l0 * rescale0 + s0 + s2, l1 * rescale1 + s1 + s3
    p = (movmatrix_trans(pack(s0, s1, DTYPE)), movmatrix_trans(pack(s2, s3, DTYPE)))
    new_acc = ()
    for j in gl.static_range(D // 16):
        c0, c1, c2, c3 = acc[j]
        c = (c0 * rescale0, c1 * rescale1, c2 * rescale0, c3 * rescale1)
        new_acc += (mma_m16n8k16(values[j], p, c, DTYPE),)
    return m0, m1, l0, l1, new_acc


@gluon.jit(do_not_specialize=["q_len", "k_len", "q_offset"])
def decode_kernel(
    q, k, v, out, lse, pages, seqlen_info, mask_args, sink_logits, scale,
    q_len, k_len, q_offset, out_split, lse_split,
    KV_HEADS: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, K_STRIDE: gl.constexpr,
    V_STRIDE: gl.constexpr, PAGE_SIZE: gl.constexpr, K_LEN_IS_MAX: gl.constexpr,
    CAUSAL: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """(out, lse) of one split.

    Args:
        K_STRIDE, V_STRIDE: bytes from key to key.  PAGE_SIZE: 0 if keys are dense.
        K_LEN_IS_MAX: the longest sequence has exactly `k_len` keys.
        ROWS: query rows (queries times heads of a group), rounded up to a power of two.
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    DTYPE: gl.constexpr = "bf16" if q.ptr.dtype.element_ty == gl.bfloat16 else "f16"
    BLOCK_N: gl.constexpr = WARP_N * WARPS
    STAGE: gl.constexpr = WARP_N * D * 4  # bytes of keys and values
    M_TILES: gl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    # The range of keys is computed on the host: for all sequences, or (pages) for the longest.
    RANGE_ON_HOST: gl.constexpr = (seqlen_info.q_offsets is None) and (
        (seqlen_info.kv_lens is None)
        or ((PAGE_SIZE != 0) and (mask_args.window is None) and K_LEN_IS_MAX)
    )
    thread = gl.arange(0, 32 * WARPS, layout=L)
    lane, warp_n = thread % 32, thread // 32 * WARP_N
    g, t = lane // 4, lane % 4
    split, splits = gl.program_id(0), gl.num_programs(0)
    b = (gl.program_id(1) // KV_HEADS).to(gl.int64)
    kv_head = gl.program_id(1) % KV_HEADS
    if not RANGE_ON_HOST:
        pdl_begin(True)
        if seqlen_info.q_offsets is not None:
            q_offset = gl.load(seqlen_info.q_offsets + b).to(gl.int32)
        k_len = kv_len_of(seqlen_info, b, kv_head, k_len)

    first_q, last_q = q_offset, q_offset + q_len - 1
    num_sinks, first, full_from, full_to, last = key_tiles(
        first_q, last_q, k_len, mask_args, CAUSAL, BLOCK_N
    )
    begin, end = split_range(split, splits, first, last, num_sinks)

    smem = dynamic_shared_memory(thread, q_len < 0, STAGE * STAGES // 128)
    row, chunk, copy_offset = copy_offsets(lane, D)
    copy_smem = smem + warp_n // WARP_N * (STAGE * STAGES) + copy_offset
    k_offset, v_offset = ldmatrix_offsets(lane, D)
    k_smem = smem + warp_n // WARP_N * (STAGE * STAGES) + k_offset
    v_smem = smem + warp_n // WARP_N * (STAGE * STAGES) + STAGE // 2 + v_offset
    k_base = k.ptr.to(gl.int64) + (b * k.batch + kv_head.to(gl.int64) * k.head) * 2
    v_base = v.ptr.to(gl.int64) + (b * v.batch + kv_head.to(gl.int64) * v.head) * 2
    k_base += row * K_STRIDE + chunk
    v_base += row * V_STRIDE + chunk
    table = pages.table
    if PAGE_SIZE != 0:
        table += b * pages.batch + kv_head * pages.head
    if RANGE_ON_HOST:  # what comes before overlaps with the end of the previous kernel
        pdl_begin(True)

    first_pages = ()
    for i in gl.static_range(STAGES + 2):
        k_pos = tile_start(begin + i, num_sinks, first, warp_n, BLOCK_N)
        k_end = gl.where(begin + i < end, k_len, 0)
        first_pages += (load_page(table, k_pos, k_end, PAGE_SIZE),)
    warp_sync(thread)  # keeps all these loads before the copies, or each would wait for its own
    # Splits share the range of the longest sequence, so pages could be loaded before its length.
    if RANGE_ON_HOST and seqlen_info.kv_lens is not None:
        k_len = kv_len_of(seqlen_info, b, kv_head, k_len)
        end = gl.minimum(end, gl.cdiv(k_len, BLOCK_N))
        full_to = gl.minimum(full_to, k_len // BLOCK_N)
    for i in gl.static_range(STAGES):
        k_pos = tile_start(begin + i, num_sinks, first, warp_n, BLOCK_N)
        k_end = gl.where(begin + i < end, k_len, 0)
        issue_kv_copies(copy_smem + i * STAGE, k_base, v_base, pages, first_pages[i], k_pos, row,
                        k_end, D, PAGE_SIZE, K_STRIDE, V_STRIDE)  # fmt: skip
    page, next_page = first_pages[STAGES], first_pages[STAGES + 1]

    scale_log2 = scale * LOG2E
    zero = gl.full([32 * WARPS], 0.0, gl.float32, L)
    no_output = ((zero, zero, zero, zero),) * (D // 16)
    queries, q_pos, states = (), (), ()
    for c in gl.static_range(M_TILES):
        q_row = gl.minimum(c * BLOCK_M + g, q_len * GROUPS - 1)
        q_at = (q_row % GROUPS + kv_head * GROUPS).to(gl.int64) * q.head
        q_at += (q_row // GROUPS).to(gl.int64) * q.row + b * q.batch
        queries += (load_q_fragments(q.ptr.to(gl.int64) + q_at * 2 + t * 4, D),)
        q_row = c * BLOCK_M + 2 * t
        q_pos += ((q_row // GROUPS + q_offset, (q_row + 1) // GROUPS + q_offset),)
        states += ((zero + LOWEST, zero + LOWEST, zero, zero, no_output),)
    stage = 0  # byte offset of the stage that is read
    for i in range(begin, end):
        cp_async_wait(thread, STAGES - 1)
        keys = load_a_fragments(k_smem + stage, D, False)
        values = load_a_fragments(v_smem + stage, D, True)
        warp_sync(thread)
        ahead = i + STAGES
        k_pos = tile_start(ahead, num_sinks, first, warp_n, BLOCK_N)
        k_end = gl.where(ahead < end, k_len, 0)
        issue_kv_copies(copy_smem + stage, k_base, v_base, pages, page, k_pos, row, k_end, D,
                        PAGE_SIZE, K_STRIDE, V_STRIDE)  # fmt: skip
        k_pos = tile_start(ahead + 2, num_sinks, first, warp_n, BLOCK_N)
        k_end = gl.where(ahead + 2 < end, k_len, 0)
        page, next_page = next_page, load_page(table, k_pos, k_end, PAGE_SIZE)

        tile = i - num_sinks + first
        full = (i >= num_sinks) & (tile >= full_from) & (tile < full_to)
        k_pos = tile_start(i, num_sinks, first, warp_n, BLOCK_N) + g
        new_states = ()
        for c in gl.static_range(M_TILES):
            new_states += (
                attend_tile(states[c], keys, values, queries[c], k_pos, q_pos[c], full, k_len,
                            scale_log2, mask_args, D, DTYPE, CAUSAL),
            )  # fmt: skip
        states = new_states
        stage = gl.where(stage == (STAGES - 1) * STAGE, 0, stage + STAGE)
    cp_async_wait(thread, 0)
    gl.thread_barrier()  # no warp reads its ring any more
    for c in gl.static_range(M_TILES):
        store_warp_partial(smem, states[c], thread, c, D, M_TILES)
    gl.thread_barrier()
    store_output(smem, out, lse, sink_logits, scale_log2, split, out_split, lse_split, b, kv_head,
                 q_len, thread, KV_HEADS, GROUPS, D, WARPS, ROWS)  # fmt: skip
