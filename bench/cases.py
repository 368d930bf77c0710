"""What is compiled, timed and estimated: the linears of XLM-R, the study's batches, and their work in bytes
and FLOPs.
"""

from typing import NamedTuple

PEAK_FLOPS, PEAK_BYTES = 788e12, 4.3e12  # an H200, measured: bf16 products of random data; a copy, read and written


class Linear(NamedTuple):
    """A linear layer of the model. k, n: inputs, outputs. slices: products fused into one."""

    name: str
    k: int
    n: int
    slices: int = 1


XLMR_BASE = (
    Linear("q, k, v", 768, 2304, 3),
    Linear("attention output", 768, 768),
    Linear("feed-forward up", 768, 3072),
    Linear("feed-forward down", 3072, 768),
)
XLMR_LARGE = (
    Linear("q, k, v", 1024, 3072, 3),
    Linear("attention output", 1024, 1024),
    Linear("feed-forward up", 1024, 4096),
    Linear("feed-forward down", 4096, 1024),
)
WIDTHS = (768, 1024, 2304, 3072, 4096)
RANKS = (8, 16, 32, 64, 128, 256)
STUDY_RANKS = (32, 64, 256)


class Batch(NamedTuple):
    """Rows of a step. adapters of `rows` rows each."""

    adapters: int
    rows: int

    @property
    def total(self) -> int:
        return self.adapters * self.rows


STUDY = Batch(52, 384)
BATCHES = (Batch(1, 19_968), Batch(8, 2496), STUDY, Batch(256, 78), Batch(1024, 19), Batch(1, 384))


class Work(NamedTuple):
    """One kernel's least work: FLOPs, bytes that have to move once, and seconds at the two ceilings."""

    name: str
    flops: float
    bytes: float

    @property
    def seconds(self) -> float:
        return max(self.flops / PEAK_FLOPS, self.bytes / PEAK_BYTES)


def base_work(linear: Linear, rows: int, size: int = 2) -> list[Work]:
    """The frozen base products alone, forward and dx: the floor. size: bytes of an element."""
    flops = 2.0 * rows * linear.k * linear.n
    moved = size * (rows * (linear.k + linear.n) + linear.k * linear.n)
    return [Work("base forward", flops, moved), Work("base dx", flops, moved)]


def lora_work(linear: Linear, batch: Batch, rank: int, size: int = 2) -> list[Work]:
    """The kernels of a fused forward and backward with dropout, each tensor moved once; S and dS are fp32."""
    t, (_, k, n, slices) = batch.total, linear
    columns = slices * rank
    a, b = size * batch.adapters * columns * k, size * batch.adapters * n * rank
    s, x, y, w = 4 * t * columns, size * t * k, size * t * n, size * k * n
    on_a, on_b, base = 2.0 * t * k * columns, 2.0 * t * n * rank, 2.0 * t * k * n
    return [
        Work("S", on_a, x + a + s), Work("y", base + on_b, x + w + s + b + y), Work("dS", on_b, y + b + s),
        Work("dx", base + on_a, y + w + s + a + x), Work("dA", on_a, x + s + a), Work("dB", on_b, y + s + b),
    ]  # fmt: skip
