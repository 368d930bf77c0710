"""The multi-adapter linear on a Hopper GPU, where rows lie in order: values, gradients, isolation to the bit, who is served."""

import contextlib
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_as_good, on_cpu, outputs, problem, sub_problem

import kloss.kernels as kernels
from kloss.kernels import cuda_library, lora_hopper, lora_shrink, lora_tiles, lora_triton
from kloss.kernels.lora_torch import Backward, Forward
from kloss.kernels.segments import with_work

hopper = partial(kernels.multi_lora_linear, backend="hopper")


@pytest.fixture
def gpu():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def ordered(case):
    """The problem, with the knowledge that its rows are in order."""
    assert torch.equal(case.segments.order.cpu(), torch.arange(case.segments.order.numel()))
    return case._replace(segments=case.segments._replace(sorted=True))


CASES = {
    "one sequence": dict(lengths=[5], adapter=[0], adapters=1, k=64, n=128, rank=16),
    "several tiles": dict(lengths=[100, 30, 70, 0, 333], adapter=[0, 0, 1, 3, 4], adapters=6, k=768, n=768, rank=32),
    "rows without an adapter": dict(lengths=[100, 200, 60, 70], adapter=[0, 2, -1, -1], adapters=3, k=192, n=256, rank=48),
    "slices": dict(lengths=[100, 200, 60, 300], adapter=[0, 2, 2, 3], adapters=4, k=384, n=1152, rank=32, slices=3),
    "wide ranks": dict(lengths=[10, 64, 65], adapter=[0, 1, 2], adapters=3, k=256, n=768, rank=256, slices=3, bias=False),
    "odd widths": dict(lengths=[63, 1, 64, 2], adapter=[0, 1, 2, 3], adapters=4, k=104, n=72, rank=80),
    "many adapters": dict(lengths=[3] * 130, adapter=list(range(130)), adapters=130, k=128, n=256, rank=16),
    "nobody": dict(lengths=[90], adapter=[-1], adapters=2, k=64, n=64, rank=16),
    "more items than clusters": dict(lengths=[300] * 9, adapter=list(range(9)), adapters=9, k=128, n=2048, rank=32),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, p, dtype, gpu):
    assert_as_good(hopper, ordered(problem(**CASES[name], p=p, dtype=dtype, device="cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_an_adapter_has_the_same_bits_alone(p, gpu):
    """Its sequences begin in the middle of a tile of the whole batch; a neighbour is NaN."""
    case = ordered(problem([70, 30, 200, 5, 90], [0, 1, 2, 3, 4], adapters=5, k=128, n=384, rank=32, slices=3, p=p or 1e-9,
                           dtype=torch.bfloat16, device="cuda"))  # fmt: skip
    case.lora_a[1] = torch.nan
    got = outputs(hopper, case, grads=("x", "lora_a", "lora_b"))
    part, rows = sub_problem(case, [2], "cuda")
    alone = outputs(hopper, ordered(part), grads=("x", "lora_a", "lora_b"))
    for name in ("y", "x"):
        assert torch.equal(got[name][rows], alone[name]), name
    for name in ("lora_a", "lora_b"):
        assert torch.equal(got[name][2], alone[name][2]), name


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_many_tiles_and_few_have_the_same_bits(p, gpu):
    """Alone an adapter's tiles have a multiprocessor each; here there are more tiles than multiprocessors."""
    lengths = [330] * 40
    case = ordered(problem(lengths, list(range(40)), adapters=40, k=768, n=2304, rank=32, slices=3, p=p or 1e-9,
                           dtype=torch.bfloat16, device="cuda"))  # fmt: skip
    got = outputs(hopper, case, grads=("x", "lora_a", "lora_b"))
    part, rows = sub_problem(case, [17], "cuda")
    alone = outputs(hopper, ordered(part), grads=("x", "lora_a", "lora_b"))
    for name in ("y", "x"):
        assert torch.equal(got[name][rows], alone[name]), name
    for name in ("lora_a", "lora_b"):
        assert torch.equal(got[name][17], alone[name][17]), name


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[5], [70], [330] * 40 + [5]])
def test_thousands_of_launches_end(lengths, gpu):
    """Most warps of a last cluster have no rows: they have nothing that keeps them together, and must not be left behind."""
    case = ordered(problem(lengths, list(range(len(lengths))), adapters=len(lengths), k=3072, n=768, rank=32, p=0.5,
                           dtype=torch.bfloat16, device="cuda"))  # fmt: skip
    run, ended = partial(outputs, hopper, case, grads=()), torch.cuda.Event()
    first = run()["y"]
    for _ in range(20):
        for _ in range(100):
            last = run()["y"]
        ended.record()
        deadline = time.monotonic() + 20
        while not ended.query():
            assert time.monotonic() < deadline, "a launch has not ended"
    assert torch.equal(first, last)


def test_a_gradient_that_begins_at_any_address(monkeypatch):
    """As that of a part of torch.cat; the products read from multiples of 16 bytes."""
    seen, flat = [], torch.randn(1 + 70 * 128, generator=torch.Generator().manual_seed(0)).half()
    dy = flat[1:].view(70, 128)
    assert dy.is_contiguous() and not cuda_library.walks(dy)
    monkeypatch.setattr(lora_hopper, "gradients", lambda call, *rest: seen.append(call.dy))
    lora_hopper.backward(Backward(dy, *[None] * 7, None, [], 1, False, True, True, True))
    assert cuda_library.walks(seen[0]) and torch.equal(seen[0], dy)


class Stream:
    """As CUDA has it: what is captured cannot wait for a stream that is not."""

    def __init__(self, captured):
        self.captured = captured

    def wait_stream(self, other):
        assert other.captured or not self.captured, "cudaErrorStreamCaptureIsolation"
        self.captured |= other.captured


@pytest.mark.parametrize("need", [(True, True, True), (True, False, True), (True, False, False), (False, False, False)])
def test_gradients_that_nobody_wants_fork_no_capture(need, monkeypatch):
    here, other = Stream(True), Stream(False)
    case = problem([70, 30], [0, 1], adapters=2, k=32, n=32, rank=8)
    lists = [case.segments.order, *with_work(case.segments).work]
    tensors = case.x, case.weight, case.bias, case.lora_a, case.lora_b, case.scaling, None
    y, s, keys = lora_triton.forward(Forward(*tensors, lists, 0, 1, False))
    beside = lora_triton._beside
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(lora_triton, "_other_stream", lambda device: other)
    monkeypatch.setattr(lora_triton, "_beside", lambda x: beside(SimpleNamespace(is_cuda=True, device=x.device)))
    lora_triton.backward(Backward(case.dy, *tensors[:2], *tensors[3:6], s, keys, None, lists, 1, False, *need))
    assert other.captured == any(need[1:])


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_rows_in_order_need_no_order(p):
    """Triton's interpreter: the kernels beside the products give the same bits, whether they load the order or not."""
    case = problem([70, 30, 5], [0, 1, 1], adapters=2, k=40, n=24, rank=8, p=p)
    segments, dropout = with_work(case.segments), case.keywords.get("dropout")
    work, order, draws = segments.work, segments.order, () if dropout is None else dropout[:3]
    made = []
    for rows in (order, None):
        s, d_a = torch.full((105, 8), torch.nan), torch.full_like(case.lora_a, torch.nan)
        keys = (torch.zeros(105, dtype=torch.int64),) * bool(p)
        factor = lora_tiles.Factor(case.lora_a, *(case.lora_a.stride(i) for i in (0, 0, 1, 2)))
        site = dict(site=3) if p else {}
        lora_shrink.shrink(case.x, factor, s, rows, work.tiles_64, None, None, *draws, *keys, **site, K=40, C=8, R=8, blocks=1)
        lora_tiles.reduce(case.x, s, d_a, rows, work, None, None, *draws[:1], *keys, C=40, SR=8, R=8, blocks=1, strides=(1, 40))
        made.append((s, d_a, *keys))
    for given, without in zip(*made, strict=True):
        assert given.isfinite().all() and torch.equal(given, without)


@pytest.mark.gpu
def test_it_takes_what_it_serves(gpu):
    case = problem([300] * 52, list(range(52)), adapters=52, k=768, n=768, rank=32, dtype=torch.bfloat16, device="cuda")
    x, weight, _, lora_a, lora_b, _, segments, *_ = case
    served = partial(lora_hopper.serves, wanted=False)
    ready = segments._replace(sorted=True)
    assert served(x, weight, lora_a, lora_b, ready, None)
    assert not served(x, weight, lora_a, lora_b, segments, None)  # nobody knows that rows are in order
    assert not served(x, weight, lora_a, lora_b, ready, torch.full((52,), 32, device="cuda"))
    assert not served(x, weight, lora_a.float(), lora_b, ready, None)
    assert not served(x.t().contiguous().t(), weight, lora_a, lora_b, ready, None)
    few = problem([30], [0], adapters=1, k=768, n=768, rank=32, dtype=torch.bfloat16, device="cuda")
    own = few.x, few.weight, few.lora_a, few.lora_b, few.segments._replace(sorted=True), None
    assert not served(*own) and lora_hopper.serves(*own, wanted=True)
    with pytest.raises(ValueError, match="rows are in order"):
        outputs(hopper, case)


@pytest.mark.gpu
def test_s_holds_its_scaling_before_it_is_rounded(gpu):
    """drop(x) Aᵀ is 192,000, more than fp16 holds; times scaling it is 1,920."""
    case = ordered(problem([5], [0], adapters=1, k=64, n=64, rank=16, dtype=torch.float16, device="cuda"))
    case.x.fill_(1500)
    case.lora_a.fill_(2)
    case.scaling.fill_(0.01)
    got = outputs(hopper, case, grads=())
    assert got["y"].isfinite().all()
    wanted = outputs(kernels.reference.multi_lora_linear, on_cpu(case), torch.float64, grads=())
    torch.testing.assert_close(got["y"].cpu().double(), wanted["y"], rtol=2e-3, atol=2)


@pytest.mark.gpu
def test_a_captured_call_takes_other_values(gpu):
    """Addresses are part of a captured launch, contents are not."""
    case = ordered(problem([100, 200], [0, 1], adapters=2, k=128, n=128, rank=16, dtype=torch.bfloat16, device="cuda"))
    run = partial(outputs, hopper, grads=())
    run(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(case)["y"]
    case.x.mul_(-3)
    graph.replay()
    assert torch.equal(y, run(case)["y"])


def test_without_a_hopper_it_is_refused():
    with pytest.raises(ValueError, match="needs such a GPU, 16 bits"):
        outputs(hopper, problem([5], [0], adapters=1))
