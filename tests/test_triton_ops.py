"""The Triton kernels of attention, add_norm, dropout, heads and loss against the specification, and isolation to the bit."""

from functools import partial

import pytest
import torch
from helpers import DEVICES, PLACES, assert_no_worse
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from kloss.kernels import Dropout, make_segments, reference, row_keys, token_loss_triton, triton_ops
from kloss.kernels.buckets import CLASSES, attention_tiles
from kloss.kernels.dropout import row_dropout
from kloss.kernels.tuned import bucket

LENGTHS = [3, 0, 16, 17, 33, 64, 65, 7]


def batch(lengths, *, behind=0, p=0.5, device="cpu", learners=3, site=3):
    """Offsets, dropout with a probability of its own for each learner, the rows in all, and each row's sequence."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    covered, sequences = int(cu_seqlens[-1]), torch.arange(len(lengths))
    row_sequence = torch.repeat_interleave(sequences, torch.tensor(lengths, dtype=torch.long))
    rows = covered + behind
    adapter = torch.cat([row_sequence % (learners + 1) - 1, torch.full((behind,), -1)]).int()
    keys = row_keys(torch.full((len(lengths),), 5), sequences, cu_seqlens, rows=rows)
    chances = torch.tensor([p, p / 3, 0.0][:learners])
    dropout = Dropout(chances, torch.arange(learners) * 7 + 3, keys, site, adapter) if p else None
    if dropout is not None and device != "cpu":
        dropout = Dropout(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in dropout))
    return cu_seqlens.to(device), dropout, rows, row_sequence


def cpu(dropout):
    return dropout and Dropout(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in dropout))


def run(op, tensors, dy, dtype=None):
    """The op's value and the gradients of its tensors."""
    leaves = [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in tensors]
    y = op(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


def assert_as_good(op, specified, tensors, dy, groups):
    """Value and gradients are no worse than the specification's in the same dtype. groups: one for each."""
    got = run(op, tensors, dy)
    on_cpu = [x.cpu() for x in tensors]
    plain, oracle = run(specified, on_cpu, dy.cpu()), run(specified, on_cpu, dy.cpu(), torch.float64)
    for mine, theirs, truth, group in zip(got, plain, oracle, groups, strict=True):
        assert_no_worse(mine.cpu(), theirs, truth, group)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (5, 20)])
def test_attention(heads, width, p, device, dtype):
    cu_seqlens, dropout, rows, _ = batch(LENGTHS, behind=5, p=p, device=device)
    tiles = attention_tiles(cu_seqlens, rows, dtype)
    qkv, dy = normal(rows, 3 * heads * width, dtype=dtype, device=device), normal(rows, heads * width, dtype=dtype, device=device)
    group = torch.searchsorted(cu_seqlens.cpu()[1:], torch.arange(rows), right=True)
    assert_as_good(
        lambda x: triton_ops.attention(x, heads, tiles, dropout),
        lambda x: reference.packed_attention(x, cu_seqlens.cpu(), heads, dropout=cpu(dropout)),
        [qkv], dy, [group, group],
    )  # fmt: skip
    out, gradient = run(lambda x: triton_ops.attention(x, heads, tiles, dropout), [qkv], dy)
    assert not out[-5:].count_nonzero() and not gradient[-5:].count_nonzero()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [200]])
def test_attention_of_few_sequences(lengths, device):
    cu_seqlens, _, rows, _ = batch(lengths, behind=2, p=0, device=device)
    qkv = normal(rows, 3 * 32, device=device)
    strided = torch.stack([cu_seqlens, cu_seqlens + 9], 1)[:, 0]
    out = triton_ops.attention(qkv, 2, attention_tiles(strided, rows, qkv.dtype), None)
    expected = reference.packed_attention(qkv.cpu(), cu_seqlens.cpu(), 2)
    torch.testing.assert_close(out.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_every_row_is_in_one_tile_of_its_class(device):
    cu_seqlens, _, rows, _ = batch(LENGTHS, behind=5, p=0, device=device)
    for dtype in (torch.float32, torch.float16):
        tiles, classes = attention_tiles(cu_seqlens, rows, dtype), CLASSES[bucket(dtype)]
        seen = torch.zeros(rows, dtype=torch.long)
        for height, entries in zip((*classes, classes[-1]), (*tiles.short, tiles.longer), strict=True):
            below = max((size for size in classes if size < height), default=0)
            for start, end, first in entries.tolist():
                last = min(first + height, end)
                seen[first:last] += 1
                if end > start and entries is not tiles.longer:
                    assert below < end - start <= height and first == start
        assert seen[:-5].eq(1).all() and not seen[-5:].count_nonzero(), dtype


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("own", [0, 3, 4, 6], ids=lambda own: f"{LENGTHS[own]} rows")
def test_attention_depends_on_the_sequence_alone(own, device, dtype):
    cu_seqlens, dropout, rows, row_sequence = batch(LENGTHS, device=device)
    qkv, dy = normal(rows, 3 * 48, dtype=dtype, device=device), normal(rows, 48, dtype=dtype, device=device)

    def bits(order, neighbours=1.0):
        index = torch.cat([(row_sequence == s).nonzero()[:, 0] for s in order])
        offsets = torch.tensor([0, *(LENGTHS[s] for s in order)]).cumsum(0).int().to(device)
        x, d = qkv[index].clone(), dy[index].clone()
        mine = (row_sequence[index] == own).to(device)
        x[~mine] *= neighbours
        d[~mine] *= neighbours
        tiles = attention_tiles(offsets, len(index), x.dtype)
        return [y[mine] for y in run(lambda x: triton_ops.attention(x, 3, tiles, dropout.take(index.to(device))), [x], d)]

    alone = bits([own])
    for company in (bits([own, 5]), bits([2, 7, own, 1, 5], torch.nan)):
        assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(alone, company, strict=True))


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("width", [20, 48])
def test_add_norm(width, p, device, dtype):
    """Sequence by sequence: row by row plain torch is nearly exact by chance, and fails itself, its columns in another order, in
    three rows of a thousand."""
    _, dropout, rows, sequence = batch(LENGTHS, behind=3, p=p, device=device)
    x, residual, dy = (normal(rows, width, dtype=dtype, device=device, seed=seed) for seed in range(3))
    weight, bias = (normal(width, dtype=dtype, device=device, seed=seed) for seed in range(2))
    whole, each = torch.zeros(width), torch.cat([sequence, torch.full((3,), len(LENGTHS))])
    assert_as_good(
        lambda *args: triton_ops.add_norm(*args, 1e-5, dropout),
        lambda *args: reference.add_norm(*args, 1e-5, dropout=cpu(dropout)),
        [x, residual, weight, bias], dy, [each, each, each, whole, whole],
    )  # fmt: skip


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_add_norm_adds_the_gradients_of_two_uses(p, device, dtype):
    _, dropout, rows, _ = batch(LENGTHS, behind=3, p=p, device=device)
    x, residual, dy = (normal(rows, 48, dtype=dtype, device=device, seed=seed) for seed in range(3))
    weight, bias = (normal(48, dtype=dtype, device=device, seed=seed) for seed in range(2))
    whole, each = torch.zeros(48), torch.arange(rows)

    def used_twice(op, keys, *args):
        y, again = op(*args, 1e-5, keys) if op is triton_ops.add_norm_twice else op(*args, 1e-5, dropout=keys)
        return y + 3 * again

    assert_as_good(
        partial(used_twice, triton_ops.add_norm_twice, dropout),
        partial(used_twice, reference.add_norm_twice, cpu(dropout)),
        [x, residual, weight, bias], dy, [each, each, each, whole, whole],
    )  # fmt: skip


def test_add_norm_of_one_use_is_that_of_two_to_the_bit():
    x, residual, weight, bias = (normal(*shape, seed=seed) for seed, shape in enumerate(((9, 40), (9, 40), (40,), (40,))))
    for i in range(2):
        one, two = ([x.clone().requires_grad_(), residual, weight, bias, 1e-5, None] for _ in range(2))
        triton_ops.add_norm(*one).square().sum().backward()
        triton_ops.add_norm_twice(*two)[i].square().sum().backward()
        assert torch.equal(one[0].grad, two[0].grad)


@pytest.mark.parametrize("device", DEVICES)
def test_add_norm_of_strided_tensors_and_no_rows(device):
    for rows in (0, 5):
        wide, weight, bias = normal(rows, 80, device=device), normal(40, device=device), normal(80, device=device)[::2]
        x, residual = wide[:, :40], wide[:, ::2]
        y = triton_ops.add_norm(x, residual, weight, bias, 1e-5, None)
        torch.testing.assert_close(y, reference.add_norm(x, residual, weight, bias, 1e-5))


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_norms_get_no_gradient(device):
    x, residual = normal(5, 40, device=device).requires_grad_(), normal(5, 40, device=device, seed=1)
    weight, bias = normal(40, device=device), normal(40, device=device).requires_grad_()
    triton_ops.add_norm(x, residual, weight, bias, 1e-5, None).sum().backward()
    assert x.grad is not None and weight.grad is None
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 5.0))


def embed_tables(width, rows, *, first=2, dtype=torch.float32, device="cpu"):
    """Ids; positions, some behind the table's end; tables of 11 words and of first + 4 positions; type, weight, bias."""
    ids, position = (torch.randint(0, end, (rows,), generator=torch.Generator().manual_seed(end)) for end in (11, 7))
    shapes = (11, width), (first + 4, width), (width,), (width,), (width,)
    tables = [normal(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)]
    return ids.to(device), position.to(device, torch.int32), tables


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("width", [21, 48])
def test_embed(width, p, device, dtype):
    _, dropout, rows, _ = batch(LENGTHS, behind=3, p=p, device=device)
    ids, position, tables = embed_tables(width, rows, dtype=dtype, device=device)
    dy = normal(rows, width, dtype=dtype, device=device)
    whole = torch.zeros(width)
    assert_as_good(
        lambda *args: triton_ops.embed(ids, position, *args, eps=1e-5, first=2, dropout=dropout),
        lambda *args: reference.embed(ids.cpu(), position.cpu(), *args, 1e-5, first_position=2, dropout=cpu(dropout)),
        tables, dy, [torch.arange(rows), torch.arange(11), torch.arange(6), whole, whole, whole],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_embed_of_ids_in_32_bits_strided_tables_and_no_rows(device):
    for rows in (0, 5):
        ids, position, (words, positions, *vectors) = embed_tables(20, rows, first=0, device=device)
        tables = words[:, ::2], positions[:, :10], *(vector[::2] for vector in vectors)
        y = triton_ops.embed(ids.int(), position.long(), *tables, eps=1e-5, first=0, dropout=None)
        torch.testing.assert_close(y, reference.embed(ids, position, *tables, 1e-5))


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_tables_get_no_gradient_and_a_frozen_model_saves_nothing(device):
    ids, position, tables = embed_tables(40, 5, device=device)
    assert triton_ops.embed(ids, position, *tables, eps=1e-5, first=2, dropout=None).grad_fn is None
    tables[1].requires_grad_()
    triton_ops.embed(ids, position, *tables, eps=1e-5, first=2, dropout=None).square().sum().backward()
    assert [table.grad is not None for table in tables] == [False, True, False, False, False]
    used = (position.long() + 2).clamp(max=5).unique()
    assert tables[1].grad[used].count_nonzero(1).all() and tables[1].grad.count_nonzero(1).count_nonzero() == len(used)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter: a GPU's assertion ends its process")
@pytest.mark.parametrize(("name", "value"), [("ids", 11), ("ids", -1), ("position", -1)])
def test_the_kernel_asserts_ids_within_their_tables(name, value, monkeypatch):
    """The launch asks for assertions, which the interpreter makes only under an option of its own."""
    ids, position, tables = embed_tables(20, 5)
    {"ids": ids, "position": position}[name][3] = value
    monkeypatch.setattr(interpreter, "interpreter_builder", interpreter.interpreter_builder)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    with pytest.raises(InterpreterError, match="a token id or a position is out of range"):
        triton_ops.embed(ids, position, *tables, eps=1e-5, first=2, dropout=None)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_dropout_keeps_the_same_elements(device, dtype):
    _, dropout, rows, _ = batch(LENGTHS, behind=3, device=device)
    x, dy = normal(rows, 20, dtype=dtype, device=device), normal(rows, 20, dtype=dtype, device=device, seed=1)
    got = run(lambda x: triton_ops.dropout(x, row_dropout(dropout)), [x], dy)
    expected = run(lambda x: reference.apply_dropout(x, cpu(dropout)), [x.cpu()], dy.cpu())
    assert all(torch.equal(one.cpu(), other) for one, other in zip(got, expected, strict=True))


HEADS = {
    "odd": dict(lengths=[5, 0, 1, 70, 3], adapter=[2, 1, 0, 2, -1], adapters=4, k=41, n=23, behind=3),
    "as many labels as MASSIVE": dict(lengths=[5, 2, 3], adapter=[1, 0, 1], adapters=2, k=64, n=111, behind=0),
    "several blocks": dict(lengths=[5, 2, 3], adapter=[1, 0, 1], adapters=2, k=140, n=150, behind=0),
    "nobody": dict(lengths=[4, 0], adapter=[-1, 1], adapters=2, k=16, n=7, behind=1),
}


def segments_of(lengths, adapter, adapters, device):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return make_segments(cu_seqlens, torch.tensor(adapter).int().to(device), adapters, rows=sum(lengths))


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("name", HEADS)
def test_adapter_linear(name, device, dtype):
    lengths, adapter, adapters, k, n, behind = HEADS[name].values()
    segments, host = (segments_of(lengths, adapter, adapters, d) for d in (device, "cpu"))
    rows = sum(lengths) + behind
    x, dy = normal(rows, k, dtype=dtype, device=device), normal(rows, n, dtype=dtype, device=device)
    weight, bias = (normal(adapters, n, k) / k**0.5).to(device, dtype), normal(adapters, n, dtype=dtype, device=device)
    each, own = torch.arange(rows), torch.arange(adapters)
    if name == "nobody":  # nothing depends on the weights
        y, *gradients = run(lambda *args: triton_ops.adapter_linear(*args, segments), [x, weight, bias], dy)
        assert not any(tensor.count_nonzero() for tensor in (y, *gradients))
        return
    assert_as_good(
        lambda *args: triton_ops.adapter_linear(*args, segments),
        lambda *args: reference.adapter_linear(*args, host),
        [x, weight, bias], dy, [each, each, own, own],
    )  # fmt: skip


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("name", HEADS)
def test_token_loss(name, device, dtype):
    lengths, adapter, adapters, _, n, behind = HEADS[name].values()
    segments, host = (segments_of(lengths, adapter, adapters, d) for d in (device, "cpu"))
    rows = sum(lengths) + behind
    logits, dloss = normal(rows, n, dtype=dtype, device=device), normal(adapters, device=device)
    labels = torch.randint(0, n, (rows,), generator=torch.Generator().manual_seed(0))
    labels[::3] = -100
    labels[5:6] = -100  # the third sequence, one row, has no label
    assert_as_good(
        lambda x: triton_ops.token_loss(x, labels.to(device), segments)[0],
        lambda x: reference.token_loss(x, labels, host)[0],
        [logits], dloss, [torch.zeros(adapters), torch.arange(rows)],
    )  # fmt: skip
    counts = triton_ops.token_loss(logits, labels.to(device), segments)[1]
    assert counts.tolist() == reference.token_loss(logits.cpu(), labels, host)[1].tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_of_more_labels_than_a_block_has(device):
    """As many as a language model's; some blocks have no finite logit, and one row's only finite one is its label's."""
    labels = 2 * token_loss_triton.BLOCK + 900
    segments, host = (segments_of([3, 2, 2], [0, 1, 0], 2, d) for d in (device, "cpu"))
    logits, label = 4 * normal(7, labels, device=device), torch.tensor([0, labels - 1, -100, 2048, 5, 4000, 2047])
    logits[3, :2048] = logits[4, 2048:] = -torch.inf
    logits[5, :4000] = logits[5, 4001:] = -torch.inf
    assert_as_good(
        lambda x: triton_ops.token_loss(x, label.to(device), segments)[0],
        lambda x: reference.token_loss(x, label, host)[0],
        [logits], normal(2, device=device), [torch.zeros(2), torch.arange(7)],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_the_loss_of_more_rows_than_are_added_up_together(device):
    lengths, adapter = [600, 20, 500], [0, 1, 0]
    segments, host = (segments_of(lengths, adapter, 2, d) for d in (device, "cpu"))
    assert sum(lengths[::2]) > 2 * token_loss_triton.ROWS
    logits, labels = normal(1120, 5, device=device), torch.arange(1120) % 5
    labels[::7] = -100
    assert_as_good(
        lambda x: triton_ops.token_loss(x, labels.to(device), segments)[0],
        lambda x: reference.token_loss(x, labels, host)[0],
        [logits], normal(2, device=device), [torch.zeros(2), host.row_adapter],
    )  # fmt: skip
    counts = triton_ops.token_loss(logits, labels.to(device), segments)[1]
    assert counts.tolist() == reference.token_loss(logits.cpu(), labels, host)[1].tolist()


@pytest.mark.parametrize("wrong", [9, 1000, -1, -101])
@pytest.mark.parametrize("device", DEVICES)
def test_a_label_that_is_no_class_makes_its_adapter_nan(device, wrong):
    segments = segments_of([4, 3, 5], [0, 1, 0], 2, device)
    logits, labels = normal(12, 9, device=device).requires_grad_(), torch.arange(12) % 9
    labels[5], labels[8] = wrong, -100
    loss, count = triton_ops.token_loss(logits, labels.to(device), segments)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True] and count.tolist() == [8, 3]
    assert logits.grad.isnan().any(1).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("device", DEVICES)
def test_heads_and_loss_depend_on_the_adapter_alone(device):
    lengths, adapter = [4, 20, 7, 50, 9, 1], [0, 1, 2, 1, 3, 1]
    rows = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    x, weight, bias = normal(len(rows), 40), normal(4, 23, 40), normal(4, 23)
    labels = torch.randint(0, 23, (len(rows),), generator=torch.Generator().manual_seed(0))

    def bits(order, neighbours=1.0):
        index = torch.cat([(rows == s).nonzero()[:, 0] for s in order])
        mine = torch.tensor(adapter)[rows[index]] == 1
        values, w, b = x[index].clone(), weight.clone(), bias.clone()
        values[~mine] *= neighbours
        w[[0, 2, 3]] *= neighbours
        segments = segments_of([lengths[s] for s in order], [adapter[s] for s in order], 4, device)
        leaves = [tensor.to(device).requires_grad_() for tensor in (values, w, b)]
        logits = triton_ops.adapter_linear(*leaves, segments)
        loss = triton_ops.token_loss(logits, labels[index].to(device), segments)[0]
        loss[1].backward()
        dx, dw, db = (leaf.grad.cpu() for leaf in leaves)
        mine = mine.nonzero()[:, 0]
        mine = mine[index[mine].argsort()]
        return loss[1].detach().cpu(), logits.detach().cpu()[mine], dx[mine], dw[1], db[1]

    alone = bits([1, 3, 5])
    for company in (bits(range(6)), bits([1, 3, 2, 5]), bits([0, 1, 4, 3, 5]), bits(range(6), torch.nan)):
        assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(alone, company, strict=True))


def test_opcheck():
    cu_seqlens, dropout, rows, _ = batch([5, 4, 70], behind=3)
    segments = segments_of([5, 4, 70], [1, 0, -1], 2, "cpu")
    tiles = attention_tiles(cu_seqlens, rows, torch.float32)
    lists = triton_ops._lists(dropout)

    def leaf(*shape):
        return normal(*shape).requires_grad_()

    labels = torch.zeros(rows, dtype=torch.long)
    samples = {
        "attention": (leaf(rows, 96), 2, [*tiles.short, tiles.longer, tiles.cu_seqlens], lists),
        "add_norm": (leaf(rows, 48), leaf(rows, 48), leaf(48), leaf(48), 1e-5, lists),
        "dropout": (leaf(rows, 48), *lists),
        "embed": (*embed_tables(48, rows)[:2], *(t.requires_grad_() for t in embed_tables(48, rows)[2]), 1e-5, 2, lists),
        "adapter_linear": (leaf(rows, 48), leaf(2, 7, 48), leaf(2, 7), triton_ops._segment_lists(segments)),
        "token_loss": (leaf(rows, 7), labels, segments.order, segments.ends, segments.row_adapter),
    }
    for name, arguments in samples.items():
        torch.library.opcheck(getattr(torch.ops.kloss, name).default, arguments)
