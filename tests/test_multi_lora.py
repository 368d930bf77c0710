"""The multi-adapter linear's Triton kernels against the reference: values, every gradient, and isolation to the bit."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from helpers import (
    DEVICES,
    PLACES,
    assert_as_good,
    assert_company_does_not_matter,
    assert_each_adapter_is_alone,
    batches,
    on_cpu,
    outputs,
    problem,
)
from hypothesis import given, settings

import kloss.kernels as kernels
from kloss.kernels import Dropout, lora_triton, make_segments, multi_lora_cpu, segments, tuned
from kloss.kernels.dropout import keep_mask
from kloss.kernels.lora_torch import row_linear

multi_lora_linear = partial(kernels.multi_lora_linear, backend="triton")

CASES = {
    "odd": dict(lengths=[5, 0, 1, 70, 3], adapter=[2, 1, 0, 2, -1], adapters=4, k=41, n=23, rank=8, behind=3),
    "one adapter": dict(lengths=[9, 60], adapter=[0, 0], adapters=1, k=17, n=5, rank=1, bias=False),
    "mixed ranks": dict(
        lengths=[3, 4, 67, 2, 9],
        adapter=[3, 1, 2, 0, 1],
        adapters=4,
        k=32,
        n=3 * 20,
        rank=64,
        slices=3,
        ranks=[1, 64, 17, 8],
    ),
    "several column blocks": dict(lengths=[3, 9], adapter=[1, 0], adapters=2, k=140, n=150, rank=8),
    "nobody": dict(lengths=[4, 0], adapter=[-1, 1], adapters=2, k=16, n=16, rank=17),
}
MANY = dict(lengths=[1, 0, 2] * 6, adapter=[i * 37 % 130 for i in range(18)], adapters=130, k=24, n=12, rank=17)
LONG = dict(lengths=[1500, 90, 1100], adapter=[1, 0, 1], adapters=3, k=12, n=8, rank=3)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("exact", [False, True], ids=["vendor", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, exact, p, device, dtype):
    assert_as_good(multi_lora_linear, problem(**CASES[name], p=p, dtype=dtype, device=device), exact=exact)


@pytest.mark.parametrize(("device", "dtype"), PLACES[:1] + PLACES[2:])
@pytest.mark.parametrize("shape", [MANY, LONG], ids=["130 adapters", "several chunks"])
def test_many_adapters_and_long_ones(shape, device, dtype):
    assert_as_good(multi_lora_linear, problem(**shape, p=0.5, dtype=dtype, device=device), exact=True)


def test_the_base_product_lands_on_the_lora_term():
    """The vendor's product accumulates on small terms: its result is as close to fp64 as the fused kernel's, in y and in dx.

    Added to the rounded base product instead, the LoRA term would be rounded with it, and the error 1.4 times as large. So it is
    on an H100 all the same: there the vendor's library rounds the product first.
    """
    case = problem([60, 9], [0, 1], adapters=2, k=96, n=96, dtype=torch.float16)
    case.lora_b.mul_(0.05)
    case.bias.mul_(0.05)
    oracle = outputs(kernels.reference.multi_lora_linear, on_cpu(case), torch.float64)
    got = [outputs(multi_lora_linear, case, exact=exact) for exact in (False, True)]
    for name in ("y", "x"):
        vendor, fused = ((values[name].cpu().double() - oracle[name]).norm() for values in got)
        assert vendor < 1.1 * fused, name


@pytest.mark.parametrize("backend", ["torch", "csrc"])
def test_threads_change_no_bit_of_an_exact_layer(backend):
    """torch's products in fp32 sum in other orders on more threads; with few rows on two already, with any on four."""
    case, before = problem([6, 50, 11], [0, 1, 2], adapters=3, k=96, n=96, p=0.5), torch.get_num_threads()
    if backend == "csrc" and not multi_lora_cpu.fits(case.x, case.weight, 1):
        pytest.skip("not built")
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(outputs(kernels.multi_lora_linear, case, grads=("x", "lora_a", "lora_b"), exact=True, backend=backend))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name in ("y", "x", "lora_a", "lora_b"):
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("span", [1, 2, 4, 16])
def test_chunks_that_one_program_adds(span, device, monkeypatch):
    """An adapter with 10 chunks, one with 3, one without rows; whoever has at most `span` needs no workspace."""
    monkeypatch.setattr(segments, "CHUNK", 32)
    monkeypatch.setattr(tuned, "span", lambda rank: span)
    case = problem([200, 20, 70, 90], [1, 0, 1, 2], adapters=4, k=16, n=16, p=0.5, device=device)
    assert_as_good(multi_lora_linear, case, exact=True)


@pytest.mark.parametrize("device", DEVICES)
def test_ds_is_scaled_before_it_is_rounded(device):
    """dy B is 96,000, more than fp16 holds; times scaling it is 960."""
    case = problem([5], [0], adapters=1, rank=8, dtype=torch.float16, device=device)
    case.dy.fill_(2000)
    case.lora_b.fill_(2)
    case.scaling.fill_(0.01)
    got = outputs(multi_lora_linear, case, grads=("x", "lora_a"), exact=True)
    wanted = outputs(kernels.reference.multi_lora_linear, on_cpu(case), torch.float64, grads=("x", "lora_a"))
    torch.testing.assert_close(got["lora_a"].cpu().double(), wanted["lora_a"], rtol=2e-3, atol=0.5)
    assert got["x"].isfinite().all()


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Triton launches on the current device, which need not be the one that has the tensors."""
    current, launched = [], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def record(launch, x, *rest, **more):
        launched.append(current == [x.device])
        return launch(x, *rest, **more)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("shrink", "expand", "reduce"):
        monkeypatch.setattr(lora_triton, name, partial(record, getattr(lora_triton, name)))
    outputs(multi_lora_linear, problem([5], [0], adapters=1))
    assert launched == [True] * 6


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs_and_gradients(device):
    case = problem(**CASES["odd"], p=0.5, device=device)
    g, (a, b) = 4, (case.lora_a[0].numel(), case.lora_b[0].numel())
    bank = torch.full((g, a + b + 3), float("nan"), device=device)
    views = bank[:, :a].view(g, -1, 41), bank[:, a : a + b].view(g, 23, -1)
    for view, values in zip(views, (case.lora_a, case.lora_b), strict=True):
        view.copy_(values)
    wide = torch.full((case.x.shape[0], 82), float("nan"), device=device)
    wide[:, ::2] = case.x
    strided = case._replace(
        x=wide[:, ::2], weight=case.weight.t().contiguous().t(), lora_a=views[0], lora_b=views[1],
        dy=case.dy.t().contiguous().t(),
    )  # fmt: skip
    assert not strided.lora_a.is_contiguous() and not strided.x.is_contiguous() and not strided.dy.is_contiguous()
    for exact in (False, True):
        plain, got = (outputs(multi_lora_linear, one, exact=exact) for one in (case, strided))
        assert all(torch.equal(plain[name], got[name]) for name in ("lora_a", "lora_b"))
        torch.testing.assert_close(got, plain)
    expanded = case._replace(dy=torch.ones((), device=device).expand(case.dy.shape))
    torch.testing.assert_close(
        outputs(multi_lora_linear, expanded), outputs(multi_lora_linear, case._replace(dy=expanded.dy.contiguous()))
    )


@pytest.mark.parametrize("device", DEVICES)
def test_addresses_past_2_to_the_31(tmp_path, device):
    """The bank's rows lie 2^30 elements apart, so row 2 is past what 32 bits reach; the file behind them is sparse."""
    case = problem([3, 4], [2, 0], adapters=3, k=16, n=16, dtype=torch.float16, device=device)
    far, size = (1 << 30) + 64, case.lora_a[0].numel()
    if device == "cpu":
        memory = torch.from_file(str(tmp_path / "bank"), shared=True, size=2 * (far + size), dtype=torch.float16)
    else:
        memory = torch.empty(2 * (far + size), dtype=torch.float16, device=device)
    views = []
    for start, values in ((0, case.lora_a), (size, case.lora_b)):
        view = memory.as_strided(values.shape, (far, values.stride(1), 1), start)
        view.copy_(values)
        views.append(view)
    got = outputs(multi_lora_linear, case._replace(lora_a=views[0], lora_b=views[1]), grads=("x",), exact=True)
    plain = outputs(multi_lora_linear, case, grads=("x",), exact=True)
    assert all(torch.equal(got[name], plain[name]) for name in plain)


@pytest.mark.parametrize("device", DEVICES)
def test_fp32_masters_beside_half_activations(device):
    case = problem(**CASES["odd"], p=0.5, dtype=torch.float16, device=device)
    masters = case._replace(lora_a=case.lora_a.float(), lora_b=case.lora_b.float())
    half, full = outputs(multi_lora_linear, case), outputs(multi_lora_linear, masters)
    assert full["lora_a"].dtype == full["lora_b"].dtype == torch.float32
    assert torch.equal(full["y"], half["y"]) and torch.equal(full["x"], half["x"])
    assert torch.equal(full["lora_a"].half(), half["lora_a"]) and torch.equal(full["lora_b"].half(), half["lora_b"])


@pytest.mark.parametrize("device", DEVICES)
def test_absent_adapters_and_rank_tails_get_zeros(device):
    """The tails and the absent adapters hold NaN, to show that nothing reads them."""
    shape = dict(adapters=4, k=20, n=18, rank=64, slices=3, ranks=[3, 64, 17, 64])
    case = problem([9, 66], [2, 0], **shape, p=0.5, device=device)
    tail = torch.arange(64, device=device) >= case.keywords["ranks"][:, None]
    tail[[1, 3]] = True
    lora_a = case.lora_a.unflatten(1, (3, 64)).masked_fill(tail[:, None, :, None], float("nan")).flatten(1, 2)
    lora_b = case.lora_b.masked_fill(tail[:, None, :], float("nan"))
    scaling = case.scaling.clone()
    scaling[[1, 3]] = float("nan")
    got = outputs(multi_lora_linear, case._replace(lora_a=lora_a, lora_b=lora_b, scaling=scaling), exact=True)
    assert all(values.isfinite().all() for values in got.values())
    assert not got["lora_a"].unflatten(1, (3, 64)).masked_select(tail[:, None, :, None]).count_nonzero()
    assert not got["lora_b"].masked_select(tail[:, None, :]).count_nonzero()
    clean = outputs(multi_lora_linear, case, exact=True)
    assert all(torch.equal(got[name], clean[name]) for name in clean)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_alone_together_shuffled_and_beside_nan_to_the_bit(device, dtype):
    assert_company_does_not_matter(multi_lora_linear, k=27, n=24, rank=8, dtype=dtype, device=device)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=12, deadline=None)
@given(shape=batches(k=[1, 20, 33], n=[1, 18, 70]))
def test_any_batch_is_each_adapter_alone(device, shape):
    assert_each_adapter_is_alone(multi_lora_linear, problem(**shape, device=device))


@pytest.mark.parametrize(("k", "n"), [(312, 100), (100, 312), (40, 20)])
def test_a_neighbours_nan_stays_its_own_in_bf16_of_any_width(k, n):
    """On a CPU with AMX torch's products of odd widths read beyond a row. Rows of both adapters alternate."""
    lengths = [1] * 40
    case = problem(lengths, [0, 1] * 20, adapters=2, k=k, n=n, rank=4, dtype=torch.bfloat16)
    case.x[1::2] = case.dy[1::2] = torch.nan
    got = outputs(partial(multi_lora_linear, backend="torch"), case, grads=("x", "lora_a", "lora_b"))
    for name in ("y", "x"):
        assert got[name][::2].isfinite().all() and got[name][1::2].isnan().all(), name
    assert all(got[name][0].isfinite().all() for name in ("lora_a", "lora_b"))


@pytest.mark.parametrize("width", [312, 100, 40])
def test_rows_of_a_linear_without_adapters_do_not_meet_either(width):
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight, bias = torch.randn(width + 4, width).bfloat16(), torch.randn(width + 4).bfloat16()
    x[1::2] = torch.nan
    y = row_linear(x.requires_grad_(), weight, bias, backward=True)
    torch.testing.assert_close(y[::2], F.linear(x[::2].clone(), weight, bias), rtol=0.02, atol=0.02)
    dy = torch.ones_like(y)
    dy[1::2] = torch.nan
    y.backward(dy)
    assert x.grad[::2].isfinite().all() and x.grad[1::2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scaling_of_zero_is_no_term_at_all(dtype):
    """torch leaves 16-bit results of alpha 0 as the memory was."""
    case = problem([30, 40], [0, 1], adapters=2, k=100, n=400, rank=4, dtype=dtype)
    off = case._replace(scaling=torch.tensor([1.0, 0.0]))
    got = outputs(partial(multi_lora_linear, backend="torch"), off, grads=("x", "lora_a", "lora_b"))
    rows = case.group == 1
    torch.testing.assert_close(got["y"][rows], F.linear(case.x, case.weight, case.bias)[rows], rtol=0.02, atol=0.02)
    assert not got["lora_a"][1].any() and not got["lora_b"][1].any() and got["lora_b"][0].any()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_smaller_ranks_beside_it_change_no_bit_of_an_adapter_of_the_largest(device, dtype, exact):
    """A bank tells kernels of ranks only where some are smaller."""
    mixed = problem([70, 30], [0, 1], adapters=2, k=40, n=24, rank=32, ranks=[32, 8], p=0.5, dtype=dtype, device=device)
    alike = mixed._replace(keywords=mixed.keywords | {"ranks": None})
    beside, among = (outputs(multi_lora_linear, case, exact=exact) for case in (mixed, alike))
    rows = mixed.group == 0
    assert all(torch.equal(beside[name][rows], among[name][rows]) for name in ("y", "x"))
    assert all(torch.equal(beside[name][0], among[name][0]) for name in ("lora_a", "lora_b"))


@pytest.mark.parametrize("device", DEVICES)
def test_rank_tails_are_skipped_not_computed(device):
    """S is 0 up to the next 16 ranks, which are loaded with the others. Behind them the poison of fresh memory is still there."""
    case = problem([9, 66], [1, 0], adapters=2, k=20, n=18, rank=64, slices=3, ranks=[3, 64], device=device)
    _, s, _ = torch.ops.kloss.multi_lora(*operator_arguments(case, exact=True))
    rank = case.keywords["ranks"][case.segments.row_adapter[case.segments.order].long()]
    written = torch.arange(64, device=device) < (rank[:, None] + 15) // 16 * 16
    assert torch.equal(s.unflatten(1, (3, 64)).isfinite(), written[:, None, :].expand(-1, 3, -1))
    dead = torch.arange(64, device=device) >= rank[:, None]
    assert not s.unflatten(1, (3, 64)).masked_select((written & dead)[:, None, :]).count_nonzero()


@pytest.mark.parametrize("device", DEVICES)
def test_dropped_elements_are_selected_away(device):
    """A dropped element may hold anything: NaN in x does not reach S, NaN in A does not reach its dx."""
    case = problem([70], [0], adapters=1, k=20, p=0.5, device=device)
    dropout = Dropout(*(t.cpu() if torch.is_tensor(t) else t for t in case.keywords["dropout"]))
    keep = keep_mask(dropout, torch.arange(20, dtype=torch.int32), torch.zeros(70, dtype=torch.int32))[0].to(device)
    case.x.masked_fill_(~keep, float("nan"))
    _, s, _ = torch.ops.kloss.multi_lora(*operator_arguments(case))
    got = outputs(multi_lora_linear, case, grads=("lora_a",))
    assert s.isfinite().all() and got["lora_a"].isfinite().all()
    case.lora_a[:, :, 7] = float("nan")
    dx = outputs(multi_lora_linear, case, grads=("x",))["x"]
    assert torch.equal(dx[:, 7].isnan(), keep[:, 7]) and dx[:, :7].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_rank_of_the_bank_does_not_reach_a_smaller_adapter(device):
    """An adapter of rank 8 in a bank of rank 16 gives the bits of the same adapter in a bank of rank 8."""
    small = problem([30, 5], [0, 1], adapters=2, rank=8, device=device)
    lora_a, lora_b = torch.randn(2, 16, 20, device=device), torch.randn(2, 24, 16, device=device)
    lora_a[:, :8], lora_b[:, :, :8] = small.lora_a, small.lora_b
    ranks = {"ranks": torch.tensor([8, 8], device=device)}
    big = small._replace(lora_a=lora_a, lora_b=lora_b, keywords={**small.keywords, **ranks})
    one, other = (outputs(multi_lora_linear, case, exact=True) for case in (small, big))
    assert torch.equal(one["y"], other["y"]) and torch.equal(one["x"], other["x"])
    assert torch.equal(one["lora_a"], other["lora_a"][:, :8]) and torch.equal(one["lora_b"], other["lora_b"][:, :, :8])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_behind_the_last_offset_get_the_base_value(device):
    case = problem([5, 3], [0, 1], adapters=2, behind=4, device=device)
    padded = make_segments(case.segments.cu_seqlens, case.segments.adapter, 2, rows=12)
    base = torch.nn.functional.linear(case.x, case.weight, case.bias)
    for part in (case.segments, padded):
        for exact in (False, True):
            got = outputs(multi_lora_linear, case._replace(segments=part), exact=exact)
            torch.testing.assert_close(got["y"][8:], base[8:])
            torch.testing.assert_close(got["x"][8:], case.dy[8:] @ case.weight)
    case.x[8:] = float("nan")
    got = outputs(multi_lora_linear, case._replace(segments=padded), grads=("x", "lora_a", "lora_b"), exact=True)
    assert all(got[name].isfinite().all() for name in ("lora_a", "lora_b")) and got["y"][:8].isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "csrc", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_written_where_one_says(device, dtype, backend):
    """The same bits as without, over whatever was there, nothing beside it, and none for autograd."""
    if backend == "csrc" and (device != "cpu" or not multi_lora_cpu.built()):
        pytest.skip("not built, or not for this device")
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's products in bf16 are wrong")
    rows = [2 * segments.CHUNK + 3, 5] if backend == "triton" else [300, 5]  # on a GPU in several chunks, which are added up
    case = problem(rows, [2, 0], adapters=3, k=32, n=96, slices=3, ranks=[8, 3, 5], p=0.5, device=device, dtype=dtype)
    plain = outputs(multi_lora_linear, case, backend=backend)
    sizes = case.lora_a[0].numel(), case.lora_b[0].numel()
    bank = torch.full((3, sum(sizes) + 40), float("nan"), device=device, dtype=dtype)
    into = bank[:, : sizes[0]].view_as(case.lora_a), bank[:, sizes[0] + 32 : -8].view_as(case.lora_b)
    got = outputs(multi_lora_linear, case, backend=backend, into=into)
    assert not got["lora_a"].any() and not got["lora_b"].any()
    assert torch.equal(got["y"], plain["y"]) and torch.equal(got["x"], plain["x"])
    assert torch.equal(into[0], plain["lora_a"]) and torch.equal(into[1], plain["lora_b"])
    assert bank[:, sizes[0] : sizes[0] + 32].isnan().all() and bank[:, -8:].isnan().all()
    transposed = torch.empty_like(case.lora_b).transpose(1, 2).contiguous().transpose(1, 2)  # no kernel writes it as it lies
    outputs(multi_lora_linear, case, backend=backend, into=(into[0], transposed))
    assert torch.equal(transposed, plain["lora_b"])


@pytest.mark.parametrize("device", DEVICES)
def test_any_subset_may_require_gradients(device):
    case = problem([5, 30], [1, 0], adapters=2, p=0.5, device=device)
    full = outputs(multi_lora_linear, case)
    for subset in ((), ("x",), ("lora_a",), ("lora_b",), ("weight",), ("bias",), ("x", "lora_b"), ("lora_a", "weight")):
        got = outputs(multi_lora_linear, case, grads=subset)
        assert got.keys() == {"y", *subset}
        assert all(torch.equal(got[name], full[name]) for name in got)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_runs_in_the_asked_dtype(device):
    case = problem([5, 30], [1, 0], adapters=2, device=device)
    half = problem([5, 30], [1, 0], adapters=2, dtype=torch.float16, device=device)
    with torch.autocast(device, dtype=torch.float16):
        got = outputs(multi_lora_linear, case, exact=True)
    assert got["y"].dtype == torch.float16 and got["x"].dtype == got["lora_a"].dtype == torch.float32
    assert torch.equal(got["y"], outputs(multi_lora_linear, half, exact=True)["y"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [20, 32], ids=["torch", "csrc"])
def test_one_adapter_is_the_plain_lora_linear(width, device):
    case = problem([20], [0], adapters=1, k=width, n=width, device=device)
    wanted = outputs(kernels.multi_lora_linear, case)["y"]
    arguments = case.x, case.weight, case.bias, case.lora_a[0], case.lora_b[0]
    assert torch.equal(kernels.lora_linear(*arguments, float(case.scaling[0])), wanted)
    assert torch.equal(kernels.lora_linear(*arguments, case.scaling), wanted)
    assert torch.equal(kernels.lora_linear(*arguments, 2), kernels.lora_linear(*arguments, 2.0)), "any number"


def test_the_kernel_draws_the_mask_of_the_reference():
    """With A = 1 in one feature at a time, S shows which elements were kept, across K's blocks."""
    k, rows = 70, 9
    row_key = torch.arange(rows) * 65536 + 11
    dropout = Dropout(torch.tensor([0.3, 0.5]), torch.tensor([-5, 1 << 40]), row_key, 7)
    part = make_segments(torch.tensor([0, 4, 9], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32), 2)
    eye = torch.eye(k).expand(2, k, k)
    seen = multi_lora_linear(
        torch.ones(rows, k), torch.zeros(k, k), None, eye, eye.contiguous(), torch.ones(2), part, dropout=dropout
    )
    keep, scale = keep_mask(dropout, torch.arange(k, dtype=torch.int32), part.row_adapter)
    assert torch.equal(seen != 0, keep)
    torch.testing.assert_close(seen, torch.where(keep, scale[:, None], 0.0))


def operator_arguments(case, exact=False):
    """Arguments of the operator as the public function gives them to Triton."""
    lists, dropout = [case.segments.order, *segments.with_work(case.segments).work], case.keywords.get("dropout")
    site = 0 if dropout is None else dropout.site
    if dropout is not None:
        lists += dropout.p, dropout.seed, dropout.row_key
    tensors = case.x, case.weight, case.bias, case.lora_a, case.lora_b, case.scaling
    return *tensors, case.keywords["ranks"], lists, site, case.keywords["slices"], exact, None, None, "triton"


@pytest.mark.parametrize("backend", ["triton", "csrc", "torch"])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device, backend, monkeypatch):
    if backend == "csrc" and (device != "cpu" or not multi_lora_cpu.built()):
        pytest.skip("not built, or not for this device")
    given, ops = {}, {name: getattr(torch.ops.kloss, name) for name in ("multi_lora", "multi_lora_backward")}

    def spy(name, *args):
        given[name] = torch.utils._pytree.tree_map(lambda value: value.detach() if torch.is_tensor(value) else value, args)
        return ops[name](*args)

    case = problem([3, 4], [1, 0], adapters=2, k=32, n=96, slices=3, ranks=[8, 8], p=0.5, device=device)
    with monkeypatch.context() as patch:
        for name in ops:  # what the public function and its gradient call
            patch.setattr(torch.ops.kloss, name, partial(spy, name))
        outputs(kernels.multi_lora_linear, case, backend=backend)
    forward, backward = given["multi_lora"], given["multi_lora_backward"]
    assert forward[-1] == backend
    for i in (0, 1, 3, 4):
        forward[i].requires_grad_()
    torch.library.opcheck(ops["multi_lora"], forward)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(ops["multi_lora_backward"], (*backward[:-6], *needs, None, None, backend))
    written = torch.empty_like(backward[3]), torch.empty_like(backward[4])
    torch.library.opcheck(ops["multi_lora_backward"], (*backward[:-6], True, True, True, *written, backend))


@pytest.mark.parametrize("backend", ["triton", "csrc", "torch"])
@pytest.mark.parametrize("device", DEVICES)
def test_fullgraph_forward_and_backward_at_two_lengths(device, backend):
    if backend == "csrc" and (device != "cpu" or not multi_lora_cpu.built()):
        pytest.skip("not built, or not for this device")
    multi_lora_linear = partial(kernels.multi_lora_linear, backend=backend)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager" if device == "cpu" else "inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def layer(*arguments, **keywords):
        return multi_lora_linear(*arguments, **keywords) * 2

    def eager(*arguments, **keywords):
        return multi_lora_linear(*arguments, **keywords) * 2

    for lengths in ([5, 30], [6, 47]):
        case = problem(lengths, [1, 0], adapters=2, k=32, n=32, p=0.5, device=device)
        case = case._replace(segments=segments.with_work(case.segments))
        got, wanted = outputs(layer, case, exact=True), outputs(eager, case, exact=True)
        if device == "cuda":  # these two are plain torch, which inductor compiles in its own way
            for name in ("weight", "bias"):
                torch.testing.assert_close(got.pop(name), wanted.pop(name))
        assert got.keys() == wanted.keys() and not [name for name in got if not torch.equal(got[name], wanted[name])]
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_a_graph_replays_with_other_contents():
    """One capture, then other values, lengths and adapters within the same capacity."""
    rows, static = 64, problem([30, 20], [1, 0], adapters=3, p=0.5, behind=14, device="cuda")
    cu, adapter = static.segments.cu_seqlens.clone(), static.segments.adapter.clone()
    x, keys = static.x.clone(), torch.zeros(rows, dtype=torch.int64, device="cuda")

    def step():
        dropout = static.keywords["dropout"]._replace(row_key=keys)
        part = make_segments(cu, adapter, 3, rows=rows)
        rest = static.weight, static.bias, static.lora_a, static.lora_b, static.scaling, part
        return multi_lora_linear(x, *rest, dropout=dropout, exact=True)

    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for lengths, names in (([30, 20], [1, 0]), ([1, 60], [2, 1]), ([0, 64], [0, 2])):
        cu.copy_(torch.tensor([0, *lengths]).cumsum(0))
        adapter.copy_(torch.tensor(names))
        x.normal_()
        keys.random_(1 << 40)
        graph.replay()
        assert torch.equal(y, step())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
@pytest.mark.parametrize("backend", ["triton", "csrc", "torch"])
def test_ranks_may_be_of_any_integer_dtype(backend, dtype):
    if backend == "csrc" and not multi_lora_cpu.built():
        pytest.skip("not built")
    case = problem([5, 4], [0, 1], adapters=2, k=32, n=32, ranks=[3, 8])
    other = case._replace(keywords=case.keywords | {"ranks": case.keywords["ranks"].to(dtype)})
    got, wanted = (outputs(kernels.multi_lora_linear, one, backend=backend) for one in (other, case))
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_kernels_clamp_a_rank_that_nobody_checked():
    """As on a GPU, where the values of ranks are not read: 99 is R, -1 is 0."""
    case = problem([5, 4], [0, 1], adapters=2, k=20, n=24, rank=8, ranks=[8, 8])
    arguments = list(operator_arguments(case, exact=True))
    wanted = torch.ops.kloss.multi_lora(*arguments)[0]
    arguments[6] = torch.tensor([99, -1])
    got = torch.ops.kloss.multi_lora(*arguments)[0]
    assert torch.equal(got[:5], wanted[:5])
    torch.testing.assert_close(got[5:], torch.nn.functional.linear(case.x[5:], case.weight, case.bias))
