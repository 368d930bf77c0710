"""The bodies of csrc/shared on a CPU: AdamW of the bank, span counts and work lists, which a GPU runs too."""

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import assert_no_worse
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kloss.kernels import make_segments, multi_lora_cpu, reference, row_keys, shared_ops
from kloss.kernels.buckets import CLASSES, attention_tiles
from kloss.kernels.segments import with_work

pytestmark = pytest.mark.skipif(not multi_lora_cpu.built(), reason="csrc is not built")
BETAS, EPS = (0.9, 0.999), 1e-8
BOUNDED = settings(max_examples=60, deadline=None, derandomize=True, database=None)
STATE = ("param", "exp_avg", "exp_avg_sq", "step")


@pytest.fixture(params=[0, 1, 2])
def variant(request, monkeypatch):
    """Each instruction set of this processor."""
    monkeypatch.setattr(shared_ops, "VARIANT", request.param)
    try:
        update(bank(1, 1))
    except RuntimeError as error:
        assert "no such variant" in str(error)
        pytest.skip("this processor has fewer instruction sets")


@contextmanager
def threads_set_to(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bank(G: int, P: int, *, seed: int = 0, size: float = 1.0) -> dict[str, Tensor]:
    """Arguments of `adamw_` for rows in mid-training, no two alike. size: of the gradients."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(G, P, generator=generator) for _ in range(4)]
    clips = torch.tensor([1.0, torch.inf, 0.5, 1e4])
    return dict(
        param=normal[0], grad=normal[1] * size, exp_avg=normal[2] * 1e-3, exp_avg_sq=(normal[3] * 1e-3).square(),
        step=torch.randint(0, 500, (G,), generator=generator), lr=torch.rand(G, generator=generator) * 1e-2,
        weight_decay=torch.rand(G, generator=generator), max_norm=clips[torch.arange(G) % 4],
        active=torch.ones(G, dtype=torch.bool),
    )  # fmt: skip


def update(state: dict[str, Tensor], op=shared_ops.adamw_, **more) -> Tensor:
    state = dict(state)
    matrices = [state.pop(name) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "step", "lr")]
    return op(*matrices, betas=BETAS, eps=EPS, **state, **more)


def copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c, rounded once but for a double rounding that none of these numbers meets."""
    return (a.double() * b.double() + c.double()).float()


def by_the_formula(state: dict[str, Tensor], norms: Tensor, g: int) -> tuple[Tensor, ...]:
    """Row g after the update: the header's formula, operation by operation in fp32."""
    p, m, v, step = (state[name][g] for name in STATE)
    count, (beta_1, beta_2) = int(step) + 1, BETAS
    lr, decay, most, norm = (float(x[g]) for x in (state["lr"], state["weight_decay"], state["max_norm"], norms))
    rate, root = -lr / (1 - beta_1**count), (1 - beta_2**count) ** 0.5
    clip, kept, w, keep, gain, rate, root, least = (
        torch.tensor(x, dtype=torch.float64).float()
        for x in (1 / max(1.0, (norm + 1e-6) / most), 1 - lr * decay, 1 - beta_1, beta_2, 1 - beta_2, rate, root, EPS)
    )
    x = state["grad"][g].float() * clip
    m = fused(w, x - m, m)
    v = fused(gain * x, x, keep * v)
    wide_root = v.double().sqrt().float()  # torch's own in fp32 is not always the nearest number
    return p * kept + rate * m / (wide_root / root + least), m, v, step + 1


@pytest.mark.parametrize("width", [0, 1, 37, 4096, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adamw_is_the_formula_to_the_bit(width, dtype, variant):
    state = bank(4, width) | {"step": torch.tensor([0, 1, 99, 12345])}
    state["grad"] = state["grad"].to(dtype)
    before, work = copies(state), state["param"].to(dtype, copy=True)
    norms = update(state, work=work)
    assert_no_worse(norms, before["grad"].float().norm(dim=1), before["grad"].double().norm(dim=1))
    for g in range(4):
        wanted = by_the_formula(before, norms, g)
        assert all(torch.equal(state[name][g], value) for name, value in zip(STATE, wanted, strict=True)), g
    assert torch.equal(work, state["param"].to(dtype))


@pytest.mark.parametrize("tail", [0, 1, 4096, 5000, 8999, 9000])
def test_columns_of_the_tail_have_their_own_rate(tail, variant):
    state = bank(4, 9000)
    ordinary, other, both = copies(state), copies(state), copies(state)
    rates = state["lr"] * 7
    norms = [update(ordinary), update(other | {"lr": rates}), update(both, tail=tail, tail_lr=rates)]
    assert torch.equal(norms[0], norms[2]) and torch.equal(ordinary["exp_avg_sq"], both["exp_avg_sq"])
    assert torch.equal(both["param"], torch.cat([ordinary["param"][:, :tail], other["param"][:, tail:]], 1))
    with pytest.raises(RuntimeError, match="tail must be a column"):
        update(both, tail=9001, tail_lr=rates)


class PlainTorch:
    """An optimiser of torch's for each row, and its clipping."""

    def __init__(self, state: dict[str, Tensor], **more):
        self.state, self.rows = state, [torch.nn.Parameter(row.clone()) for row in state["param"]]
        settings_of = zip(self.rows, state["lr"].tolist(), state["weight_decay"].tolist(), strict=True)
        self.optimisers = [
            torch.optim.AdamW([p], lr=lr, betas=BETAS, eps=EPS, weight_decay=d, **more) for p, lr, d in settings_of
        ]

    def update(self, grad: Tensor) -> Tensor:
        norms = []
        for row, optimiser, d, most in zip(self.rows, self.optimisers, grad, self.state["max_norm"], strict=True):
            row.grad = d.to(row.dtype, copy=True)
            norms.append(torch.nn.utils.clip_grad_norm_([row], float(most)))
            optimiser.step()
        return torch.stack(norms)

    def matrix(self, name: str) -> Tensor:
        if name == "param":
            return torch.stack([row.detach() for row in self.rows])
        return torch.stack([o.state[p][name] for o, p in zip(self.optimisers, self.rows, strict=True)])


def fresh(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows before their first step."""
    return state | {name: torch.zeros_like(state[name]) for name in STATE[1:]}


def test_100_steps_are_no_worse_than_torchs(variant):
    state = fresh(bank(4, 5000))
    plain, exact = PlainTorch(state, fused=True), PlainTorch(state | {"param": state["param"].double()})
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        state["grad"] = torch.randn(4, 5000, generator=generator) * 0.1
        assert_no_worse(update(state), plain.update(state["grad"]), exact.update(state["grad"]))
    for name in STATE[:3]:
        assert_no_worse(state[name], plain.matrix(name), exact.matrix(name))
    assert torch.equal(state["step"], torch.full((4,), 100))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="torch may fuse other products elsewhere")
def test_adamw_has_the_bits_of_torchs_fused_one():
    state = fresh(bank(3, 4096) | {"max_norm": torch.full((3,), torch.inf)})
    theirs = PlainTorch(state, fused=True)
    for seed in range(5):
        state["grad"] = torch.randn(3, 4096, generator=torch.Generator().manual_seed(seed))
        theirs.update(state["grad"])
        update(state)
        assert all(torch.equal(state[name], theirs.matrix(name)) for name in STATE[:3]), seed


@pytest.mark.parametrize("poison", [None, torch.nan, torch.inf, -torch.inf])
def test_rows_that_do_not_move_are_untouched_to_the_bit_and_others_do_not_notice(poison, variant):
    """Row 1 idle, or with a gradient that is not finite, at either end of its chunks."""
    for at in (0, 8999):
        state, alone = bank(4, 9000), bank(4, 9000)
        if poison is None:
            state["active"][1] = False
        else:
            state["grad"][1, at] = poison
        work, before = state["param"].bfloat16() + 1, copies(state)
        old = work.clone()
        norms = update(state, work=work)
        assert all(torch.equal(state[name][1], before[name][1]) for name in STATE) and torch.equal(work[1], old[1])
        assert norms[1] == 0 if poison is None else not norms[1].isfinite()
        for g in (0, 2, 3):
            own = {name: tensor[g : g + 1].clone() for name, tensor in alone.items()}
            assert update(own) == norms[g]
            assert all(torch.equal(state[name][g], own[name][0]) for name in STATE), g
            assert not torch.equal(state["param"][g], before["param"][g])


def test_rows_have_the_same_bits_on_any_threads_and_in_any_company():
    """So many weights that the rows are not all computed at once."""
    state = bank(3, 2**20 + 5)
    after = []
    for threads in (1, 2):
        with threads_set_to(threads):
            after.append(copies(state))
            after[-1]["norms"] = update(after[-1])
    assert_no_worse(after[0]["norms"], state["grad"].norm(dim=1), state["grad"].double().norm(dim=1))
    alone = {name: tensor[2:].clone() for name, tensor in state.items()}
    assert torch.equal(update(alone), after[0]["norms"][2:])
    assert all(torch.equal(after[0][name], after[1][name]) for name in (*STATE, "norms"))
    assert all(torch.equal(after[0][name][2:], alone[name]) for name in STATE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_fp32_refresh_a_copy_of_any_type(dtype, variant):
    state, wanted = bank(2, 300), bank(2, 300)
    work = state["param"].to(dtype)
    update(state, work=work), update(wanted)
    assert torch.equal(state["param"], wanted["param"]) and torch.equal(work, state["param"].to(dtype))


def test_rows_may_lie_apart(variant):
    state, wanted = bank(3, 37), bank(3, 37)
    wide = {name: torch.full((3, 50), 7.0) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    for name, matrix in wide.items():
        matrix[:, 3:40] = state[name]
        state[name] = matrix[:, 3:40]
    work = torch.full((3, 41), 7.0).bfloat16()
    assert torch.equal(update(state, work=work[:, 1:38]), update(wanted))
    assert all(torch.equal(state[name], wanted[name]) for name in STATE)
    assert torch.equal(work[:, 1:38], wanted["param"].bfloat16())
    assert (work[:, [0, 38, 39, 40]] == 7).all()
    assert all((matrix[:, :3] == 7).all() and (matrix[:, 40:] == 7).all() for matrix in wide.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_is_rounded_and_widened_as_torch_does(dtype, variant):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    neighbours = every.float().view(torch.int32)[:, None] + torch.tensor([-1, 0, 1, 2**12, 2**15, 2**12 - 1, 2**15 + 1])
    still = bank(1, neighbours.numel()) | {"lr": torch.zeros(1)}
    still["param"] = neighbours.reshape(1, -1).int().view(torch.float32)
    still["param"] = torch.where(still["param"].isnan(), torch.nan, still["param"])
    work = torch.zeros_like(still["param"], dtype=dtype)
    update(still, work=work)
    wanted = still["param"].to(dtype)
    assert torch.equal(work.isnan(), wanted.isnan())
    assert torch.equal(*(torch.where(wanted.isnan(), 0, side).view(torch.int16) for side in (work, wanted)))
    grads = torch.where(every.float().abs() < 1e18, every, 0)
    moved = bank(1, grads.numel()) | {"grad": grads[None], "max_norm": torch.tensor([torch.inf])}
    moved["exp_avg"].zero_()
    update(moved)
    assert torch.equal(moved["exp_avg"][0], grads.float() * torch.tensor(1 - BETAS[0], dtype=torch.float64).float())


def test_adamw_refuses_what_does_not_fit():
    for change, message in (
        (dict(grad=torch.zeros(2, 8)), "grad must be"),
        (dict(grad=torch.zeros(3, 8, dtype=torch.float64)), "grad must be fp32, bf16 or fp16"),
        (dict(param=torch.zeros(8, 3).t()), "param must be"),
        (dict(exp_avg=torch.zeros(1, 8).expand(3, 8)), "exp_avg must be"),
        (dict(exp_avg_sq=torch.zeros(3, 8).half()), "must be fp32"),
        (dict(step=torch.zeros(3)), "step has another type"),
        (dict(step=torch.tensor([0, -1, 0])), "step has a value outside"),
        (dict(lr=torch.zeros(2)), "lr has another shape"),
        (dict(active=torch.ones(3)), "active has another type"),
        (dict(work=torch.zeros(3, 9)), "work must be"),
        (dict(work=torch.zeros(3, 8), grad=torch.zeros(3, 8).half()), "work must have grad's type"),
    ):
        with pytest.raises(RuntimeError, match=message):
            update(bank(3, 8) | change)
    state = bank(3, 8)
    with pytest.raises(RuntimeError, match="work must not be param"):
        update(state, work=state["param"])


def test_huge_pages_are_asked_for_and_contents_stay():
    """Of a tensor that begins and ends within a page, of none and of one too small for a page."""
    assert torch.equal(shared_ops.huge_pages(torch.arange(9)[1:8]), torch.arange(1, 8))
    assert shared_ops.huge_pages(torch.empty(0)).numel() == 0
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        pytest.skip("this system has no huge pages")
    filled = shared_ops.huge_pages(torch.empty(2**22 + 3)[3:]).fill_(7)
    middle, flags = filled.data_ptr() + filled.nbytes // 2, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(match[1], 16) <= middle < int(match[2], 16)
        elif here and line.startswith("VmFlags:"):
            flags = line
    assert (filled == 7).all() and " hg" in flags, flags


LABELS = torch.tensor([0, 1, 2, 1, 1, 2, 2]), torch.tensor([-1, 0, 0, 1, 2, 3, 2])  # slot 1 has no I, slot 3 no B
PACKED = st.lists(
    st.tuples(st.integers(0, 4), st.lists(st.tuples(st.integers(0, 6), st.integers(-2, 6), st.booleans()), max_size=40)),
    max_size=9,
)


@BOUNDED
@given(PACKED, st.booleans(), st.sampled_from([torch.int64, torch.int32]))
@example([(0, [(2, 2, True)] * 33 + [(2, 2, False)] + [(1, 1, True)] * 31)], True, torch.int64)
def test_span_counts_are_the_references(sequences, named, dtype):
    rows = [row for _, sequence in sequences for row in sequence]
    gold = torch.tensor([gold for _, gold, _ in rows], dtype=torch.int64)
    pred = torch.tensor([max(gold, 0) if same else pred for pred, gold, same in rows], dtype=torch.int64)
    borders = torch.tensor([0, *(len(sequence) for _, sequence in sequences)]).cumsum(0).int()
    group = torch.tensor([group for group, _ in sequences], dtype=torch.int64)
    keywords = dict(zip(("tags", "types"), LABELS, strict=True)) if named else {}
    behind = torch.full((3,), 1)
    arguments = torch.cat([pred, behind]).to(dtype), torch.cat([gold, behind]).to(dtype), borders, group, 5
    assert torch.equal(shared_ops.span_counts(*arguments, **keywords), reference.span_counts(*arguments, **keywords))


def test_span_counts_of_many_sequences_on_two_threads():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 90, (700,), generator=generator)
    borders = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    gold, pred = torch.randint(-3, 7, (2, int(borders[-1])), generator=generator)
    arguments = torch.where(pred < 0, gold.clamp(min=0), pred), gold, borders, torch.randint(0, 3, (700,), generator=generator), 4
    for keywords in ({}, dict(zip(("tags", "types"), LABELS, strict=True))):
        counts = shared_ops.span_counts(*arguments, **keywords)
        assert torch.equal(counts, reference.span_counts(*arguments, **keywords)) and counts[:3].min() > 100
        pred, gold, borders, group, groups = arguments
        copies, rows = 20, len(gold)  # so many that both threads have work
        far = torch.cat([borders[:1], *(borders[1:] + i * rows for i in range(copies))])
        with threads_set_to(2):
            many = shared_ops.span_counts(pred.repeat(copies), gold.repeat(copies), far, group.repeat(copies), groups, **keywords)
        assert copies * rows > 2**19 and torch.equal(many, counts * copies)


def test_span_counts_refuse_what_is_out_of_range():
    ids, borders, group = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3]), torch.tensor([0, 1])
    names = dict(zip(("tags", "types"), LABELS, strict=True))
    shared_ops.span_counts(torch.tensor([0, 7, 2]), torch.tensor([0, -100, 2]), borders, group, 2, **names)  # it does not count
    for arguments, keywords, message in (
        ((ids + 5, ids, borders, group, 2), names, "a label that is not in tags"),
        ((ids, ids + 5, borders, group, 2), names, "a label that is not in tags"),
        ((ids - 1, ids, borders, group, 2), {}, "below 0"),
        ((ids + 2**31, ids, borders, group, 2), {}, "2.29 or more"),
        ((ids, ids, borders, group, 2), {"tags": LABELS[0], "types": LABELS[1] * 2**30, "strict": True}, "types has a value"),
        ((ids, ids, borders, group, 1), {}, "group has a value outside 0..0"),
        ((ids, ids, borders + 1, group, 2), {}, "start at 0"),
        ((ids, ids, torch.tensor([0, 3, 1]), group, 2), {}, "not decrease"),
        ((ids[:2], ids[:2], borders, group, 2), {}, "within the 2 rows"),
        ((ids, ids[:2], borders, group, 2), {}, "gold has another shape"),
        ((ids, ids, borders, group, 2), {"tags": LABELS[0]}, "belong together"),
    ):
        with pytest.raises(RuntimeError, match=message):
            shared_ops.span_counts(*arguments, **keywords)


def same_lists(lengths: list[int], owners: list[int], adapters: int, behind: int) -> None:
    """`work_lists` has the bits of what torch makes of the same batch, its threads run forwards or backwards."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    owner, rows = torch.tensor(owners, dtype=torch.int32), int(cu[-1]) + behind
    step, sequence = torch.arange(adapters) * 1_000_003 % 2**31, torch.arange(len(lengths)) * 7 % 2**16
    wanted = with_work(make_segments(cu, owner, adapters, rows=rows))
    own_step = torch.cat([step, torch.zeros(1, dtype=torch.int64)])[owner.long()]
    keys = row_keys(own_step, sequence, cu, rows=rows)
    row = torch.arange(rows, dtype=torch.int32)
    position = row - cu[torch.searchsorted(cu[1:], row, right=True)]
    for backwards in (False, True):
        for classes, dtype in ((len(CLASSES["half"]), torch.float16), (len(CLASSES["single"]), torch.float32), (0, None)):
            got = shared_ops.work_lists(
                cu, owner, adapters, rows, step=step, sequence=sequence, classes=classes, backwards=backwards
            )
            for name in ("row_adapter", "order", "ends"):
                mine, theirs = getattr(got.segments, name), getattr(wanted, name)
                assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype, name
            for name, mine, theirs in zip(wanted.work._fields, got.segments.work, wanted.work, strict=True):
                unowned = name == "chunks" and not adapters  # their slots differ and nobody reads them
                assert torch.equal(mine[:, :3], theirs[:, :3]) if unowned else torch.equal(mine, theirs), name
            assert torch.equal(got.row_key, keys) and torch.equal(got.position, position)
            if dtype is None:
                assert got.short == () and got.longer is None
            if dtype is None or not rows:  # of no rows `attention_tiles` makes nothing
                continue
            tiles = attention_tiles(cu, rows, dtype)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(got.short, tiles.short, strict=True))
            assert torch.equal(got.longer, tiles.longer)
    without = shared_ops.work_lists(cu, owner, adapters, rows)
    assert without.row_key is None and torch.equal(without.segments.order, wanted.order)


BATCHES = st.integers(0, 5).flatmap(
    lambda adapters: st.tuples(
        st.lists(st.tuples(st.one_of(st.integers(0, 20), st.integers(0, 1500)), st.integers(-1, adapters - 1)), max_size=8),
        st.just(adapters),
        st.sampled_from([0, 0, 1, 9, 1100]),
    )
)


@BOUNDED
@given(BATCHES)
@example(([(64, 0), (65, 0), (16, 1), (17, 1), (32, 1), (33, -1), (1, 0)], 2, 0))
@example(([], 0, 0))
@example(([(0, 0)] * 5, 1, 0))
def test_lists_have_the_bits_of_torchs(batch):
    sequences, adapters, behind = batch
    same_lists([length for length, _ in sequences], [owner for _, owner in sequences], adapters, behind)


@pytest.mark.parametrize(("adapters", "count"), [(52, 6000), (700, 300), (3, 130)])
def test_lists_of_a_large_batch_in_any_order_on_two_threads(adapters, count):
    generator = torch.Generator().manual_seed(adapters)
    lengths = torch.randint(0, 24, (count,), generator=generator)
    lengths[:3] = torch.tensor([3000, 64, 65])
    owners = torch.randint(-1, adapters, (count,), generator=generator)
    with threads_set_to(2):
        same_lists(lengths.tolist(), owners.tolist(), adapters, 77)
        same_lists(lengths.tolist(), owners.sort().values.tolist(), adapters, 0)


def test_lists_refuse_what_is_out_of_range():
    cu, owner, none = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), torch.zeros(2).long()
    for arguments, keywords, message in (
        ((cu, owner, 1, 5), {}, r"lie in \[-1, 1\), got 1"),
        ((cu, owner - 2, 2, 5), {}, r"got -2"),
        ((cu, owner, 2, 4), {}, "within the 4 rows"),
        ((cu + 1, owner, 2, 6), {}, "start at 0"),
        ((cu.flip(0) - 5, owner, 2, 6), {}, "start at 0, not decrease"),
        ((cu.long(), owner, 2, 5), {}, "cu_seqlens has another type"),
        ((cu, owner[:1], 2, 5), {}, "adapter has another shape"),
        ((cu, owner, 2, 5), dict(step=none), "belong together"),
        ((cu, owner, 2, 5), dict(step=none - 1, sequence=none), "step has a value outside"),
        ((cu, owner, 2, 5), dict(step=none, sequence=none + 2**16), "sequence has a value outside"),
        ((cu, owner, 2, 5), dict(step=none[:1], sequence=none), "step has another shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            shared_ops.work_lists(*arguments, **keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [37, 9000, 2**20 + 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adamw_has_the_same_bits_on_a_gpu(width, dtype):
    state = bank(4, width)
    state["grad"], state["active"][1], state["grad"][2, 5] = state["grad"].to(dtype), False, torch.nan
    there = {name: tensor.cuda() for name, tensor in state.items()}
    work = state["param"].to(dtype, copy=True)
    work_there = work.cuda()
    assert shared_ops.runs_on(torch.device("cuda"))
    for _ in range(3):
        assert torch.equal(update(there, work=work_there).nan_to_num().cpu(), update(state, work=work).nan_to_num())
        assert all(torch.equal(there[name].cpu(), state[name]) for name in STATE) and torch.equal(work_there.cpu(), work)


@pytest.mark.gpu
def test_lists_and_counts_are_the_same_on_a_gpu_and_a_graph_replays_them():
    assert shared_ops.runs_on(torch.device("cuda"))
    generator = torch.Generator().manual_seed(0)
    step, rows, batches = torch.arange(52), 20_000, []
    for _ in range(2):
        cu = torch.cat([torch.zeros(1), torch.randint(0, 24, (1664,), generator=generator).cumsum(0).clamp(max=rows)]).int()
        owner = torch.randint(-1, 52, (1664,), generator=generator).int()
        batches.append([cu, owner, torch.randint(0, 99, (1664,), generator=generator)])
    static = [tensor.cuda() for tensor in batches[0]]

    def lists(cu, owner, sequence, step):
        return shared_ops.work_lists(cu, owner, 52, rows, step=step, sequence=sequence, classes=3)

    def leaves(made):
        return [made.segments.row_adapter, made.segments.order, *made.segments.work, made.row_key, made.position, *made.short]

    lists(*static, step.cuda())  # loads the library
    on_gpu, graph = step.cuda(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = lists(*static, on_gpu)
    for batch in batches:
        for into, tensor in zip(static, batch, strict=True):
            into.copy_(tensor)
        graph.replay()
        wanted = lists(*batch, step)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(leaves(made), leaves(wanted), strict=True))
        assert torch.equal(made.longer.cpu(), wanted.longer) and torch.equal(made.segments.ends.cpu(), wanted.segments.ends)
    gold, pred = torch.randint(-3, 7, (2, rows), generator=generator)
    arguments = pred.clamp(min=0), gold, batches[0][0], batches[0][2] % 5, 5
    for keywords in ({}, dict(zip(("tags", "types"), LABELS, strict=True))):
        there = [t.cuda() if isinstance(t, Tensor) else t for t in arguments], {n: t.cuda() for n, t in keywords.items()}
        counts = shared_ops.span_counts(*there[0], **there[1])
        assert torch.equal(counts.cpu(), shared_ops.span_counts(*arguments, **keywords))


def test_the_operators_say_what_they_write():
    ops, state, norms = torch.ops.kloss, bank(2, 9), torch.zeros(2)
    order = ("param", "grad", "exp_avg", "exp_avg_sq", "step", "lr", "weight_decay", "max_norm", "active")
    values = [state[name] for name in order]
    arguments = *values[:6], 5, values[5], *values[6:], *BETAS, EPS, torch.zeros(2, 9), 0, norms
    torch.library.opcheck(ops.adamw_.default, arguments, test_utils="test_schema")
    ids, cu = torch.tensor([1, 2, 0]), torch.tensor([0, 3], dtype=torch.int32)
    counts = torch.zeros(1, 3, dtype=torch.int64)
    torch.library.opcheck(ops.span_counts_.default, (ids, ids, cu, ids[2:], *LABELS, counts), test_utils="test_schema")
    ints, longs = (lambda *shape, dtype=dtype: torch.zeros(shape, dtype=dtype) for dtype in (torch.int32, torch.int64))
    lists = ints(3), longs(3), longs(2), ints(1, 3), ints(1, 3), ints(1, 4), ints(2), ints(1, 3), None, None, ints(0, 3), longs(3)
    torch.library.opcheck(
        ops.work_lists_.default, (cu, ints(1), longs(1), longs(1), False, *lists, ints(3)), test_utils="test_schema"
    )
