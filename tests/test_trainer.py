"""transformers' Trainer with a mixed batch: it trains what a loop of one's own trains, with checkpoints of both kinds."""

import re
from pathlib import Path

import pytest
import torch
from test_attach import IDS, LABELS, MASK, attached, layers, logits, xlmr
from transformers import Trainer, TrainingArguments

import kloss
from kloss.optim import AdapterAdamW

OWNERS = [2, 0, -1, 2, 1]
ROWS = [dict(input_ids=IDS[i], attention_mask=MASK[i], labels=LABELS[i], adapter_ids=OWNERS[i]) for i in range(5)]


def readmes_trainer():
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    names = {"Trainer": Trainer, "kloss": kloss}
    exec(re.search(r"```python\n(class AdapterTrainer.*?)```", text, re.DOTALL)[1], names)
    return names["AdapterTrainer"]


def adapters(model):
    return {f"{n}.{k}": getattr(layer, k).detach().clone() for n, layer in layers(model).items() for k in ("lora_a", "lora_b")}


def trained(folder, make, *, resume=None, dropout=0.0, **settings):
    model = attached(make, dropout=dropout).train()
    model.enable_input_require_grads()
    optimizer = AdapterAdamW(model, [1e-2, 1e-3, 3e-2], max_norm=[0.1, float("inf"), 1.0])
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda step: 1 / (1 + step), lambda step: 1.0, lambda step: 0.9**step]
    )
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=5, max_steps=4, max_grad_norm=0, remove_unused_columns=False,
        report_to=[], disable_tqdm=True, save_steps=2, use_cpu=True, **settings,
    )  # fmt: skip
    trainer = readmes_trainer()(model, arguments, train_dataset=ROWS, optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=resume)
    return adapters(model)


@pytest.mark.filterwarnings("ignore")
def test_trainer_trains_what_a_loop_trains(tmp_path):
    model = attached(xlmr).train()
    optimizer = AdapterAdamW(model, [1e-2, 1e-3, 3e-2], max_norm=[0.1, float("inf"), 1.0])
    for step in range(4):
        for group, rate in zip(optimizer.param_groups, (1e-2 / (1 + step), 1e-3, 3e-2 * 0.9**step), strict=True):
            group["lr"] = rate
        with kloss.use_adapters(model, OWNERS):
            out = logits(model)
        kloss.adapter_losses(out, LABELS, OWNERS).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted, start = adapters(model), adapters(attached(xlmr))
    straight = trained(tmp_path / "a", xlmr)
    reentrant, other = (
        trained(tmp_path / name, xlmr, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": name == "b"})
        for name in "bc"
    )
    resumed = trained(tmp_path / "a", xlmr, resume=str(tmp_path / "a" / "checkpoint-2"))
    for name, factor in wanted.items():
        for g in range(3):
            assert (factor[g] - start[name][g]).abs().max() > 1e-4, (name, g)
        torch.testing.assert_close(straight[name], factor, rtol=1e-3, atol=1e-5)  # Trainer shuffles the rows
        assert all(torch.equal(run[name], straight[name]) for run in (reentrant, other, resumed)), name


@pytest.mark.filterwarnings("ignore")
def test_a_run_with_dropout_that_is_resumed_goes_on_with_the_same_masks(tmp_path):
    straight = trained(tmp_path, xlmr, dropout=0.3)
    resumed = trained(tmp_path, xlmr, dropout=0.3, resume=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(factor, straight[name]) for name, factor in resumed.items())
