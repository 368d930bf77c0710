"""csrc's ops on rows on a CPU: add_norm, dropout and its keys, the tagging heads and the token loss, by instruction set."""

from contextlib import contextmanager
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse
from test_triton_ops import HEADS, LENGTHS, assert_as_good, batch, normal, run, segments_of

import kloss.kernels as kernels
from kloss.kernels import Dropout, StepDropout, dropout, eager, heads_cpu, reference, row_keys, rows_cpu
from kloss.kernels.cpu_library import built
from kloss.kernels.dropout import row_dropout

pytestmark = pytest.mark.skipif(not built(), reason="csrc is not built")
VARIANTS = [(torch.float32, 0), (torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 0)]


@pytest.fixture(params=VARIANTS, ids=lambda variant: f"{str(variant[0])[6:]}-{variant[1]}")
def dtype(request, monkeypatch):
    """The element type, in each instruction set of this processor."""
    dtype, variant = request.param
    monkeypatch.setattr(rows_cpu, "VARIANT", variant)
    if not rows_cpu.serves(torch.empty(1, dtype=dtype)):
        pytest.skip("this processor has fewer instruction sets")
    return dtype


@contextmanager
def threads_set_to(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("width", [1, 20, 41, 48, 128, 384, 768])
def test_add_norm(width, p, dtype):
    _, keys, rows, row_sequence = batch(LENGTHS, behind=3, p=p)
    x, residual, dy = (normal(rows, width, dtype=dtype, seed=seed) for seed in range(3))
    weight, bias = (normal(width, dtype=dtype, seed=seed) for seed in range(2))
    whole, each = torch.zeros(width), F.pad(row_sequence, (0, 3), value=len(LENGTHS))
    assert_as_good(
        lambda *args: rows_cpu.add_norm(*args, 1e-5, keys),
        lambda *args: reference.add_norm(*args, 1e-5, dropout=keys),
        [x, residual, weight, bias], dy, [each, each, each, whole, whole],
    )  # fmt: skip


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_add_norm_computes_only_the_gradients_that_are_needed(p, dtype):
    _, keys, rows, _ = batch([200, 90], p=p)
    tensors = [normal(rows, 48, dtype=dtype), normal(rows, 48, dtype=dtype, seed=1), *normal(2, 48, dtype=dtype)]
    dy = normal(rows, 48, dtype=dtype, seed=2)
    wanted = run(lambda *args: rows_cpu.add_norm(*args, 1e-5, keys), tensors, dy)[1:]
    for needs in product([False, True], repeat=4):
        leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
        if any(needs):
            rows_cpu.add_norm(*leaves, 1e-5, keys).backward(dy)
        for leaf, need, gradient in zip(leaves, needs, wanted, strict=True):
            assert torch.equal(leaf.grad, gradient) if need else leaf.grad is None
    saved = tensors[0], tensors[1], tensors[2], dy[:, 0].float().contiguous(), dy[:, 1].float().contiguous()
    made = torch.ops.kloss.cpu_add_norm_backward(dy, *saved, *rows_cpu._lists(keys), True, True, False, rows_cpu.VARIANT)
    assert [tensor.numel() for tensor in made[2:]] == [0, 0], "frozen norms cost nothing"


def test_no_rows_and_strided_tensors(dtype):
    for rows in (0, 5):
        wide, weight, bias = normal(rows, 80, dtype=dtype), normal(40, dtype=dtype), normal(80, dtype=dtype)[::2]
        keys = Dropout(torch.tensor([0.5]), torch.tensor([3]), torch.arange(rows), 2)
        tensors = [wide[:, :40], wide[:, ::2], weight, bias]
        dense = [tensor.contiguous() for tensor in tensors]
        dy = normal(rows, 80, dtype=dtype)[:, 1::2]

        def norm(*args, keys=keys):
            return rows_cpu.add_norm(*args, 1e-5, keys)

        def gradients(tensors, dy, op=norm):
            leaves = [tensor.requires_grad_() for tensor in tensors]
            y = op(*leaves)
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

        assert equal(gradients(tensors, dy), gradients(dense, dy.contiguous()))
        drop = partial(rows_cpu.dropout, rows=row_dropout(keys))
        assert equal(gradients(tensors[1:2], dy, drop), gradients(dense[1:2], dy.contiguous(), drop))


@pytest.mark.parametrize("width", [1, 20, 41, 384])
def test_dropout_has_the_bits_of_its_formulas(width, dtype):
    _, keys, rows, _ = batch(LENGTHS, behind=3)
    x, dy = normal(rows, width, dtype=dtype), normal(rows, width, dtype=dtype, seed=1)
    got = run(lambda x: rows_cpu.dropout(x, row_dropout(keys)), [x], dy)
    assert equal(got, run(lambda x: reference.apply_dropout(x, keys), [x], dy))
    dropped = (got[0] == 0) & (x != 0)
    assert dropped.any() or width == 1
    sick = torch.where(dropped, torch.nan, x)
    assert torch.equal(rows_cpu.dropout(sick, row_dropout(keys)), got[0])
    y = rows_cpu.add_norm(sick, x, torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype), 1e-5, keys)
    assert y.isfinite().all(), "selected away, not multiplied"


def test_rows_depend_on_themselves_alone(dtype):
    """Bits of rows 7, 0 and 90: alone, shuffled, and among NaN."""
    _, keys, rows, _ = batch([100, 200])
    x, residual, dy = (normal(rows, 41, dtype=dtype, seed=seed) for seed in range(3))
    weight, bias = normal(2, 41, dtype=dtype)

    def bits(index, neighbours=1.0):
        index = torch.tensor(index)
        mine = torch.tensor([i in (7, 0, 90) for i in index])
        values, kept, d = (tensor[index].clone() for tensor in (x, residual, dy))
        for tensor in (values, kept, d):
            tensor[~mine] *= neighbours
        own = keys.take(index)
        made = [
            *run(lambda a, b: rows_cpu.add_norm(a, b, weight, bias, 1e-5, own), [values, kept], d),
            *run(lambda a: rows_cpu.dropout(a, row_dropout(own)), [values], d),
        ]  # fmt: skip
        order = index[mine].argsort()
        return [tensor[mine][order] for tensor in made]

    alone = bits([0, 7, 90])
    assert all(tensor.isfinite().all() for tensor in alone)
    for company in (bits([90, 0, 7]), bits(list(range(rows))[::-1]), bits(range(rows), torch.nan)):
        assert equal(alone, company)


@pytest.mark.parametrize("behind", [0, 3])
def test_keys_have_the_bits_of_their_formulas(behind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    row_key, seed = (torch.randint(-(1 << 63), (1 << 63) - 1, (n,), generator=generator) for n in (9000, 7))
    adapter = torch.randint(-1, 7, (9000,), generator=generator).int()
    p = torch.tensor([0.0, 0.5, 0.1, 0.99999, 2.5 / 65536, 3.5 / 65536, 65535.5 / 65536])
    cu_seqlens = torch.tensor([0, 5, 5, 9], dtype=torch.int64)
    step, number = torch.tensor([3, (1 << 31) - 1, 0]), torch.tensor([0, 5, (1 << 16) - 1])

    def values():
        made = [row_keys(step, number, cu_seqlens, rows=9 + behind), dropout.kept_scaling(torch.linspace(0.1, 9, 7), p)]
        for owner in (adapter, adapter.to(torch.int8), None):
            for site in (0, 71, 1 << 62, -1):
                made += row_dropout(Dropout(p, seed, row_key, site, owner))
        both = StepDropout(p, p, p / 2, seed, row_key, adapter, 5)
        for kind, site in (("hidden", 0), ("attention", 4), ("lora", 2)):
            made += both.at(kind, site).rows
        return made

    fast = values()
    monkeypatch.setattr(dropout, "built", lambda: False)
    assert equal(fast, values())


def test_keys_of_other_offsets_and_strided_seeds():
    keys = row_keys(torch.tensor([2, 9, 3])[::2], torch.tensor([1, 9, 0])[::2], torch.tensor([0, 9, 1, 9, 2])[::2])
    assert keys.tolist() == [2 << 32 | 1 << 16, 3 << 32]


def heads(name, dtype):
    lengths, adapter, adapters, k, n, behind = HEADS[name].values()
    rows = sum(lengths) + behind
    segments = segments_of(lengths, adapter, adapters, "cpu")
    weight = (normal(adapters, n, k) / k**0.5).to(dtype)
    labels = torch.randint(0, n, (rows,), generator=torch.Generator().manual_seed(0))
    labels[::3] = labels[5:6] = -100  # the third sequence of "odd", one row, has no label
    return segments, normal(rows, k, dtype=dtype), weight, normal(adapters, n, dtype=dtype), labels


@pytest.mark.parametrize("name", HEADS)
def test_adapter_linear(name, dtype):
    segments, x, weight, bias, _ = heads(name, dtype)
    dy = normal(x.shape[0], weight.shape[1], dtype=dtype)
    each, own = torch.arange(x.shape[0]), torch.arange(weight.shape[0])
    mine = partial(heads_cpu.adapter_linear, segments=segments)
    if name == "nobody":  # nothing depends on the weights
        assert not any(tensor.count_nonzero() for tensor in run(mine, [x, weight, bias], dy))
        return
    specified = partial(reference.adapter_linear, segments=segments)
    assert_as_good(mine, specified, [x, weight, bias], dy, [each, each, own, own])


def test_adapter_linear_of_many_rows_and_of_a_banks_views(dtype):
    """More rows and inputs than one job takes; weights that lie in a bank's rows; strided x and dy."""
    segments = segments_of([300, 40, 290], [0, 1, 0], 3, "cpu")
    x, dy = normal(635, 2 * 300, dtype=dtype)[:, ::2], normal(635, 2 * 111, dtype=dtype)[:, ::2]
    bank = (normal(3, 111 * 301 + 5) / 300**0.5).to(dtype)
    weight, bias = bank[:, : 111 * 300].unflatten(1, (111, 300)), bank[:, -111:]
    each, own = torch.arange(635), torch.arange(3)
    ops = (partial(op, segments=segments) for op in (heads_cpu.adapter_linear, reference.adapter_linear))
    assert_as_good(*ops, [x, weight, bias], dy, [each, each, own, own])
    leaves = [weight.detach().requires_grad_(), bias.detach().requires_grad_()]
    heads_cpu.adapter_linear(x, *leaves, segments).backward(dy)
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    heads_cpu.adapter_linear(x.contiguous(), *copies, segments).backward(dy.contiguous())
    assert equal([leaf.grad for leaf in leaves], [leaf.grad for leaf in copies])
    assert not leaves[0].grad[2].count_nonzero() and not leaves[1].grad[2].count_nonzero()


def test_no_adapters_and_no_rows(dtype):
    """Rows without an adapter are 0; a loss of nothing is 0 or empty."""
    for lengths, adapter, adapters in (([3], [-1], 0), ([], [], 2), ([0], [1], 2)):
        segments = segments_of(lengths, adapter, adapters, "cpu")
        rows = sum(lengths) + len(lengths)  # with one behind the last offset
        x, weight = normal(rows, 41, dtype=dtype), normal(adapters, 7, 41, dtype=dtype)
        mine = partial(heads_cpu.adapter_linear, segments=segments)
        made = run(mine, [x, weight, weight[:, :, 0]], torch.ones(rows, 7))
        loss = partial(heads_cpu.token_loss, labels=torch.zeros(rows).long(), segments=segments)
        made += run(lambda x, loss=loss: loss(x)[0], [x], torch.ones(adapters))
        assert not any(tensor.count_nonzero() for tensor in made)
        assert [len(tensor) for tensor in made] == [rows, rows, adapters, adapters, adapters, rows]


@pytest.mark.parametrize("name", HEADS)
def test_token_loss(name, dtype):
    segments, _, weight, _, labels = heads(name, dtype)
    rows, adapters, n = len(labels), len(weight), weight.shape[1]
    logits, dloss = normal(rows, n, dtype=dtype) * 3, normal(adapters)
    assert_as_good(
        lambda x: heads_cpu.token_loss(x, labels, segments)[0], lambda x: reference.token_loss(x, labels, segments)[0],
        [logits], dloss, [torch.zeros(adapters), torch.arange(rows)],
    )  # fmt: skip
    counts = heads_cpu.token_loss(logits, labels, segments)[1]
    assert counts.tolist() == reference.token_loss(logits, labels, segments)[1].tolist() and not counts.requires_grad


def test_token_loss_of_great_logits(dtype):
    """Differences are what counts; what is far below the largest is 0 and not NaN."""
    segments = segments_of([3], [0], 1, "cpu")
    logits = torch.tensor([[1e4, 0, -1e4], [-3e38, 0, 1], [-torch.inf, 5, 5]]).to(dtype)
    assert_as_good(
        lambda x: heads_cpu.token_loss(x, torch.tensor([0, 2, 1]), segments)[0],
        lambda x: reference.token_loss(x, torch.tensor([0, 2, 1]), segments)[0],
        [logits], torch.ones(1), [torch.zeros(1), torch.zeros(3)],
    )  # fmt: skip


def test_heads_and_loss_depend_on_the_adapter_alone(dtype):
    lengths, adapter = [4, 20, 7, 50, 9, 1], [0, 1, 2, 1, 3, 1]
    rows = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    x, weight, bias = normal(len(rows), 41, dtype=dtype), normal(4, 23, 41, dtype=dtype), normal(4, 23, dtype=dtype)
    labels = torch.randint(0, 23, (len(rows),), generator=torch.Generator().manual_seed(0))

    def bits(order, neighbours=1.0):
        index = torch.cat([(rows == s).nonzero()[:, 0] for s in order])
        mine = torch.tensor(adapter)[rows[index]] == 1
        values, w, b = x[index].clone(), weight.clone(), bias.clone()
        values[~mine] *= neighbours
        w[[0, 2, 3]] *= neighbours
        segments = segments_of([lengths[s] for s in order], [adapter[s] for s in order], 4, "cpu")
        leaves = [tensor.requires_grad_() for tensor in (values, w, b)]
        logits = heads_cpu.adapter_linear(*leaves, segments)
        loss = heads_cpu.token_loss(logits, labels[index], segments)[0]
        loss.sum().backward()
        dx, dw, db = (leaf.grad for leaf in leaves)
        mine = mine.nonzero()[:, 0]
        mine = mine[index[mine].argsort()]
        return loss[1].detach(), logits.detach()[mine], dx[mine], dw[1], db[1]

    alone = bits([1, 3, 5])
    assert all(tensor.isfinite().all() for tensor in alone)
    for company in (bits(range(6)), bits([1, 3, 2, 5]), bits([0, 1, 4, 3, 5]), bits(range(6), torch.nan)):
        assert equal(alone, company)


def test_two_threads_have_the_bits_of_one(dtype):
    segments = segments_of([700, 150, 550], [0, 1, 0], 2, "cpu")
    _, keys, rows, _ = batch([700, 150, 550])
    x, residual, dy = (normal(rows, 130, dtype=dtype, seed=seed) for seed in range(3))
    vectors, weight, labels = normal(2, 130, dtype=dtype), normal(2, 111, 130, dtype=dtype), torch.arange(rows) % 111

    def loss(x):
        return heads_cpu.token_loss(x, labels, segments)[0]

    def values():
        made = run(lambda *args: rows_cpu.add_norm(*args, 1e-5, keys), [x, residual, *vectors], dy)
        made += run(lambda a: rows_cpu.dropout(a, row_dropout(keys)), [x], dy)
        made += run(partial(heads_cpu.adapter_linear, segments=segments), [x, weight, weight[:, :, 0]], dy[:, :111])
        return made + run(loss, [x[:, :111]], torch.ones(2)) + list(row_dropout(keys))

    with threads_set_to(1):
        alone = values()
    for _ in range(3):
        with threads_set_to(2):
            assert equal(alone, values())


def test_what_is_served(monkeypatch):
    """fp32 goes to csrc, under autocast too; fp64, fp16 and an installation without csrc to plain torch. Values agree."""
    segments, x, weight, bias, labels = heads("odd", torch.float32)
    _, keys, rows, _ = batch([len(x)])
    called, names = [], ("cpu_add_norm", "cpu_dropout", "cpu_adapter_linear", "cpu_token_loss")
    real = {name: getattr(torch.ops.kloss, name) for name in names}
    for name, op in real.items():
        monkeypatch.setattr(torch.ops.kloss, name, lambda *args, name=name, op=op: called.append(name) or op(*args))

    def values(dtype=torch.float32):
        a, w, b = (tensor.to(dtype) for tensor in (x, weight, bias))
        vector = a[0]
        logits = kernels.adapter_linear(a, w, b, segments)
        made = kernels.add_norm(a, a, vector, vector, 1e-5, dropout=keys), kernels.apply_dropout(a, keys)
        return [*made, logits, kernels.token_loss(logits, labels, segments)[0]]

    fast = values()
    assert sorted(called) == sorted(names)
    called.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(values(), fast), "x's dtype is the result's"
    called.clear()
    for dtype in (torch.float64, torch.float16):
        values(dtype)
    monkeypatch.setattr(rows_cpu, "_loaded", lambda: False)
    monkeypatch.setattr(dropout, "built", lambda: False)
    plain = values()
    assert not called
    torch.testing.assert_close(fast, plain)


def test_without_dropout_torchs_norm_learns_and_csrcs_scores(monkeypatch):
    called, real = [], torch.ops.kloss.cpu_add_norm
    monkeypatch.setattr(torch.ops.kloss, "cpu_add_norm", lambda *args: called.append(1) or real(*args))
    x, vector = normal(4, 32), normal(32)
    learns = eager.add_norm(x, x, vector, vector, 1e-5)
    assert not called
    with torch.no_grad():
        scores = eager.add_norm(x, x, vector, vector, 1e-5)
    assert called
    assert_no_worse(scores, learns, F.layer_norm(2 * x.double(), (32,), vector.double(), vector.double(), 1e-5))


def hostile_calls():
    """Raw calls of the operators that fit, and changes that do not: (name, arguments, position, value)."""
    x, v, keys, t, s = torch.ones(6, 40), torch.ones(40), torch.arange(6), torch.zeros(6, dtype=torch.int16), torch.ones(6)
    order, ends, ids, owner = keys, torch.tensor([2, 5, 6]), keys % 3, torch.tensor([0, 1, 0, 0, 1, 0]).int()
    w, b, logits, far = torch.ones(2, 3, 40), torch.ones(2, 3), torch.ones(6, 3), torch.tensor([0, 1, 2, 3, 4, 6])
    drop, offsets = (keys, t, s), torch.tensor([0, 2, 6], dtype=torch.int32)
    valid = {
        "cpu_add_norm": (x, x, v, v, 1e-5, *drop, 0),
        "cpu_add_norm_backward": (x, x, x, v, s, s, *drop, True, True, True, 0),
        "cpu_dropout": (x, *drop, 0),
        "cpu_adapter_linear": (x, w, b, order, ends, 0),
        "cpu_adapter_linear_backward": (logits, x, w, order, ends, True, True, True, 0),
        "cpu_token_loss": (logits, ids, order, ends, owner, 0),
        "cpu_token_loss_backward": (s[:2], logits, ids, owner, keys[:2], x[:, :2].contiguous(), 0),
        "dropout_keys": (keys[:2], keys, owner, 0, 3),
        "dropout_limits": (s[:2] / 2, owner, 6),
        "kept_scaling": (s[:2], s[:2] / 2),
        "row_keys": (keys[:2], keys[:2], offsets, 7),
    }
    wrong = []
    for name, arguments in valid.items():
        for position, value in enumerate(arguments):
            if isinstance(value, torch.Tensor):
                bad = [value[..., :-1], value[:0], value[0], value.double(), value.new_zeros(()), value[None]]
                bad += [] if name.startswith("cpu_") else [value.to("meta")]  # these know the shapes of their results
                wrong += ((name, arguments, position, change) for change in bad)
    wrong += ((name, valid[name], -1, 9) for name in valid if name.startswith("cpu_"))  # no such variant
    for name, at in (("cpu_adapter_linear", 3), ("cpu_adapter_linear_backward", 3), ("cpu_token_loss", 2)):
        for change in (far, far - 1, -far, far + 2**62):
            wrong.append((name, valid[name], at, change))
        for change in ([2, 7, 6], [3, 2, 6], [-1, 5, 6], [2**62, 5, 6]):
            wrong.append((name, valid[name], at + 1, torch.tensor(change)))
    wrong += [("cpu_token_loss", valid["cpu_token_loss"], 1, ids + 1), ("cpu_token_loss", valid["cpu_token_loss"], 4, owner + 2)]
    wrong += [("cpu_token_loss_backward", valid["cpu_token_loss_backward"], 2, ids + 2**40)]
    wrong += [("cpu_token_loss_backward", valid["cpu_token_loss_backward"], 3, owner + 2**30)]
    wrong += [("dropout_keys", valid["dropout_keys"], at, change) for at, change in ((2, owner + 2), (4, -1), (4, 2**61))]
    wrong += [("dropout_limits", valid["dropout_limits"], at, change) for at, change in ((1, owner + 2), (2, -1), (2, 2**61))]
    wrong += [("row_keys", valid["row_keys"], at, change) for at, change in ((0, keys[:2] - 1), (1, keys[:2] + 65535), (3, 5))]
    wrong += [("row_keys", valid["row_keys"], 2, torch.tensor(bad).int()) for bad in ([0, 7, 6], [1, 2, 6], [0, -1, 6])]
    return valid, wrong


def test_the_operators_refuse_what_does_not_fit():
    valid, wrong = hostile_calls()
    taken = []
    for name, arguments in valid.items():
        getattr(torch.ops.kloss, name)(*arguments)
    for name, arguments, position, change in wrong:
        call = list(arguments)
        call[position] = change
        try:
            getattr(torch.ops.kloss, name)(*call)
        except (RuntimeError, NotImplementedError):
            continue
        shape = tuple(change.shape) if isinstance(change, torch.Tensor) else change
        taken.append((name, position, shape, str(getattr(change, "dtype", ""))))
    fewer_rows = [("cpu_token_loss_backward", 3, (rows,), "torch.int32") for rows in (5, 0)]  # the rest have no adapter
    assert taken == fewer_rows


def test_opcheck():
    assert rows_cpu.serves(torch.ones(1))  # registers the shapes of results
    valid, _ = hostile_calls()
    for name, arguments in valid.items():
        tests = ("test_schema", "test_faketensor") if name.startswith("cpu_") else "test_schema"
        torch.library.opcheck(getattr(torch.ops.kloss, name).default, arguments, test_utils=tests)
    x = torch.ones(6, 40)
    torch.library.opcheck(torch.ops.kloss.cpu_add_norm.default, (x, x, x[0], x[0], 1e-5, None, None, None, 0),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
