"""A training run step by step against peft: one adapter on all linear layers, AdamW, clipping, fp32."""

import pytest
import torch

from kloss.kernels import adapter_adamw_, make_segments, token_loss
from kloss.models import AdapterBank, XLMRConfig, XLMRForTokenClassification
from kloss.models.convert import to_transformers

CONFIG = XLMRConfig(
    vocab_size=200, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
    max_position_embeddings=40, num_labels=7,
)  # fmt: skip
RANK, ALPHA, RATE, DECAY, BETAS, EPS = 8, 12.0, 2e-3, 0.01, (0.9, 0.999), 1e-8
STEPS = 20


def batches():
    """The same four sequences for both: packed, and as lists."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        lengths = torch.randint(3, 30, (4,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
        total = int(offsets[-1])
        ids = torch.randint(4, CONFIG.vocab_size, (total,), generator=generator)
        labels = ids % CONFIG.num_labels
        labels[torch.rand(total, generator=generator) < 0.3] = -100
        yield ids, labels, offsets


def peft_model(model, bank, folder):
    """peft's model with the adapter of the bank's row 0, ready to train."""
    from peft import PeftModel
    from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification

    base = XLMRobertaForTokenClassification(
        XLMRobertaConfig(**vars(CONFIG), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    base.load_state_dict(to_transformers(model.state_dict(), CONFIG.num_hidden_layers))
    bank.save_peft(folder, 0)
    theirs = PeftModel.from_pretrained(base, folder, is_trainable=True).train()
    trained = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    assert trained == bank.trainable(0)
    return theirs


@pytest.mark.parametrize("wide", [False, True], ids=["alone", "as a row of lower rank"])
def test_20_steps_equal_peft(tmp_path, wide):
    model = XLMRForTokenClassification.random(CONFIG, seed=1).freeze_backbone()
    ranks = [RANK, RANK + 3] if wide else [RANK]
    bank = AdapterBank(CONFIG, len(ranks), ranks, alpha=ALPHA)
    theirs = peft_model(model, bank, tmp_path)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    start = {name: tensor.clone() for name, tensor in bank._peft_tensors(0).items()}
    moments = torch.zeros_like(bank.param), torch.zeros_like(bank.param)
    step = torch.zeros(bank.adapters, dtype=torch.long)
    each = torch.ones(bank.adapters)
    losses, clipped = [], 0
    for ids, labels, offsets in batches():
        segments = make_segments(offsets, torch.zeros(4, dtype=torch.int32), bank.adapters)
        bank.zero_grad()
        loss, _ = token_loss(model(ids, offsets, segments, bank), labels, segments)
        loss.sum().backward()
        norms = adapter_adamw_(
            bank.param, bank.grad, *moments, step, RATE * each, betas=BETAS, eps=EPS, weight_decay=DECAY * each,
            max_norm=each, active=torch.arange(bank.adapters) == 0,
        )  # fmt: skip
        parts = [slice(a, b) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
        inputs, mask, wanted = (
            torch.nn.utils.rnn.pad_sequence([tensor[part] for part in parts], batch_first=True, padding_value=fill)
            for tensor, fill in ((ids, 1), (torch.ones_like(ids), 0), (labels, -100))
        )
        their_loss = theirs(input_ids=inputs, attention_mask=mask, labels=wanted).loss
        optimizer.zero_grad(set_to_none=True)
        their_loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        assert abs(float(loss[0]) - float(their_loss)) <= 1e-5 * float(their_loss), len(losses)
        assert abs(float(norms[0]) - float(norm)) <= 1e-4 * float(norm), len(losses)
        clipped += bool(norm > 1)
        losses.append(float(loss[0]))
    assert 0 < clipped < STEPS or min(losses) < 0.9 * losses[0]
    ours = bank._peft_tensors(0)
    assert len(ours) == len(trained)
    for name, tensor in ours.items():
        place = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        place = place.replace("classifier.", "classifier.modules_to_save.default.")
        other = trained[place].detach()
        assert (tensor - other).norm() <= 1e-4 * other.norm(), name
        assert (tensor - start[name]).norm() > 1e-2 * start[name].norm(), f"{name} did not move"
