"""Work captured on a pretended GPU and replayed with other contents.

A replay runs the ops that the capture recorded, after all that they made was poisoned.
"""

import warnings
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from pretend import GPU, pretended_gpu
from test_train import cohort_of
from torch import Tensor
from toy import ToyCorpus, toy_model

from kloss.cl import step, train
from kloss.cl.evaluate import evaluate
from kloss.cl.graphs import Graphs
from kloss.cl.learner import Learner
from kloss.cl.packing import capacity, pack
from kloss.cl.step import StepSettings, train_step
from kloss.kernels import Dropout, feed_forward, lora_hopper, multi_lora
from kloss.kernels.dropout import keep, row_dropout
from kloss.models import AdapterBank

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
CORPUS = ToyCorpus(("aa", "bb"), sentences=8)
SMALL = ToyCorpus(("aa",), sentences=4)
LAYERS = {"num_hidden_layers": 1}  # in the interpreter a layer of a step takes half a second
TEXT = CORPUS.sentences("aa", "train")


def learner(g, **changes):
    fields = dict(rank=2, alpha=2, lr=1e-3, seed=g, epochs=2, batch_size=2, lora_dropout=0.3, dropout=0.2)
    return Learner((("aa",),), **(fields | changes))


def batch_of(counts, seed=0):
    """A padded batch of 49 to 64 tokens in which adapter g has counts[g] sentences, drawn from the seed."""
    draw = np.random.default_rng(seed)
    while True:
        parts = [(TEXT, draw.integers(TEXT.number, size=count), g) for g, count in enumerate(counts) if count]
        batch = pack(parts, len(counts), padded=True)
        if batch.capacity == (64, 16):
            return batch


def bank_for(model, adapters, device="cpu"):
    bank = AdapterBank(model, adapters, 2, device=device)
    generator = torch.Generator().manual_seed(1)
    for name in bank.slots:
        if name.endswith(".b"):
            b = bank.view(bank.param, name)
            b.copy_(torch.empty(b.shape, dtype=torch.float32).normal_(0, 0.1, generator=generator))
    bank.refresh()
    return bank


def test_capacities():
    counts = range(1, 5000)
    assert all(n <= capacity(n) <= max(16, n * 17 / 16) for n in counts if n > 256) and capacity(1) == capacity(16) == 16
    assert capacity(19_902) == 20_480 and len({capacity(n) for n in counts}) < 140
    assert all(capacity(capacity(n)) == capacity(n) for n in counts)


def test_a_padded_batch_is_the_batch():
    """Padding changes no loss and no gradient, on any device."""
    model = toy_model(**LAYERS).freeze_backbone()
    counts = [2, 0, 3]
    draw = np.random.default_rng(0)
    parts = [(TEXT, draw.integers(TEXT.number, size=count), g) for g, count in enumerate(counts) if count]
    settings = StepSettings.of([learner(g) for g in range(3)], torch.device("cpu"))
    results = []
    for padded in (False, True):
        bank = bank_for(model, 3)
        losses, _ = train_step(model, bank, settings, [pack(parts, 3, padded=padded)])
        results.append((losses, bank.param))
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)


def test_a_graph_is_right_for_any_number_of_adapters(monkeypatch):
    """Eight sentences of one, of eight or of three adapters have one capacity, and so one graph."""
    adapters, results = 8, {}
    spread = [1] * 8, [0, 0, 0, 0, 0, 8, 0, 0], [1] * 8, [0, 3, 0, 0, 1, 0, 0, 4]
    batches = [batch_of(counts, seed) for seed, counts in enumerate(spread)]

    def run(device, after=lambda: None):
        model = toy_model(**LAYERS).freeze_backbone().to(device)
        bank, settings = bank_for(model, adapters, device), StepSettings.of([learner(g) for g in range(adapters)], device)
        graphs, losses = Graphs(device), []
        for batch in batches:
            losses.append(train_step(model, bank, settings, [batch], graphs=graphs)[0].cpu())
        after()
        return torch.stack(losses), bank.grad.cpu(), bank.param.cpu()

    results["cpu"] = run(torch.device("cpu"))
    with pretended_gpu(monkeypatch) as gpu:
        results["gpu"] = run(GPU, lambda: results.update(counts=(gpu.captures, gpu.replays)))
    assert results["counts"] == (1, 3), "the first batch runs as it is, the second is captured and replayed"
    for wanted, got in zip(results["cpu"], results["gpu"], strict=True):
        assert (got - wanted).norm() < 1e-5 * wanted.norm()


def launches(monkeypatch, function) -> list[tuple]:
    """Every Triton launch of a call: kernel, grid, and of each argument its value, or what a tensor is."""
    seen: list[tuple] = []

    def about(value):
        if isinstance(value, Tensor):
            return value.dtype, tuple(value.shape), value.stride(), value.storage_offset()
        return value

    def call(executor, *args, **kwargs):
        given = {name: about(value) for name, value in kwargs.items()}
        seen.append((executor.fn.__name__, executor.grid, [about(value) for value in args], given))
        return original(executor, *args, **kwargs)

    original = interpreter.GridExecutor.__call__
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        function()
    return seen


def test_what_is_launched_follows_from_the_capacity(monkeypatch):
    """Two batches of one capacity: the same ops on the same sizes, the same kernels with the same grids and numbers, no wait."""
    model = toy_model(**LAYERS).freeze_backbone()
    first, second = batch_of([0, 7, 0, 0, 0, 0, 0, 0], 1), batch_of([1] * 8, 2)
    assert first.tokens != second.tokens
    with pretended_gpu(monkeypatch) as gpu:
        model.to(GPU)
        bank, settings = bank_for(model, 8, GPU), StepSettings.of([learner(g) for g in range(8)], GPU)
        step._backward(model, bank, settings, 0, 8, first.to(GPU))  # makes what is kept
        recorded = []

        def note(func, args, kwargs, result):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            about = [(x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else x for x in leaves]
            ops.append((str(func), about))

        for batch in (first, second):
            ops: list[tuple] = []
            on_gpu = batch.to(GPU)
            gpu.waits.clear()
            gpu.graph = type("Note", (), {"add": staticmethod(note)})
            made = launches(monkeypatch, partial(step._backward, model, bank, settings, 0, 8, on_gpu))
            gpu.graph = None
            assert not gpu.waits
            recorded.append((ops, made))
    (ops, made), (other_ops, other_made) = recorded
    assert len(made) > 30 and made == other_made
    assert len(ops) > 60 and ops == other_ops
    assert not [op for op, _ in ops if op.startswith("aten.gelu")]  # it is computed within the linears


def products(x, weight, s, factor, bias, y, tiles, p=None, keys=None, *, slices=1, turned=False):
    """`cuda_library.linear` in plain torch, a tile at a time."""
    for g, first, last in tiles.tolist():
        rows = slice(first, last)
        y[rows] = torch.nn.functional.linear(x[rows], weight.t() if turned else weight, bias)
        if g < 0 or first == last:
            continue
        if turned:
            term = s[rows] @ factor[g]
            if p is not None:
                limits = row_dropout(Dropout(p, p.long(), keys[rows], 0), torch.full((last - first,), g))
                kept = keep(keys[rows], limits.threshold, torch.arange(term.shape[1], dtype=torch.int32))
                term = torch.where(kept, term * limits.scale[:, None], 0.0)
        else:
            own, blocks = s[rows].unflatten(1, (slices, -1)), factor[g].unflatten(0, (slices, -1))
            term = torch.einsum("nsr,scr->nsc", own, blocks).flatten(1)
        y[rows] += term


def test_the_launches_of_a_step_on_a_hopper(monkeypatch):
    """At most 400 with the 12 layers of base size, counted from one and two; its losses and gradients are a CPU's."""
    batch, linears = batch_of([1] * 8, 2), []
    monkeypatch.setattr(lora_hopper.cuda_library, "linear", lambda *args, **more: linears.append(1) or products(*args, **more))
    for module in (multi_lora, feed_forward):
        monkeypatch.setattr(module, "hopper_serves", lambda x, *rest: x.device == GPU)

    def step_on(device, model):
        bank, settings = bank_for(model, 8, device), StepSettings.of([learner(g) for g in range(8)], device)
        return bank, partial(step._backward, model, bank, settings, 0, 8, batch.to(device))

    def counted(layers):
        model, ops, losses = toy_model(num_hidden_layers=layers).freeze_backbone(), [], []
        bank, run = step_on(torch.device("cpu"), model)
        wanted, gradients = run(), bank.grad
        with pretended_gpu(monkeypatch) as gpu:
            bank, run = step_on(GPU, model.to(GPU))
            run()  # makes what is kept
            linears.clear()
            gpu.graph = type("Note", (), {"add": staticmethod(lambda func, *rest: ops.append(func))})
            made = launches(monkeypatch, lambda: losses.append(run()))
            gpu.graph = None
            assert (losses[0].cpu() - wanted).norm() < 1e-5 * wanted.norm()
            assert (bank.grad.cpu() - gradients).norm() < 1e-5 * gradients.norm()
        assert len(linears) == 8 * layers - 1  # the first layer's input needs no gradient
        aten = [func for func in ops if func.namespace == "aten" and not func.is_view and "empty" not in str(func)]
        work_lists, adamw = 2, 3
        return len(made) + len(linears) + len(aten) + work_lists + adamw

    one, two = counted(1), counted(2)
    assert one + 11 * (two - one) <= 400


def test_exact_is_not_for_hopper_whose_service_depends_on_the_others(monkeypatch):
    """Its products have other bits than Triton's, and it serves one rank, rows in order."""
    batch, asked = batch_of([1] * 8, 2), []
    for module in (multi_lora, feed_forward):
        monkeypatch.setattr(module, "hopper_serves", lambda *rest: asked.append(1) or False)
    for exact in (False, True):
        asked.clear()
        model = toy_model(num_hidden_layers=1).freeze_backbone()
        with pretended_gpu(monkeypatch):
            settings = StepSettings.of([learner(g) for g in range(8)], GPU, exact=exact)
            bank = AdapterBank(model.to(GPU), 8, 2, device=GPU, exact=exact)
            step._backward(model, bank, settings, 0, 8, batch.to(GPU))
        assert bool(asked) is not exact


def test_a_learner_that_ends_stays_as_an_idle_row(monkeypatch):
    """Its row is as it was when it ended, the graphs are those of before, and all is as on a CPU."""
    learners = [learner(g, epochs=epochs, batch_size=4) for g, epochs in enumerate((2, 5, 3, 5))]

    def run(device):
        teams = Counter()
        with monkeypatch.context() as patch:
            patch.setattr(train, "_Team", lambda *arguments: teams.update(["made"]) or team_class(*arguments))
            cohort = cohort_of(learners, SMALL, LAYERS, device=device)
            losses = []
            cohort.train(lambda cohort, loss: losses.append(loss))
        return teams["made"], losses, cohort.bank.param.cpu(), cohort.steps, cohort.scores, cohort.tokens

    team_class = train._Team
    teams, losses, *on_cpu = run("cpu")
    with pretended_gpu(monkeypatch) as gpu:
        teams_there, losses_there, *there = run(GPU)
        assert gpu.captures >= 2 and gpu.replays >= gpu.captures
    assert teams == 3 and teams_there == 2, "a new team when half of the rows are idle"
    assert losses_there == pytest.approx(losses, rel=1e-5)
    assert (there[0] - on_cpu[0]).norm() < 1e-5 * on_cpu[0].norm()
    assert there[1].tolist() == on_cpu[1].tolist() and there[2:] == on_cpu[2:]


def test_a_state_taken_while_a_step_is_packed_ahead(monkeypatch):
    """It stands where training does, and both that cohort and one that resumes from it end as one that was never asked."""
    learners = [learner(g, epochs=2) for g in range(2)]
    with pretended_gpu(monkeypatch):
        make = partial(cohort_of, learners, SMALL, LAYERS, device=GPU, score_every=(3, 0))
        plain, asked, resumed = make(), make(), make()
        plain.train()
        states = []
        asked.train(lambda cohort, loss: states.append([cohort.state()[1], {k: v.clone() for k, v in cohort.state()[0].items()}]))
        counters = [state["counters"] for state, _ in states]
        assert counters[:3] == [[[0, 0, 1]] * 2, [[0, 1, 0]] * 2, [[0, 1, 1]] * 2]
        resumed.load_state(states[1][1], states[1][0])
        resumed.train()
        params = [cohort.bank.param.cpu() for cohort in (plain, asked, resumed)]
        assert torch.equal(params[0], params[1]) and torch.equal(params[0], params[2])
        assert list(plain.curves[0]) == [3] and plain.curves == asked.curves == resumed.curves
        assert plain.scores == asked.scores == resumed.scores and plain.tokens == asked.tokens == resumed.tokens


def test_a_learner_that_diverges_while_the_next_step_is_packed(monkeypatch):
    """Its neighbour sees every batch once."""
    learners = [learner(0, epochs=2), learner(1, epochs=2, lr=1e30)]

    def run(device):
        cohort = cohort_of(learners, SMALL, LAYERS, device=device)
        cohort.train()
        return cohort.bank.param[0].cpu(), cohort.steps.tolist(), cohort.scores, cohort.failed, cohort.tokens

    wanted = run("cpu")
    with pretended_gpu(monkeypatch):
        got = run(GPU)
    assert wanted[3] and got[1:] == wanted[1:]
    assert (got[0] - wanted[0]).norm() < 1e-5 * wanted[0].norm()


def test_a_whole_model_is_trained_through_graphs_too(monkeypatch):
    learners = [learner(0, rank=None, lora_dropout=0.0, dropout=0.1, batch_size=4, epochs=4)]
    plain = cohort_of(learners, SMALL, LAYERS)
    plain.train()
    with pretended_gpu(monkeypatch) as gpu:
        there = cohort_of(learners, SMALL, LAYERS, device=GPU)
        there.train()
        param = there.bank.param.cpu()
        assert gpu.captures and gpu.replays >= 3
    assert (param - plain.bank.param).norm() < 1e-5 * plain.bank.param.norm()
    assert there.scores == plain.scores


def test_what_a_replay_returns_stays_as_it_is(monkeypatch):
    """On a GPU the passes of a step share the memory of their graphs: a later one may write where an earlier one's output was."""
    batches = [batch_of(counts) for counts in ([3, 2], [5, 0], [0, 5], [4, 1])]
    with pretended_gpu(monkeypatch) as gpu:
        graphs = Graphs(GPU)
        sums = [graphs("sum", lambda batch: batch.adapter.sum()[None], batch) for batch in batches]
        assert gpu.replays == 3
        assert [int(value) for value in sums] == [int(batch.adapter.sum()) for batch in batches]


def test_scoring_is_captured_too(monkeypatch):
    pairs = [(g, locale) for g in range(3) for locale in ("aa", "bb")]
    model = toy_model(**LAYERS)
    wanted = evaluate(model, bank_for(model, 3), CORPUS, pairs)
    with pretended_gpu(monkeypatch) as gpu:
        model.to(GPU)
        bank, graphs = bank_for(model, 3, GPU), Graphs(GPU)
        for _ in range(3):
            got = evaluate(model, bank, CORPUS, pairs, pass_tokens=60, graphs=graphs)
            assert np.array_equal(got, wanted)
        assert gpu.captures and gpu.replays > 2 * gpu.captures


def test_a_capture_that_fails_is_said_once_and_training_goes_on(monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    learners, losses = [learner(g, batch_size=4, epochs=3) for g in range(2)], []
    with pretended_gpu(monkeypatch) as gpu:
        monkeypatch.setattr(Graphs, "_capture", fail)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cohort = cohort_of(learners, SMALL, LAYERS, device=GPU)
            cohort.train(lambda cohort, loss: losses.append(loss))
        param = cohort.bank.param.cpu()
    assert not gpu.captures and len(losses) == 3
    assert [str(w.message) for w in caught if "CUDA graphs" in str(w.message)] == [
        "training goes on without CUDA graphs, which could not be captured: operation not permitted when stream is capturing"
    ]
    plain = cohort_of(learners, SMALL, LAYERS)
    plain.train()
    assert (param - plain.bank.param).norm() < 1e-5 * plain.bank.param.norm()
