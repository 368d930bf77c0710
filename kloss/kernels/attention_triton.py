"""Attention within packed sequences, in Triton: forward and backward, each in one launch where no sequence is long.

    S = q kᵀ / √D        P = softmax(S)        out = drop(P) v                   for each sequence and head
    dP = mask c (dout vᵀ)        dS = P (dP - Σ_j P dP)        dq = dS k / √D        dk = dSᵀ q / √D        dv = drop(P)ᵀ dout

A sequence's class follows from its own length: at most 16, 32 or 64 rows, or longer, which `attention_long_triton` has. A program
takes one sequence of a short class and as many of its heads as fill ROWS rows; it has all their out, or their dq, dk and dv.
How many sequences a class has only the device knows, and the lists are as long as they could be. So all classes share the
programs of one launch: a program looks into each list, and few find nothing or more than one sequence. There are no atomics, and
no program adds up what belongs to several sequences. So a sequence's values have the same bits in any batch. Sizes: T rows, S
sequences, H width, D width of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention_long_triton
from .attention_long_triton import kept, load_rows, product, scores, store_rows
from .buckets import CLASSES, AttentionTiles
from .dropout import RowDropout
from .tuned import FUSION, bucket, power_of_two

ROWS = {"half": 64, "single": 32}  # of a program's blocks
WARPS = {"half": 4, "single": 8}
SIZES = ("tiles_0", "tiles_1", "tiles_2", "S", "T")  # of a batch; all have the same kernel


@triton.jit
def entry(tiles_ptr, tiles, i, heads, HEADS: tl.constexpr):
    """What program i does of a class: a sequence's first row and end, 0 and 0 if there is none, and the first of its heads."""
    groups = tl.cdiv(heads, HEADS)
    i_n = i // groups
    if tiles_ptr is None:
        start, end = i * 0, i * 0
    else:
        start = tl.load(tiles_ptr + i_n * 3, mask=i_n < tiles, other=0)
        end = tl.load(tiles_ptr + i_n * 3 + 1, mask=i_n < tiles, other=0)
    return start, end, i % groups * HEADS


@triton.jit
def attend(
    start, end, head, qkv_ptr, dout_ptr, y_ptr, keys_ptr, threshold_ptr, scale_ptr, H, D, heads, factor,
    stride_qkv, stride_dout, stride_y, BL: tl.constexpr, BD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of a sequence of at most BL rows: out, or with dout the gradients of q, k and v."""
    if start < end:
        # Low blocks are multiplied head by head in a batch, a warp for each. Others are one block of all heads, where a query has
        # -inf for the keys of other heads: some versions of Triton would give a batch of two to one half of the warps only.
        BATCH: tl.constexpr = HEADS if BL < 32 else 1
        KEYS: tl.constexpr = HEADS * BL // BATCH
        o_i, o_k, o_d = tl.arange(0, HEADS * BL), tl.arange(0, KEYS), tl.arange(0, BD)
        o_t, i_h = start + o_i % BL, head + o_i // BL  # the sequence's rows once for each head
        m_t, m_k = (o_t < end) & (i_h < heads), (start + o_k % BL < end)[None, :]
        m_d, o_h, first_key = o_d < D, i_h * D, o_i * 0
        if BATCH < HEADS:
            m_k, first_key = m_k & (o_i[:, None] // BL == o_k[None, :] // BL), -(o_i // BL * BL)
        b_q = load_rows(qkv_ptr, o_t, m_t, o_h, o_d, m_d, stride_qkv)  # [HEADS BL, BD]
        b_k = load_rows(qkv_ptr + H, o_t, m_t, o_h, o_d, m_d, stride_qkv)
        b_v = load_rows(qkv_ptr + 2 * H, o_t, m_t, o_h, o_d, m_d, stride_qkv)
        if dout_ptr is not None:
            b_do = load_rows(dout_ptr, o_t, m_t, o_h, o_d, m_d, stride_dout)
        if keys_ptr is not None:
            scale = tl.load(scale_ptr + start)
            mask = kept(keys_ptr, threshold_ptr, o_t, m_t, i_h[:, None], first_key[:, None], KEYS)
        b_s = scores(b_q, b_k, m_k, factor, BATCH)  # [HEADS BL, KEYS]
        b_p = tl.exp(b_s - tl.max(b_s, 1)[:, None])
        total = tl.sum(b_p, 1)[:, None]
        if dout_ptr is None:
            if keys_ptr is not None:
                b_p = tl.where(mask, b_p, 0.0)
            acc = product(b_p.to(b_v.dtype), b_v, False, False, BATCH) / total
            if keys_ptr is not None:
                acc *= scale
            store_rows(y_ptr, o_t, m_t, o_h, o_d, m_d, stride_y, acc)
        else:
            b_p = b_p / total
            b_dp, b_kept = product(b_do, b_v, False, True, BATCH), b_p
            if keys_ptr is not None:
                b_kept, b_dp = tl.where(mask, b_p * scale, 0.0), tl.where(mask, b_dp * scale, 0.0)
            b_ds = (b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None]) * factor).to(b_q.dtype)
            store_rows(y_ptr, o_t, m_t, o_h, o_d, m_d, stride_y, product(b_ds, b_k, False, False, BATCH))
            store_rows(y_ptr + H, o_t, m_t, o_h, o_d, m_d, stride_y, product(b_ds, b_q, True, False, BATCH))
            b_dv = product(b_kept.to(b_do.dtype), b_do, True, False, BATCH)
            store_rows(y_ptr + 2 * H, o_t, m_t, o_h, o_d, m_d, stride_y, b_dv)


@triton.jit
def attend_short(
    tiles_0_ptr, tiles_1_ptr, tiles_2_ptr, tiles_0, tiles_1, tiles_2, cu_seqlens_ptr, S, W, qkv_ptr, dout_ptr, y_ptr, keys_ptr,
    threshold_ptr, scale_ptr, T, H, D, heads, factor, stride_qkv, stride_dout, stride_y,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program's share of every class and of the rows of y [T, W] behind the last sequence, which become 0."""
    i, last = tl.program_id(0), tl.num_programs(0) - 1
    start_0, end_0, head_0 = entry(tiles_0_ptr, tiles_0, i, heads, max(ROWS // B0, 1))
    start_1, end_1, head_1 = entry(tiles_1_ptr, tiles_1, last - i, heads, max(ROWS // B1, 1))
    start_2, end_2, head_2 = entry(tiles_2_ptr, tiles_2, i, heads, max(ROWS // B2, 1))
    first = tl.load(cu_seqlens_ptr + S) + last - i
    attend(
        start_0, end_0, head_0, qkv_ptr, dout_ptr, y_ptr, keys_ptr, threshold_ptr, scale_ptr, H, D, heads, factor,
        stride_qkv, stride_dout, stride_y, B0, BD, max(ROWS // B0, 1),
    )  # fmt: skip
    attend(
        start_1, end_1, head_1, qkv_ptr, dout_ptr, y_ptr, keys_ptr, threshold_ptr, scale_ptr, H, D, heads, factor,
        stride_qkv, stride_dout, stride_y, B1, BD, max(ROWS // B1, 1),
    )  # fmt: skip
    attend(
        start_2, end_2, head_2, qkv_ptr, dout_ptr, y_ptr, keys_ptr, threshold_ptr, scale_ptr, H, D, heads, factor,
        stride_qkv, stride_dout, stride_y, B2, BD, max(ROWS // B2, 1),
    )  # fmt: skip
    for t in range(first, T, last + 1):
        for w in range(0, W, BLOCK):
            o_w = w + tl.arange(0, BLOCK)
            p_y = y_ptr + tl.cast(t, tl.int64) * stride_y + o_w
            tl.store(p_y, tl.zeros((BLOCK,), y_ptr.dtype.element_ty), mask=o_w < W)


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(
    qkv_ptr,  # [T, 3H]
    out_ptr,  # [T, H]
    tiles_0_ptr, tiles_1_ptr, tiles_2_ptr,  # [tiles, 3] or None
    cu_seqlens_ptr,  # [S+1]
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    tiles_0, tiles_1, tiles_2, S, T, H, D, heads, factor, stride_qkv, stride_out,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out of the short classes, and 0 behind the last sequence."""
    attend_short(
        tiles_0_ptr, tiles_1_ptr, tiles_2_ptr, tiles_0, tiles_1, tiles_2, cu_seqlens_ptr, S, H, qkv_ptr, None, out_ptr, keys_ptr,
        threshold_ptr, scale_ptr, T, H, D, heads, factor, stride_qkv, 0, stride_out, B0, B1, B2, BD, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def attend_backward_kernel(
    qkv_ptr,  # [T, 3H]
    dout_ptr,  # [T, H]
    dqkv_ptr,  # [T, 3H]
    tiles_0_ptr, tiles_1_ptr, tiles_2_ptr,  # [tiles, 3] or None
    cu_seqlens_ptr,  # [S+1]
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    tiles_0, tiles_1, tiles_2, S, T, H, D, heads, factor, stride_qkv, stride_dout, stride_dqkv,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of the short classes, and 0 behind the last sequence."""
    attend_short(
        tiles_0_ptr, tiles_1_ptr, tiles_2_ptr, tiles_0, tiles_1, tiles_2, cu_seqlens_ptr, S, 3 * H, qkv_ptr, dout_ptr, dqkv_ptr,
        keys_ptr, threshold_ptr, scale_ptr, T, H, D, heads, factor, stride_qkv, stride_dout, stride_dqkv, B0, B1, B2, BD, ROWS,
        BLOCK,
    )  # fmt: skip


def forward(qkv: Tensor, heads: int, tiles: AttentionTiles, dropout: RowDropout | None) -> tuple[Tensor, Tensor]:
    """out [T, H], and lse fp32 [heads, T], of no rows without long sequences: the short classes' backward needs none."""
    T, H = qkv.shape[0], qkv.shape[1] // 3
    D = H // heads
    out, draws = qkv.new_empty(T, H), _draws(dropout)
    if T:
        grid, lists = short_launch(qkv, heads, tiles)
        attend_kernel[grid](
            qkv_ptr=qkv, out_ptr=out, **lists, **draws, T=T, H=H, D=D, heads=heads, factor=D**-0.5, stride_qkv=qkv.stride(0),
            stride_out=out.stride(0), BD=power_of_two(D),
        )  # fmt: skip
    return out, attention_long_triton.forward(qkv, out, heads, tiles.longer, draws)


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, tiles: AttentionTiles, dropout: RowDropout | None
) -> Tensor:
    """dqkv [T, 3H]."""
    T, H = out.shape
    D = H // heads
    dqkv, draws = torch.empty_like(qkv, memory_format=torch.contiguous_format), _draws(dropout)
    if T:
        grid, lists = short_launch(qkv, heads, tiles)
        attend_backward_kernel[grid](
            qkv_ptr=qkv, dout_ptr=dout, dqkv_ptr=dqkv, **lists, **draws, T=T, H=H, D=D, heads=heads, factor=D**-0.5,
            stride_qkv=qkv.stride(0), stride_dout=dout.stride(0), stride_dqkv=dqkv.stride(0), BD=power_of_two(D),
        )  # fmt: skip
    attention_long_triton.backward(dout, qkv, out, lse, dqkv, heads, tiles.longer, draws)
    return dqkv


def short_launch(qkv: Tensor, heads: int, tiles: AttentionTiles) -> tuple[tuple[int], dict]:
    """Grid and arguments of a launch for the short classes: as many programs as the class that needs most."""
    kind, D = bucket(qkv.dtype), qkv.shape[1] // 3 // heads
    rows, programs, given = ROWS[kind], [min(qkv.shape[0], 64)], {}  # some at least, for rows behind the last sequence
    absent = (rows, tiles.longer[:0])
    classes = [*zip(CLASSES[kind], tiles.short, strict=True), absent, absent][:3]
    for c, (height, entries) in enumerate(classes):
        count = entries.shape[0]
        given |= {f"tiles_{c}_ptr": entries if count else None, f"tiles_{c}": count, f"B{c}": height}
        programs.append(count * triton.cdiv(heads, max(rows // height, 1)))
    warps = 8 if power_of_two(D) > (32 if D % 16 else 64) else WARPS[kind]  # wide and odd heads would not fit the registers
    given |= dict(cu_seqlens_ptr=tiles.cu_seqlens, S=tiles.cu_seqlens.shape[0] - 1, ROWS=rows, BLOCK=1024)
    return (max(programs),), given | dict(num_warps=warps, num_stages=1, **FUSION)


def _draws(dropout: RowDropout | None) -> dict[str, Tensor | None]:
    return dict(zip(("keys_ptr", "threshold_ptr", "scale_ptr"), (None, None, None) if dropout is None else dropout, strict=True))
