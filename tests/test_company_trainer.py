"""transformers' Trainer and accelerate beside a loop of one's own: accumulation, checkpointing, bf16, save and resume."""

import pytest
import torch

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")
import transformers  # noqa: E402
from test_attach import attached, xlmr  # noqa: E402
from test_trainer import adapters, readmes_trainer  # noqa: E402

import kloss  # noqa: E402
from kloss.optim import AdapterAdamW  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

RATES, NORMS = [1e-2, 1e-3, 3e-2], [0.1, float("inf"), 1.0]
BATCH, EACH, STEPS = 4, 2, 4  # rows of a pass, passes of a step, steps


@pytest.fixture(autouse=True)
def forgotten():
    """accelerate keeps its first settings for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def rows():
    """What a loader gives, one by one: of several lengths, adapters and numbers of labels."""
    draw = torch.Generator().manual_seed(4)
    dataset = []
    for i in range(BATCH * EACH * STEPS):
        ids, mask = torch.randint(3, 50, (6,), generator=draw), (torch.arange(6) < 3 + i % 4).long()
        labels = torch.randint(5, (6,), generator=draw).masked_fill(mask == 0, -100)
        owner = int(torch.randint(-1, 3, (), generator=draw))
        dataset.append(dict(input_ids=ids, attention_mask=mask, labels=labels, adapter_ids=owner))
    return dataset


def made(dropout):
    model = attached(xlmr, dropout=dropout).train()
    model.enable_input_require_grads()
    return model, AdapterAdamW(model, RATES, max_norm=NORMS)


def losses_of(model, batch):
    with kloss.use_adapters(model, batch.pop("adapter_ids")) as ids:
        logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    return kloss.adapter_losses(logits, batch["labels"], ids)


def loader():
    return torch.utils.data.DataLoader(rows(), batch_size=BATCH)


def by_a_loop(*, bf16=False, dropout=0.0):
    model, optimizer = made(dropout)
    for i, batch in enumerate(loader()):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = losses_of(model, batch)
        (losses.sum() / EACH).backward()
        if i % EACH == EACH - 1:
            optimizer.step()
            optimizer.zero_grad()
    return adapters(model)


def by_trainer(folder, *, bf16=False, dropout=0.0, checkpoints=None, resume=None, divides=True):
    class InOrder(readmes_trainer()):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model, optimizer = made(dropout)
    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=BATCH, gradient_accumulation_steps=EACH, max_steps=STEPS, max_grad_norm=0,
        remove_unused_columns=False, report_to=[], disable_tqdm=True, save_steps=2, use_cpu=True, bf16=bf16,
        lr_scheduler_type="constant", gradient_checkpointing=checkpoints is not None,
        gradient_checkpointing_kwargs=None if checkpoints is None else {"use_reentrant": checkpoints},
    )  # fmt: skip
    trainer = InOrder(model, arguments, train_dataset=rows(), optimizers=(optimizer, None))
    if divides:
        trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=resume)
    return adapters(model)


def same(got, wanted):
    return all(torch.equal(factor, wanted[name]) for name, factor in got.items())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpoints", [None, True, False])
def test_trainer_accumulates_stops_and_goes_on_as_a_loop(bf16, checkpoints, tmp_path):
    wanted, start = by_a_loop(bf16=bf16, dropout=0.3), adapters(attached(xlmr))
    assert all((wanted[name][g] - start[name][g]).abs().max() > 1e-4 for name in wanted for g in range(3))
    straight = by_trainer(tmp_path, bf16=bf16, dropout=0.3, checkpoints=checkpoints)
    assert same(straight, wanted)
    resumed = by_trainer(tmp_path, bf16=bf16, dropout=0.3, checkpoints=checkpoints, resume=str(tmp_path / "checkpoint-2"))
    assert same(resumed, wanted)


def test_trainer_sums_passes_unless_it_is_told_to_divide(tmp_path):
    """Which AdamW hardly sees, but clipping does."""
    wanted = by_a_loop()
    assert same(by_trainer(tmp_path, divides=True), wanted) and not same(by_trainer(tmp_path, divides=False), wanted)


@pytest.mark.parametrize("bf16", [False, True])
def test_accelerate_prepares_accumulates_saves_and_goes_on_as_a_loop(bf16, tmp_path):
    wanted = by_a_loop(bf16=bf16, dropout=0.3)

    def run(first, last, resume=None):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no", gradient_accumulation_steps=EACH)
        model, optimizer, batches = accelerator.prepare(*made(0.3), loader())
        if resume:
            accelerator.load_state(resume)
        for i, batch in enumerate(batches):
            if first <= i < last:
                with accelerator.accumulate(model):
                    accelerator.backward(losses_of(model, batch).sum())
                    optimizer.step()
                    optimizer.zero_grad()
        accelerator.save_state(tmp_path / str(last))
        return adapters(accelerator.unwrap_model(model))

    total = STEPS * EACH
    assert same(run(0, total), wanted)
    half = run(0, total // 2)
    assert not same(half, wanted)
    assert same(run(total // 2, total, tmp_path / str(total // 2)), wanted)
