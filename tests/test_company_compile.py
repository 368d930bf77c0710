"""torch.compile and torch.export of a model with adapters: one graph without breaks, and in it what eager computes."""

import asyncio
import copy
import gc
import threading
from functools import partial

import pytest
import torch
from test_attach import IDS, MASK, MIXED, attached, layers, llama, logits, randomised, with_ids, xlmr
from test_attach_blocks import gradients
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import kloss
from kloss.errors import UserError
from kloss.kernels.segments import make_segments, with_work
from kloss.models import traced

BATCHES = [(5, 5), (5, 9), (3, 7), (4, 12), (6, 6), (2, 30)]
X = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(5))
IN_BLOCKS = [([0, 1, 2, -1], 3), ([2, 2, 1, 0], 5), ([1, 1, 1, 1], 8)]  # ids, the dropout's step


@pytest.fixture(autouse=True)
def forgotten():
    """No graph of another test, nor its count of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(rank=(4, 2, 3), **more):
    torch.manual_seed(0)
    return randomised(kloss.attach(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), 3, rank, **more))


def whole(model, backend="aot_eager", **more):
    """A model compiled without breaks, and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True, **more), counter


def passes(model, call, x, blocks=IN_BLOCKS, **more):
    """Outputs of several blocks, and the gradients of all, whose backward runs after them."""
    outputs = []
    for ids, step in blocks:
        with kloss.use_adapters(model, ids, step=step):
            outputs.append(call(x, **more))
    sum(y.square().sum() for y in outputs).backward()
    return [y.detach() for y in outputs], gradients(model)


def assert_same(got, wanted):
    assert all(torch.equal(y, z) for y, z in zip(got[0], wanted[0], strict=True))
    assert got[1].keys() == wanted[1].keys()
    assert all(grad is not None and torch.equal(grad, wanted[1][name]) for name, grad in got[1].items())


@pytest.mark.parametrize(("rank", "dropout"), [((4, 2, 3), [0.3, 0.0, 0.5]), (4, 0.0)], ids=str)
def test_one_graph_serves_all_ids_and_lengths(rank, dropout):
    model, draw = small(rank, dropout=dropout).train(), torch.Generator().manual_seed(3)
    compiled, counter = whole(model)
    for step, (rows, length) in enumerate(BATCHES):
        x = torch.randn(rows, length, 32, generator=draw)
        mixed = torch.randint(-1, 3, (rows,), generator=draw).tolist()
        blocks = [(ids, step) for ids in (mixed, [1] * rows, [-1] * rows)]
        assert_same(passes(model, compiled, x, blocks), passes(model, model, x, blocks))
    assert counter.frame_count == 3  # the first sizes, another length, another number of rows


@pytest.mark.parametrize("make", [xlmr, llama])
def test_a_model_of_transformers_is_one_graph(make):
    model = attached(lambda: shortened(make()), dropout=0.3).train()
    (compiled, counter), graphs = whole(model, "eager", dynamic=True), []
    for ids, length in ((MIXED, 4), ([1] * 5, 3)):
        batch = IDS[:, :length].contiguous(), MASK[:, :length].contiguous()
        wanted, got = (passes(model, partial(logits, call), batch[0], [(ids, 2)], mask=batch[1]) for call in (model, compiled))
        assert torch.equal(got[0][0], wanted[0][0])
        for name, grad in wanted[1].items():  # transformers' Llama repeats keys in another way where it is compiled
            torch.testing.assert_close(got[1][name], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item())
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]


def shortened(model):
    """The model with one layer, which takes a compiler half the time."""
    owner, name = (model.roberta.encoder, "layer") if hasattr(model, "roberta") else (model.model, "layers")
    setattr(owner, name, getattr(owner, name)[:1])
    return model


def test_inductor_computes_the_same_to_rounding():
    model = small(dropout=0.3).train()
    compiled, counter = whole(model, "inductor", dynamic=True)
    wanted, got = passes(model, model, X), passes(model, compiled, X)
    for a, b in zip([*wanted[0], *wanted[1].values()], [*got[0], *got[1].values()], strict=True):
        torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_compile(dtype):
    model, x = small(dropout=0.3).train(), X.to(dtype)
    if dtype != torch.float64:
        compiled, _ = whole(model)
        with torch.autocast("cpu", dtype):
            assert_same(passes(model, compiled, X), passes(model, model, X))
    model.to(dtype)
    for layer in layers(model).values():
        layer.lora_a.data, layer.lora_b.data = layer.lora_a.data.float(), layer.lora_b.data.float()
    assert_same(passes(model, whole(model)[0], x), passes(model, model, x))


def test_whose_the_adapters_are_is_asked_when_the_graph_runs():
    """Other tasks, other threads, no block at all, and a copy of the model; and what is refused is refused then, too."""
    model = small()
    compiled, counter = whole(model)
    base, wanted = model(X), [with_ids(model, [g] * 4, X) for g in range(3)]
    with kloss.use_adapters(model, [0] * 4):
        assert torch.equal(compiled(X), wanted[0])
    assert torch.equal(compiled(X), base)

    async def task(g):
        with kloss.use_adapters(model, [g] * 4):
            await asyncio.sleep(0)
            y = compiled(X)
            await asyncio.sleep(0)
            return y, compiled(X)

    async def main():
        return await asyncio.gather(task(1), task(2))

    for g, outputs in zip((1, 2), asyncio.run(main()), strict=True):
        assert all(torch.equal(y, wanted[g]) for y in outputs)
    got = {}

    def work(ids):
        try:
            if ids:
                with kloss.use_adapters(model, ids):
                    got["own"] = compiled(X)
            else:
                compiled(X)
        except UserError as error:
            got["refused"] = str(error)

    with kloss.use_adapters(model, [0] * 4):
        for ids in ([], [2] * 4):
            thread = threading.Thread(target=work, args=(ids,))
            thread.start()
            thread.join()
        assert torch.equal(compiled(X), wanted[0])
    assert "is in no block of use_adapters" in got["refused"] and torch.equal(got["own"], wanted[2])
    with kloss.use_adapters(model, [0, 1, 2]), pytest.raises(ValueError, match=r"^0: the input has shape \[4, 3, 32\], needed"):
        compiled(X)
    assert counter.frame_count == 1
    other = copy.deepcopy(model)
    other[0].lora_b.data.neg_()
    again, wanted = whole(other)[0], with_ids(other, [1] * 4, X)
    with kloss.use_adapters(model, [0] * 4), kloss.use_adapters(other, [1] * 4):
        assert torch.equal(again(X), wanted) and not torch.equal(wanted, with_ids(model, [1] * 4, X))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_checkpoints_compute_again_has_its_own_batch(backend, reentrant):
    """Within a graph, and around one, the first time that it is compiled as well; backward runs after all blocks."""
    model, x = small(dropout=0.3).train(), X.clone().requires_grad_()
    wanted = passes(model, model, x)
    within, counter = whole(lambda x: checkpoint(model, x, use_reentrant=reentrant), backend)
    assert_same(passes(model, within, x), wanted)
    assert counter.frame_count == 1
    compiled, _ = whole(model, backend)
    for _ in range(2):
        assert_same(passes(model, lambda x: checkpoint(compiled, x, use_reentrant=reentrant), x), wanted)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.b(self.a(x).tanh())


def test_layers_that_are_compiled_one_by_one_share_a_graph():
    torch.manual_seed(0)
    model = kloss.attach(nn.Sequential(*[Residual() for _ in range(12)]), 3, 4, dropout=0.2)
    model, x = randomised(model).train(), X.clone().requires_grad_()
    wanted, counter = passes(model, model, x), CompileCounterWithBackend("aot_eager")
    for layer in model:
        layer.compile(backend=counter, fullgraph=True)
    assert_same(passes(model, model, x), wanted)
    assert counter.frame_count == 1


def test_generate_with_a_compiled_forward_repeats_ids():
    """Beams take two breaks around the model: how often they repeat rows is known when it is called."""
    model = attached(llama)
    prompts, ways = (
        IDS[:, :3].clamp(min=3),
        dict(max_new_tokens=2, min_new_tokens=2, do_sample=False, num_beams=2, pad_token_id=1),
    )
    with kloss.use_adapters(model, MIXED):
        wanted = model.generate(prompts, **ways)
        model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
        assert torch.equal(model.generate(prompts, **ways), wanted)
    del model.forward
    assert not torch.equal(model.generate(prompts, **ways), wanted)


def test_a_block_may_begin_within_what_is_compiled():
    model = small()

    def both(x):
        with kloss.use_adapters(model, [0, 1, 2, -1]):
            first = model(x)
        with kloss.use_adapters(model, [1, 1, 1, 1]):
            second = model(x)
        return first, second, model(x)

    wanted = both(X)
    assert all(torch.equal(y, z) for y, z in zip(torch.compile(both, backend="aot_eager")(X), wanted, strict=True))
    assert not any(torch.equal(wanted[i], wanted[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_the_operator_says_what_its_fake_says():
    """Of all settings, and on a GPU too, where there are more lists."""
    model = small(dropout=0.3).train()
    with kloss.use_adapters(model, [0, 1, 2, -1]):
        for training in (True, False):
            torch.library.opcheck(torch.ops.kloss.layer_batch, (X, model[0].key, 3, training, training, True))
    for rows in (1, 70, 3000):
        lists = with_work(make_segments(torch.tensor([0, 1, rows]), torch.tensor([1, 0]), 3)).work
        assert [(t.shape, t.dtype) for t in traced._work(X, rows, 3)] == [(t.shape, t.dtype) for t in lists]


def test_layers_are_not_kept_alive():
    gc.collect()
    before = len(traced._layers)
    model = small()
    assert len(traced._layers) == before + 2
    del model
    gc.collect()
    assert len(traced._layers) == before


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_the_base_model_or_one_adapter_and_nothing_else(strict):
    model = small()
    base = model(X)
    for used in (False, True):
        if used:
            with (
                kloss.use_adapters(model, [0, 1, 2, -1]),
                pytest.raises(Exception, match="torch.export would fix whose") as error,
            ):
                torch.export.export(model, (X,), strict=strict)
            assert strict or isinstance(error.value, UserError)
        assert torch.equal(torch.export.export(model, (X,), strict=strict).module()(X), base)
    plain = kloss.adapters.detach(copy.deepcopy(model), 1)
    exported = torch.export.export(plain, (X,), strict=strict).module()
    torch.testing.assert_close(exported(X), with_ids(model, [1] * 4, X))


def test_a_trace_of_jit_is_refused():
    model = small()
    with kloss.use_adapters(model, [0, 1, 2, -1]), pytest.raises(UserError, match="^torch.jit.trace would fix whose adapter"):
        torch.jit.trace(model, (X,))
    assert torch.equal(torch.jit.trace(model, (X,))(X), model(X))
