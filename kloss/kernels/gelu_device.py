"""GELU for use inside Triton kernels. ASM: whether they may hold assembly, which Triton's interpreter does not know, nor its
pipeliner for sm_100 where it must not be computed twice."""

import triton
import triton.language as tl


@triton.jit
def exp2(x, ASM: tl.constexpr):
    """2^x of fp32 x; with ASM one instruction, which takes x that are no normal numbers for 0."""
    if ASM:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.exp2(x)


@triton.jit
def reciprocal(x, ASM: tl.constexpr):
    """1 / x of fp32 x; with ASM likewise."""
    if ASM:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def once(x, ASM: tl.constexpr):
    """x. With ASM the compiler does not compute x of 16 bits in two layouts, one to store it and one to multiply it."""
    if ASM and x.dtype != tl.float32:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def normal(x, ASM: tl.constexpr):
    """Φ(x) and φ(x) of x, in fp32; of x of 16 bits by a fit whose relative error is at most 2e-5, down to Φ(-9).

    Φ(-x) = exp(-x²/2) R(1 / (1 + 0.37 x)), R fitted by us: of degree 5, its largest relative error on 0..9 made small.
    """
    wide = x.to(tl.float32)
    if x.dtype == tl.float32:
        below, bell = 0.5 * tl.erf(wide * 0.7071067811865476) + 0.5, tl.exp(wide * wide * -0.5)
    else:
        t, bell = reciprocal(1.0 + 0.37 * tl.abs(wide), ASM), exp2(wide * wide * -0.7213475204444817, ASM)
        fit = 0.15906456 + t * (0.07109824 + t * (0.21613019 + t * -0.09302734))
        tail = bell * t * (0.14672505 + t * fit)
        below = tl.where(wide < 0, tail, 1.0 - tail)
    return below, bell * 0.3989422804014327
