"""What a block of `use_adapters` reaches: tasks, threads, generators, backward passes that compute layers again, generate."""

import asyncio
import contextlib
import contextvars
import copy
import threading
import weakref

import pytest
import torch
from test_attach import IDS, MIXED, MODELS, attached, layers, llama, logits, randomised, with_ids
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import kloss
from kloss.errors import UserError


def small(**more):
    torch.manual_seed(0)
    return randomised(kloss.attach(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), 3, 2, **more))


X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(5))


def test_interleaved_tasks_keep_their_adapters():
    model, got = small(), {}
    base, wanted = model(X), [with_ids(model, [g] * 4, X) for g in range(2)]

    async def task(g):
        with kloss.use_adapters(model, [g] * 4):
            await asyncio.sleep(0)
            assert not torch.autograd.is_multithreading_enabled()
            first = model(X)
            await asyncio.sleep(0)
            got[g] = first, model(X), await asyncio.to_thread(model, X)

    async def main():
        await asyncio.gather(task(0), task(1))

    asyncio.run(main())
    for g in range(2):
        assert all(torch.equal(y, wanted[g]) for y in got[g]), g
    assert torch.equal(model(X), base) and torch.autograd.is_multithreading_enabled()


def test_blocks_that_end_out_of_order_say_so():
    model = small()
    base, wanted = model(X), [with_ids(model, [g] * 4, X) for g in range(2)]

    def leaking():
        with kloss.use_adapters(model, [1] * 4):
            yield

    generator = leaking()
    with pytest.raises(UserError, match="ended out of order.* yield"), kloss.use_adapters(model, [0] * 4):
        next(generator)
        assert torch.equal(model(X), wanted[1])
    assert torch.equal(model(X), base)
    with pytest.raises(UserError, match="ended out of order"):
        generator.close()
    with kloss.use_adapters(model, [0] * 4):
        assert torch.equal(model(X), wanted[0])
    elsewhere = leaking()
    contextvars.copy_context().run(next, elsewhere)
    assert torch.equal(model(X), base)
    with pytest.raises(UserError, match="ended out of order"):
        elsewhere.close()
    assert torch.equal(model(X), base)


def gradients(model):
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return grads


def assert_same(got, wanted):
    assert got.keys() == wanted.keys() and all(grad is not None and torch.equal(grad, wanted[n]) for n, grad in got.items())


@MODELS
@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_may_run_anywhere(make, reentrant):
    model = attached(make, dropout=0.3).train()
    model.enable_input_require_grads()

    def losses():
        for ids in (MIXED, [0, 1, 2, -1, 0]):
            with kloss.use_adapters(model, ids, step=7):
                yield logits(model).square().sum()

    sum([*losses()]).backward()
    wanted = gradients(model)
    assert any(grad.any() for grad in wanted.values())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    sum([*losses()]).backward()  # outside of all blocks
    assert_same(gradients(model), wanted)
    both = [*losses()]
    with kloss.use_adapters(model, [2] * 5, step=1):
        logits(model)
        sum(both).backward()  # in a block of other ids
    assert_same(gradients(model), wanted)
    both = [*losses()]
    thread = threading.Thread(target=sum(both).backward)  # as a GPU's backward does
    thread.start()
    thread.join()
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_base_model_is_computed_again_as_the_base_model(reentrant):
    model, x = small().requires_grad_(True), X.clone().requires_grad_()
    base = copy.deepcopy(model)
    base(x).square().sum().backward()
    with kloss.use_adapters(model, [0] * 4):
        model(x).sum()
    y = checkpoint(model, x, use_reentrant=reentrant)
    with torch.no_grad(), kloss.use_adapters(model, [1] * 4):
        model(x)
    y.backward(2 * y.detach())
    assert all(layer.lora_a.grad is None for layer in layers(model).values())
    assert torch.equal(model[0].weight.grad, base[0].weight.grad)


def test_an_evaluation_between_forward_and_backward_changes_nothing():
    model, x = small(), X.clone().requires_grad_()
    for reentrant in (False, True):
        with kloss.use_adapters(model, [1] * 4):
            y = model(x).square().sum()
            y.backward()
            wanted = gradients(model)
            y = checkpoint(model, x, use_reentrant=reentrant)
        with torch.no_grad(), kloss.use_adapters(model, [0] * 4):
            model(x)
        y.backward(2 * y.detach())
        assert_same(gradients(model), wanted)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_nested_checkpoints_and_a_graph_that_is_kept(inner, outer):
    model, x = small(), X.clone().requires_grad_()
    with kloss.use_adapters(model, [0, 1, 2, 0]):
        model(x).square().sum().backward()
    wanted = gradients(model)
    with kloss.use_adapters(model, [0, 1, 2, 0]):
        y = checkpoint(lambda x: checkpoint(model, x, use_reentrant=inner), x, use_reentrant=outer).square().sum()
    with kloss.use_adapters(model, [1] * 4):
        model(x)
        y.backward(retain_graph=True)
        assert_same(gradients(model), wanted)
        y.backward()
        assert_same(gradients(model), wanted)


def two_blocks(model, x, steps=(None, None)):
    with kloss.use_adapters(model, [0, 1, 2, -1], step=steps[0]):
        y = model(x)
    with kloss.use_adapters(model, [-1, 2, 2, 0], step=steps[1]):
        return y * model(x)


def nested_blocks(model, x, steps=(None, None)):
    with kloss.use_adapters(model, [0, 1, 2, -1], step=steps[0]):
        y = model[0](x).tanh()
        with kloss.use_adapters(model, [-1, 2, 2, 0], step=steps[1]):
            return model[2](y) * model[2](y.sin())


def reference_beside(model, x, steps=(None, None)):
    """A block within a checkpoint within a block."""
    y = model[0](x).tanh()
    with kloss.use_adapters(model, [-1] * 4, step=steps[1]):
        base = model[2](y)
    return model[2](y) - base


OUTER = {reference_beside: [0, 1, 2, -1]}


def run_in_checkpoint(function, model, reentrant, steps=(None, None)):
    """Gradients of a function, in a checkpoint unless reentrant is None, with its outer block if it has one."""
    x, outer = X.clone().requires_grad_(), OUTER.get(function)
    with kloss.use_adapters(model, outer, step=steps[0]) if outer else contextlib.nullcontext():
        y = function(model, x, steps) if reentrant is None else checkpoint(function, model, x, steps, use_reentrant=reentrant)
    y.square().sum().backward()
    return gradients(model) | {"x": x.grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("function", [two_blocks, nested_blocks, reference_beside])
def test_blocks_within_a_checkpoint_are_opened_again(function, reentrant):
    model = small()
    assert_same(run_in_checkpoint(function, model, reentrant), run_in_checkpoint(function, model, None))
    model, steps = small(dropout=0.4).train(), (5, 9)
    wanted = run_in_checkpoint(function, model, None, steps)
    assert_same(run_in_checkpoint(function, model, reentrant, steps), wanted)
    other = run_in_checkpoint(function, model, None, (6, 8))
    assert not torch.equal(other["0.lora_a"], wanted["0.lora_a"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_of_dropout_within_a_checkpoint_has_its_step_again_or_is_refused(reentrant):
    model, x = small(dropout=0.4).train(), X.clone().requires_grad_()

    def one(x, ids=(0, 1, 2, 0)):
        with kloss.use_adapters(model, [*ids]):
            return model(x)

    def equal_ones(x):
        return one(x) * one(x)

    def different_ones(x):
        return one(x) * one(x, (1, 1, 1, 1))

    shared = layers(model)["0"].shared
    one(x).square().sum().backward()
    wanted, shared.step = gradients(model), 0
    checkpoint(one, x, use_reentrant=reentrant).square().sum().backward()
    assert_same(gradients(model), wanted)
    assert shared.step == 1  # what was opened again took no step
    for several in (equal_ones, different_ones):
        y = checkpoint(several, x, use_reentrant=reentrant).sum()
        with pytest.raises(UserError, match="one of several in a checkpoint.* give it as use_adapters"):
            y.backward()


@pytest.mark.parametrize("around", [None, [0, 1, 2, 0]])
def test_a_checkpoint_that_leaves_its_last_block_out_is_refused(around):
    """Its layers outside of the block would get that block's adapters; a reentrant one knows both."""
    model, x = small(), X.clone().requires_grad_()

    def last(x):
        y = model[0](x).tanh()
        with kloss.use_adapters(model, [2] * 4):
            return model[2](y)

    got = {}
    for reentrant in (None, True, False):
        with kloss.use_adapters(model, around) if around else contextlib.nullcontext():
            y = last(x) if reentrant is None else checkpoint(last, x, use_reentrant=reentrant)
        if reentrant is False:
            with pytest.raises(UserError, match="once within a block of use_adapters and once outside"):
                y.sum().backward()
        else:
            y.sum().backward()
            got[reentrant] = gradients(model)
    assert got[True].keys() == got[None].keys()
    for name, grad in got[None].items():
        assert grad is got[True][name] is None or torch.equal(grad, got[True][name])


def test_a_block_within_a_checkpoint_keeps_nothing_of_it():
    model = small()

    def inside(x):
        with kloss.use_adapters(model, [1] * 4):
            return model(x)

    x = X.clone().requires_grad_()
    there = weakref.ref(x)
    checkpoint(inside, x, use_reentrant=False).sum().backward()
    del x
    assert there() is None


def test_a_checkpoint_in_a_block_whose_tensors_lie_elsewhere_is_not_refused():
    model, x = small(), X.clone().requires_grad_()
    with kloss.use_adapters(model, [1] * 4):
        model(x).square().sum().backward()
    wanted = gradients(model)
    with torch.autograd.graph.save_on_cpu(), kloss.use_adapters(model, [1] * 4):
        y = model(x) * checkpoint(model, x, use_reentrant=False)
    y.sum().backward()
    assert_same(gradients(model), wanted)


def test_a_hook_of_backward_computes_with_its_own_block():
    model, x, seen = small(), X.clone().requires_grad_(), []
    wanted = with_ids(model, [2] * 4, X)

    def evaluate(grad):
        with torch.no_grad(), kloss.use_adapters(model, [2] * 4):
            seen.append(model(X))

    with kloss.use_adapters(model, [0, 1, 0, 1]):
        y = model(x)
        y.register_hook(evaluate)
        y.square().sum().backward()
    assert torch.equal(seen[0], wanted)


def test_a_task_that_outlives_its_block_does_not_compute_with_other_adapters():
    model, seen = small(), []

    async def late():
        await asyncio.sleep(0)
        seen.append(model(X))

    async def main():
        with kloss.use_adapters(model, [1] * 4):
            task = asyncio.create_task(late())
        kloss.adapters.remove(model, 0)
        await task

    with pytest.raises(UserError, match="^0: adapters were added, removed or copied since this block of use_adapters began"):
        asyncio.run(main())
    assert not seen


def test_a_pass_of_long_ago_is_refused(monkeypatch):
    monkeypatch.setattr("kloss.models.blocks.PASSES", 8)
    for has_gradients in (False, True):
        model, x = small(), X.clone().requires_grad_()
        with kloss.use_adapters(model, [2]):
            model(x)
        with kloss.use_adapters(model, [1] * 4):
            y = checkpoint(model, x, use_reentrant=not has_gradients).sum()
        for g in [0, 1] * 5:
            with kloss.use_adapters(model, [g]), torch.set_grad_enabled(has_gradients):
                model(x)
        with pytest.raises(UserError, match="^0 is computed again .*: call backward inside use_adapters"):
            y.backward()


def test_threads_that_train_at_once():
    """Two threads with the same numbers of nodes: in a block each knows its own, outside they can be told apart no more."""
    model, got = small(), {}
    with kloss.use_adapters(model, [1] * 4):
        model(X).square().sum().backward()
    wanted = gradients(model)

    def work(ids, inside):
        x = X.clone().requires_grad_()
        with kloss.use_adapters(model, ids):
            y = checkpoint(model, x, use_reentrant=True).square().sum()
            if inside:
                y.backward()
        if not inside:
            try:
                y.backward()
            except UserError as error:
                got["refused"] = str(error)

    for ids, inside in (([0] * 4, True), ([1] * 4, True), ([1] * 4, False)):
        model.zero_grad()
        thread = threading.Thread(target=work, args=(ids, inside))
        thread.start()
        thread.join()
        if ids[0] == 1 and inside:
            assert_same(gradients(model), wanted)
    assert "in the forward pass's thread" in got["refused"]


def test_what_was_computed_again_is_kept_for_one_batch():
    model, x = small(), X.clone().requires_grad_()
    losses = []
    for g in range(3):
        with kloss.use_adapters(model, [g] * 4):
            losses.append(checkpoint(model, x, use_reentrant=False).sum())
    sum(losses).backward()
    assert sum(len(batch.cache) for batch, _ in {*model[0].shared.blocks._own.passes.hits}) == 1


def test_a_new_thread_must_say_whose_adapters_it_wants():
    model, got = small(), {}
    base, wanted = model(X), with_ids(model, [1] * 4, X)

    def work(name, ids=None):
        try:
            if ids is not None:
                with kloss.use_adapters(model, ids):
                    pass
            got[name] = model(X)
        except UserError as error:
            got[name] = str(error)

    def run(*arguments):
        thread = threading.Thread(target=arguments[0], args=arguments[1:])
        thread.start()
        thread.join()

    with kloss.use_adapters(model, [1] * 4):
        run(work, "new")
        run(contextvars.copy_context().run, work, "with the context")
    run(work, "new, no block is open")
    run(work, "after a block of its own", [-1] * 4)
    for name in ("new", "new, no block is open"):
        assert "thread" in got[name] and "copy_context" in got[name] and "-1" in got[name]
    assert torch.equal(got["with the context"], wanted) and torch.equal(got["after a block of its own"], base)


# What a layer's input is.


def test_strides_tell_of_time_before_batch():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(x.transpose(0, 1).tanh()).transpose(0, 1)

    model = randomised(kloss.attach(Turned(), 4, 4))
    with pytest.raises(ValueError, match="inner: the input has shape .* time before batch"):
        with_ids(model, [0, 1, 2, 3], torch.randn(4, 4, 8))
    assert with_ids(model, [1] * 4, torch.randn(4, 4, 8)).shape == (4, 4, 8)


def test_tokens_of_a_router_of_ones_own_are_known_by_another_number():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.choose, self.one = nn.Linear(8, 2), nn.Linear(8, 8)

        def forward(self, x, keep):
            return self.one(x.flatten(0, 1)[keep])

    model, x = randomised(kloss.attach(Routed(), 4, 4, "one")), torch.randn(4, 3, 8)
    with_ids(model, [1] * 4, x, torch.arange(5))
    with pytest.raises(ValueError, match=r"one: .*\[4, 8\], the tokens that a router chose: use one id"):
        with_ids(model, [0, 1, 2, 3], x, torch.arange(4))


# generate repeats rows.


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0,
        initializer_factor=8.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=40, init_std=0.3, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


WAYS = [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}]
PROMPTS = IDS.clamp(min=2)


@pytest.mark.parametrize("make", [llama, t5, bart])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_generate_repeats_the_ids_by_itself(make, way):
    model = copy.deepcopy(randomised(kloss.attach(make(), 3, 4)))

    def tokens(rows, ids):
        mask = torch.ones_like(PROMPTS[rows])
        settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=2)
        with kloss.use_adapters(model, ids):
            return model.generate(PROMPTS[rows], attention_mask=mask, **settings, **way)

    rows = way.get("num_return_sequences", 1)
    mixed = tokens(torch.arange(5), MIXED)
    alone = [tokens(torch.tensor([i]), [MIXED[i]]) for i in range(5)]
    assert mixed.shape[0] == 5 * rows and torch.equal(mixed, torch.cat(alone))
    base = tokens(torch.arange(5), [-1] * 5)
    assert not torch.equal(base, mixed)


def test_an_interrupted_generate_leaves_no_block_behind(monkeypatch):
    """Ctrl-C is no Exception, and torch does not run hooks after it."""
    model, settings = randomised(kloss.attach(llama(), 3, 4)), dict(num_beams=2, max_new_tokens=6, pad_token_id=1)

    def interrupted(*_):
        raise KeyboardInterrupt

    layer = next(iter(layers(model).values()))
    with pytest.raises(KeyboardInterrupt), kloss.use_adapters(model, MIXED), monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupted)
        model.generate(PROMPTS, **settings)
    assert not layer.shared.blocks.open and not layer.shared.blocks.repeating
    assert torch.autograd.is_multithreading_enabled()
    kloss.adapters.add(model, "more")


def test_only_generate_repeats_ids():
    model = randomised(kloss.attach(llama(), 3, 4))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), kloss.use_adapters(model, [0, 1]), pytest.raises(ValueError, match="first dimension"):
            model(input_ids=IDS[:4], **{"use_cache": True} if grad else {})
    with kloss.use_adapters(model, [0, 1]):
        with pytest.raises(ValueError, match="first dimension"), torch.no_grad():
            model(input_ids=IDS[:3], use_cache=True)
        with torch.no_grad():
            model(input_ids=IDS[:4], use_cache=True)
            with pytest.raises(IndexError):
                model(input_ids=IDS[:4] + 100, use_cache=True)
            model(input_ids=IDS[:2])  # as before


def test_a_compiled_model_is_in_a_block_or_is_not():
    model = small()
    compiled, whole = (torch.compile(model, backend="eager", fullgraph=whole) for whole in (False, True))
    base, wanted = model(X), with_ids(model, [0, 1, 2, 0], X)
    assert torch.equal(compiled(X), base) and torch.equal(whole(X), base)
    with kloss.use_adapters(model, [0, 1, 2, 0]):
        assert torch.equal(compiled(X), wanted)
    assert torch.equal(compiled(X), base) and torch.equal(whole(X), base)
