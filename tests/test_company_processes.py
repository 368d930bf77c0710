"""DDP and FSDP2 on two processes train what one process trains on all rows; what needs whole adapters says so."""

import re
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import kloss
from kloss.errors import UserError
from kloss.models.attach import MultiAdapterLinear, load_peft, save_peft

WORLD, ADAPTERS, SECONDS = 2, ["a", "b", "c", "idle"], 100
# For each step the rows of both processes. "b" has rows on one process only, "idle" on none.
STEPS = [[["a", "a", "b", -1], ["a", "c", "c", "c"]], [["c", "b", "b", "b"], [-1, "a", "c", "a"]], [["b"] * 4, ["a"] * 4]]
RATES, NORMS = [1e-2, 3e-2, 1e-3, 1e-2], [0.05, 1.0, float("inf"), 1.0]


def data(step):
    """Inputs [8, 5, 32] and labels [8, 5] of a step, many of which do not count."""
    draw = torch.Generator().manual_seed(step)
    labels = torch.randint(32, (8, 5), generator=draw)
    return torch.randn(8, 5, 32, generator=draw), labels.masked_fill(torch.rand(8, 5, generator=draw) < 0.4, -100)


def made():
    torch.manual_seed(0)
    model = kloss.attach(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), ADAPTERS, 4)
    for layer in model:
        if isinstance(layer, MultiAdapterLinear):
            layer.lora_b.data.normal_(generator=torch.Generator().manual_seed(1))
    return model


def adapters(model):
    """Each factor, whole, by the name that it has without wrappers."""
    named = ((n.removeprefix("module."), p) for n, p in model.named_parameters() if "lora" in n)
    return {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in named}


def page():
    """What docs/company.md gives for several processes."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "company.md").read_text(encoding="utf-8")
    names = {"kloss": kloss, "torch": torch, "dist": dist}
    exec(re.search(r"```python\n(def world_losses.*?)```", text, re.DOTALL)[1], names)
    return names["world_losses"]


def trained(model, optimizer, rows, losses_of, after_backward=lambda: None):
    """Train on some rows of each step. Returns the losses of the last step, the weights and each adapter's updates."""
    for step, ids in enumerate(STEPS):
        x, labels = (each[rows] for each in data(step))
        with kloss.use_adapters(model, sum(ids, [])[rows]) as numbers:
            logits = model(x)
        losses = losses_of(logits, labels, numbers)
        losses.sum().backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()
    steps = optimizer.rows.steps if isinstance(optimizer, kloss.optim.AdapterAdamW) else None
    return {"losses": losses.detach(), "weights": adapters(model), "steps": steps}


def worker(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=SECONDS)
    )
    torch.set_num_threads(1)
    world_losses, rows = page(), slice(4 * rank, 4 * rank + 4)

    def of_the_world(*batch):
        return world_losses(*batch, len(ADAPTERS))

    model = DistributedDataParallel(made())
    results = {"ddp": trained(model, adamw(model), rows, of_the_world)}
    model = DistributedDataParallel(made())
    with kloss.use_adapters(model, STEPS[0][rank]) as numbers:
        logits = model(data(0)[0][rows])
    kloss.adapter_losses(logits, data(0)[1][rows], numbers).sum().backward()
    results["plain"] = model.module[0].lora_b.grad

    model = made()
    for part in (model[0], model[2], model):
        fully_shard(part)
    results["fsdp"] = trained(model, torch.optim.AdamW(own(model), 1e-2, weight_decay=0.0), rows, of_the_world)
    results["refused"] = [refusal(call, model, folder) for call in NEED_WHOLE]

    before = FullyShardedDataParallel(made(), use_orig_params=True, device_id=torch.device("cpu"))
    results["refused"].append(refusal(NEED_WHOLE[0], before, folder))

    model = made()
    whole = own(model)
    fully_shard(model, ignored_params={*whole})

    def average():
        for p in whole:
            dist.all_reduce(p.grad)
            p.grad /= WORLD

    results["fsdp, adapters whole"] = trained(model, adamw(model), rows, of_the_world, average)
    results["merged"] = refusal(NEED_WHOLE[-1], model, folder)
    save_peft(model, folder / f"adapter-{rank}", "b")
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def own(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model):
    return kloss.optim.AdapterAdamW(model, RATES, max_norm=NORMS)


NEED_WHOLE = [
    lambda model, folder: adamw(model),
    lambda model, folder: save_peft(model, folder / "none", 0),
    lambda model, folder: kloss.adapters.save(model, folder / "none"),
    lambda model, folder: kloss.adapters.add(model, "new"),
    lambda model, folder: kloss.adapters.reset(model, "a"),
    lambda model, folder: kloss.adapters.detach(model, "a"),
]


def refusal(call, model, folder):
    try:
        call(model, folder)
    except UserError as error:
        return str(error)
    return "not refused"


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process found; none outlives its time."""
    folder = tmp_path_factory.mktemp("processes")
    context, until = mp.spawn(worker, (folder,), WORLD, join=False), time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < until, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_near(got, wanted):
    for name, weight in wanted["weights"].items():
        for g in range(len(ADAPTERS)):
            torch.testing.assert_close(got["weights"][name][g], weight[g], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["ddp", "fsdp, adapters whole"])
def test_two_processes_train_what_one_trains(processes, way):
    model = made()
    start = adapters(model)
    wanted = trained(model, adamw(model), slice(None), kloss.adapter_losses)
    for results in processes[1]:
        got = results[way]
        assert_near(got, wanted)
        assert got["steps"].tolist() == wanted["steps"].tolist() == [3, 3, 2, 0]
        for name, weight in got["weights"].items():
            assert torch.equal(weight[3], start[name][3])  # without rows anywhere: to the bit
            assert torch.equal(weight, processes[1][0][way]["weights"][name])  # all processes alike, to the bit
            assert all((weight[g] - start[name][g]).abs().max() > 1e-4 for g in range(3))
    total = sum(results[way]["losses"] for results in processes[1]) / WORLD
    torch.testing.assert_close(total[:2], wanted["losses"])


def test_sharded_adapters_train_with_torchs_adamw(processes):
    model = made()
    wanted = trained(model, torch.optim.AdamW(own(model), 1e-2, weight_decay=0.0), slice(None), kloss.adapter_losses)
    for results in processes[1]:
        assert_near(results["fsdp"], wanted)


def test_without_the_pages_losses_an_adapter_of_one_process_gets_half(processes):
    """DDP gives the mean over processes of gradients, whoever had rows."""
    model = made()
    with kloss.use_adapters(model, STEPS[0][0]) as numbers:
        logits = model(data(0)[0][:4])
    kloss.adapter_losses(logits, data(0)[1][:4], numbers).sum().backward()
    for results in processes[1]:
        torch.testing.assert_close(results["plain"][1], model[0].lora_b.grad[1] / 2)


def test_what_needs_whole_adapters_says_so(processes):
    folder, (results, _) = processes
    for message in results["refused"]:
        assert re.match(r"0\.lora_a is sharded over processes, and is needed whole; .*ignored_params.*torch.optim.AdamW", message)
    assert results["merged"].startswith("0.weight is sharded over processes")
    assert not (folder / "none").exists()


def test_an_adapter_beside_a_sharded_model_is_saved(processes):
    folder, results = processes
    for rank in range(WORLD):
        model = made()
        load_peft(model, folder / f"adapter-{rank}", "b")
        for name, weight in adapters(model).items():
            assert torch.equal(weight[1], results[rank]["fsdp, adapters whole"]["weights"][name][1])
