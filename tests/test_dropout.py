"""Dropout as a function of its keys: the same bits on every path, the right rate, unrelated streams."""

import math

import pytest
import torch
import triton
import triton.language as tl
from helpers import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

from kloss.kernels import Dropout, StepDropout, apply_dropout, dropout_triton, row_keys
from kloss.kernels import dropout as dropout_module
from kloss.kernels.dropout import keep_mask
from kloss.kernels.dropout_device import keep_block, stream_keys, threshold_of

WIDTH = 32


@triton.jit(do_not_specialize=["site"])
def mask_kernel(keep_ptr, scale_ptr, p_ptr, seed_ptr, row_key_ptr, site, first, T, BT: tl.constexpr, BC: tl.constexpr):
    o_t, o_c = tl.arange(0, BT), tl.arange(0, BC)
    threshold, scale = threshold_of(tl.load(p_ptr))
    keys = stream_keys(tl.load(seed_ptr), tl.load(row_key_ptr + o_t, mask=o_t < T, other=0), site)
    keep = keep_block(keys, threshold, first, BC)
    tl.store(keep_ptr + o_t[:, None] * BC + o_c[None, :], keep, mask=(o_t < T)[:, None] & (o_c < BC)[None, :])
    tl.store(scale_ptr, scale)


def device_mask(dropout, first, device):
    rows = dropout.row_key.numel()
    keep = torch.zeros(rows, WIDTH, dtype=torch.bool, device=device)
    scale = torch.zeros(1, device=device)
    p, seed, row_key = (t.to(device) for t in dropout[:3])
    mask_kernel[(1,)](
        keep_ptr=keep, scale_ptr=scale, p_ptr=p, seed_ptr=seed, row_key_ptr=row_key, site=dropout.site, first=first,
        T=rows, BT=16, BC=WIDTH,
    )  # fmt: skip
    return keep.cpu(), scale.cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_device_bits_equal_the_reference(device):
    generator = torch.Generator().manual_seed(1)
    for trial in range(40):
        keys = torch.randint(-(1 << 63), (1 << 63) - 1, (13,), generator=generator)
        p = [0.0, 0.5, 0.1, 0.99999, 2.5 / 65536, 3.5 / 65536, 65535.5 / 65536][trial % 7]
        seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), generator=generator)
        site, first = [0, 1, 71, 1 << 30][trial % 4], [0, 64, 3072, 1 << 16][trial % 4]
        dropout = Dropout(torch.tensor([p]), seed, keys, site)
        wanted, scale = keep_mask(dropout, torch.arange(first, first + WIDTH, dtype=torch.int32))
        got, got_scale = device_mask(dropout, first, device)
        assert torch.equal(got, wanted)
        torch.testing.assert_close(got_scale[0], scale[0], rtol=2e-7, atol=0)


def stream(rows=4096, features=256, **changes):
    """The mask [rows, features] of a stream at p = 0.5; `changes` are to its keys."""
    keys = dict(p=torch.tensor([0.5]), seed=torch.tensor([11]), row_key=(5 << 32) + torch.arange(rows), site=4)
    return keep_mask(Dropout(**{**keys, **changes}), torch.arange(features, dtype=torch.int32))[0]


def z_score(agreeing, count):
    return (agreeing - count / 2) / math.sqrt(count / 4)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate(p):
    mask = stream(p=torch.tensor([p]))
    chance, count = 1 - round(p * 65536) / 65536, mask.numel()
    assert abs(mask.sum().item() - count * chance) < 5 * math.sqrt(count * chance * (1 - chance))
    for axis, size in ((0, mask.shape[0]), (1, mask.shape[1])):
        spread = (mask.double().mean(axis) - chance).square().mean().item() * size / (chance * (1 - chance))
        assert 0.8 < spread < 1.2, "rates by row and by feature scatter as independent draws do"


STREAMS = {
    "sites": {"site": 5},
    "steps": {"row_key": (6 << 32) + torch.arange(4096)},
    "sequences": {"row_key": (5 << 32) + (1 << 16) + torch.arange(4096)},
    "learners": {"seed": torch.tensor([12])},
    "far learners": {"seed": torch.tensor([11 + (1 << 32)])},
    "positions": {"row_key": (5 << 32) + 1 + torch.arange(4096)},
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_independent(name):
    """Two masks agree as coin tosses do, also when one is shifted by up to two features or rows."""
    one, other = stream(), stream(**STREAMS[name])
    for shift in range(-2, 3):
        shifted = other.roll(shift, 1)
        assert abs(z_score((one == shifted).sum().item(), one.numel())) < 5
    if name != "positions":
        assert abs(z_score((one == other.roll(1, 0)).sum().item(), one.numel())) < 5
    else:
        assert torch.equal(one[1:], other[:-1]), "a row key is a row key"


def test_neighbouring_elements_are_independent():
    mask = stream()
    for rows, features in ((0, 1), (0, 2), (1, 0), (1, 1), (16, 0)):
        moved = mask.roll((rows, features), (0, 1))
        assert abs(z_score((mask == moved).sum().item(), mask.numel())) < 5


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=6), st.integers(0, 4), st.data())
def test_row_keys_are_step_sequence_position(lengths, behind, data):
    step = data.draw(st.lists(st.integers(0, (1 << 31) - 1), min_size=len(lengths), max_size=len(lengths)))
    number = data.draw(st.lists(st.integers(0, (1 << 16) - 1), min_size=len(lengths), max_size=len(lengths)))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    wanted = [s << 32 | i << 16 | t for s, i, n in zip(step, number, lengths, strict=True) for t in range(n)]
    arguments = torch.tensor(step, dtype=torch.int64), torch.tensor(number, dtype=torch.int64), cu_seqlens
    assert row_keys(*arguments).tolist() == wanted
    assert row_keys(*arguments, rows=len(wanted) + behind).tolist() == wanted + [0] * behind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kept_elements_keep_their_mean(dtype):
    """The scale is not rounded to x's dtype: 1 / (1 - 0.1) in bf16 is 0.16 % too small."""
    x = torch.rand(512, 256, generator=torch.Generator().manual_seed(0)).add(0.5).to(dtype)
    dropout = Dropout(torch.tensor([0.1]), torch.tensor([1]), torch.arange(512), 2)
    dropped, kept = apply_dropout(x, dropout), keep_mask(dropout, torch.arange(256, dtype=torch.int32))[0]
    assert dropped.dtype == dtype
    mean = dropped[kept].double().sum() / x[kept].double().sum()
    assert abs(mean * (1 - round(0.1 * 65536) / 65536) - 1) < 1e-4


def test_keys_of_some_rows_are_those_rows():
    chance, seed = torch.tensor([0.3, 0.6]), torch.tensor([4, 9])
    adapter, row_key = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32), torch.arange(5) * 65536 + 3
    ahead = StepDropout(chance, None, None, seed, row_key, adapter, 4).at("hidden", 2)
    features, index = torch.arange(64, dtype=torch.int32), torch.tensor([3, 0, 3, 2])
    for keys in (Dropout(chance, seed, row_key, 2, adapter), ahead):
        for some in (index, slice(1, 4)):
            for part, whole in zip(keep_mask(keys.take(some), features), keep_mask(keys, features), strict=True):
                assert torch.equal(part, whole[some])
        assert keys.first(5) is keys and torch.equal(keys.first(2).row_key, row_key[:2])


def test_all_sites_at_once_are_the_sites_one_by_one():
    chance, seed = torch.tensor([0.3, 0.6]), torch.tensor([4, 9])
    adapter, row_key = torch.tensor([0, 1, -1, 1], dtype=torch.int32), torch.arange(4) * 65536 + 3
    step = StepDropout(chance, None, chance / 2, seed, row_key, adapter, 7)
    assert step.at("attention", 1) is None
    x = torch.rand(4, 33)
    for kind, p in (("hidden", chance), ("lora", chance / 2)):
        for site in (0, 3, 6):
            assert torch.equal(apply_dropout(x, step.at(kind, site)), apply_dropout(x, Dropout(p, seed, row_key, site, adapter)))


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_of_the_rows_have_the_bits_of_torch(device, monkeypatch):
    """Keys of every kind of seed, key and site; the limits of every threshold. Adapters out of range count as none."""
    generator = torch.Generator().manual_seed(2)
    seed, row_key = (torch.randint(-(1 << 63), (1 << 63) - 1, (n,), generator=generator) for n in (3, 300))
    adapter = torch.randint(-1, 3, (300,), generator=generator, dtype=torch.int32)
    p = torch.arange(65536, dtype=torch.float32) / 65536
    ids = torch.cat([torch.arange(65536), torch.tensor([-1])]).int()
    with monkeypatch.context() as patch:
        patch.setattr(dropout_module, "built", lambda: False)
        wanted = [dropout_module._site_keys(seed, row_key, owner, 7, 5) for owner in (adapter, None)]
        limits = [dropout_module._row_limits(p[5:], None, 4), dropout_module._row_limits(p, ids, 65537)]
    seed, row_key, adapter, p, ids = (t.to(device) for t in (seed, row_key, adapter, p, ids))
    for owner, keys in zip((adapter, None), wanted, strict=True):
        assert torch.equal(dropout_triton.keys(seed, row_key, owner, 7, 5).cpu(), keys)
    got = [dropout_triton.limits(p[5:].clone(), None, 4), dropout_triton.limits(p, ids, 65537)]
    for pair, right in zip(got, limits, strict=True):
        assert all(torch.equal(one.cpu(), other) for one, other in zip(pair, right, strict=True))
    beyond = adapter.clamp(min=0) + 3
    assert torch.equal(dropout_triton.keys(seed, row_key, beyond, 7, 5), dropout_triton.keys(seed, row_key, None, 7, 5))
    assert not (dropout_triton.limits(p[:3].clone(), beyond, 300)[1] - 1).any()


def test_dropped_elements_are_zero_whatever_they_held():
    x = torch.full((40, 7), float("nan"))
    dropout = Dropout(torch.tensor([0.5]), torch.tensor([1]), torch.arange(40), 2)
    dropped = apply_dropout(x, dropout)
    keep, _ = keep_mask(dropout, torch.arange(8, dtype=torch.int32))
    assert torch.equal(dropped.isnan(), keep[:, :7]) and not dropped[~keep[:, :7]].any()
