"""Segments: rows grouped by adapter, and the work lists that kernels walk."""

import pytest
import torch
from helpers import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st

from kloss.kernels import checks, make_segments, segments
from kloss.kernels.segments import LONG_TILE, SHORT_TILE, slot_capacity, tile_capacity, with_work

BATCHES = st.integers(0, 5).flatmap(
    lambda adapters: st.tuples(
        st.just(adapters),
        st.lists(st.tuples(st.one_of(st.integers(0, 3), st.integers(0, 300)), st.integers(-1, adapters - 1)), max_size=8),
        st.integers(0, 9),
    )
)


def build(batch, **more):
    adapters, sequences, _ = batch
    cu_seqlens = torch.tensor([0, *(length for length, _ in sequences)]).cumsum(0).to(torch.int32)
    adapter = torch.tensor([name for _, name in sequences], dtype=torch.int32)
    return make_segments(cu_seqlens, adapter, adapters, **more)


@settings(max_examples=60, deadline=None)
@given(BATCHES)
def test_order_and_runs_are_a_stable_sort_by_adapter(batch):
    adapters, sequences, behind = batch
    rows = [name for length, name in sequences for _ in range(length)] + [-1] * behind
    got = build(batch, rows=len(rows))
    wanted = sorted(range(len(rows)), key=lambda t: (rows[t] if rows[t] >= 0 else adapters, t))
    assert got.order.tolist() == wanted and got.row_adapter.tolist() == rows
    assert got.sorted == (wanted == list(range(len(rows))))
    for g, start, end in got.runs:
        assert start < end and all(rows[t] == g for t in wanted[start:end])
    assert sum(end - start for _, start, end in got.runs) == sum(name >= 0 for name in rows)
    assert [g for g, _, _ in got.runs] == sorted({name for name in rows if name >= 0})


@settings(max_examples=60, deadline=None)
@given(BATCHES)
def test_tiles_cover_every_row_once_and_start_at_their_adapter(batch):
    """An adapter's tiles depend on its own number of rows alone."""
    adapters, _, behind = batch
    total = build(batch).order.numel() + behind
    got = with_work(build(batch, rows=total))
    starts = [0, *got.ends.tolist()]
    for tiles, size in ((got.work.tiles_64, SHORT_TILE), (got.work.tiles_128, LONG_TILE)):
        assert tiles.shape == (tile_capacity(total, adapters, size), 3)
        covered = torch.zeros(total, dtype=torch.int32)
        for g, first, last in tiles.tolist():
            if first == last:
                continue
            home = g if g >= 0 else adapters
            assert starts[home] <= first < last <= starts[home + 1] and last - first <= size
            assert (first - starts[home]) % size == 0 and (last - first == size or last == starts[home + 1])
            covered[first:last] += 1
        assert (covered == 1).all()


@settings(max_examples=60, deadline=None)
@given(BATCHES, st.sampled_from([8, 64, 1024]))
def test_chunks_give_every_adapter_its_rows_in_order(batch, size):
    adapters = batch[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "CHUNK", size)
        got = with_work(build(batch))
        limit = slot_capacity(got.order.numel())
    starts, slots = [0, *got.ends.tolist()], got.work.slots.tolist()
    assert slots[0] == 0 and slots[-1] <= limit
    seen = {g: [] for g in range(adapters)}
    for g, first, last, slot in got.work.chunks.tolist():
        if g >= 0:
            seen[g].append((first, last, slot))
    for g, parts in seen.items():
        count = starts[g + 1] - starts[g]
        assert [first for first, _, _ in parts] == list(range(starts[g], starts[g] + max(count, 1), size))
        assert [last for _, last, _ in parts] == [min(first + size, starts[g + 1]) for first, _, _ in parts]
        several = len(parts) > 1
        assert [slot for _, _, slot in parts] == (list(range(slots[g], slots[g + 1])) if several else [-1])
        assert slots[g + 1] - slots[g] == (len(parts) if several else 0)


def test_capacity_is_reached_and_no_more():
    """The worst batch fills the list: every group leaves a part-filled tile, rows without an adapter too."""
    rows, adapters = 4 * SHORT_TILE + 5, 4
    tight = with_work(build((adapters, [(SHORT_TILE + 1, g) for g in range(4)] + [(1, -1)], 0)))
    assert tight.order.numel() == rows
    used = (tight.work.tiles_64[:, 1] < tight.work.tiles_64[:, 2]).sum()
    assert used == tight.work.tiles_64.shape[0] == tile_capacity(rows, adapters, SHORT_TILE) == 9


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_lists_on_every_device(device):
    cu, adapter = torch.tensor([0, 5, 5, 300, 301], dtype=torch.int32), torch.tensor([2, 0, 1, -1], dtype=torch.int32)
    wanted, got = (with_work(make_segments(cu.to(d), adapter.to(d), 3, rows=310)) for d in ("cpu", device))
    for name in ("row_adapter", "order", "ends"):
        assert torch.equal(getattr(wanted, name), getattr(got, name).cpu())
    assert all(torch.equal(one, other.cpu()) for one, other in zip(wanted.work, got.work, strict=True))


@pytest.mark.gpu
def test_nothing_is_read_back_from_the_device():
    cu, adapter = torch.tensor([0, 5, 9], dtype=torch.int32).cuda(), torch.tensor([1, 0], dtype=torch.int32).cuda()
    make_segments(cu, adapter, 2, rows=12)
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_segments(cu, adapter, 2, rows=12)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("cu_seqlens", "adapter", "rows", "message"),
    [
        ([0, 3], [0, 1], None, r"adapter has shape \(2,\), expected \(1,\)"),
        ([], [], None, r"cu_seqlens has shape \(0,\), expected \(1,\)"),
        ([1, 3], [0], None, "start at 0"),
        ([0, 3, 2], [0, 1], None, "not decrease"),
        ([0, 3], [2], None, r"\[-1, 2\), got 2..2"),
        ([0, 3], [-2], None, r"\[-1, 2\), got -2"),
        ([0, 3], [0], 2, "end within the 2 rows there are, got 3"),
        ([0, 3], [0], -1, "at least 0"),
    ],
)
def test_faults_are_named(cu_seqlens, adapter, rows, message):
    to_int = dict(dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        make_segments(torch.tensor(cu_seqlens, **to_int), torch.tensor(adapter, **to_int), 2, rows=rows)


@pytest.mark.parametrize("case", [([0, 3, 2], [0, 1]), ([1, 3], [0]), ([0, 3], [2]), ([0, 3], [-2]), ([0, 13], [0])])
def test_the_device_check_sees_what_the_host_check_sees(case, monkeypatch):
    """On a GPU this assertion stops the device; here the same expression raises."""
    monkeypatch.setattr(checks, "readable", lambda values: False)
    cu_seqlens, adapter = (torch.tensor(values, dtype=torch.int32) for values in case)
    with pytest.raises(RuntimeError, match="must"):
        make_segments(cu_seqlens, adapter, 2, rows=12)


def test_offsets_that_no_int32_holds_are_refused():
    with pytest.raises(ValueError, match=r"^cu_seqlens must end below 2\^31, got 4294967296"):
        make_segments(torch.tensor([0, 1 << 32]), torch.tensor([0], dtype=torch.int32), 1)


@pytest.mark.parametrize("name", ["int64", "int16", "int8", "uint8"])
def test_offsets_and_ids_of_any_integer_type(name):
    cu_seqlens, adapter = [0, 3, 5, 9], [2, 0, 1] if name == "uint8" else [2, -1, 0]
    wanted, got = (
        make_segments(torch.tensor(cu_seqlens, dtype=dtype), torch.tensor(adapter, dtype=dtype), 200, rows=11)
        for dtype in (torch.int32, getattr(torch, name))
    )
    for one, other in zip(wanted, got, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_offsets_and_ids_of_no_integer_type_are_refused(dtype):
    cu_seqlens, adapter = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    with pytest.raises(ValueError, match="^cu_seqlens is of"):
        make_segments(cu_seqlens.to(dtype), adapter, 2)
    with pytest.raises(ValueError, match="^adapter is of"):
        make_segments(cu_seqlens, adapter.to(dtype), 2)
