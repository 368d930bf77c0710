"""The whole-step benchmark at toy size: it measures, it does not record a wrong result, its data look like MASSIVE."""

import json

import pytest
import suite_parts
import torch

from bench import whole_step
from bench.whole_step import main, make_sentences, massive_lengths, pad
from kloss.cl import step as trainer
from kloss.cl.graphs import Graphs
from kloss.models import TINY

SIZES = {
    "layers": 1, "hidden": 32, "heads": 2, "vocabulary": 60, "labels": 5, "adapters": 3, "rank": 4, "utterances": 2,
    "rounds": 2, "checked": 2,
}  # fmt: skip
TOY_MODEL = suite_parts.TOY
TOY = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


def test_lengths_match_massive():
    lengths = massive_lengths(100_000, torch.Generator().manual_seed(0))
    assert abs(float(lengths.double().mean()) - 11.6) < 0.1 and lengths.min() >= 3 and lengths.max() <= 97
    at = lengths.double().quantile(torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)).tolist()
    assert at == [11, 18, 28]


def test_padding_keeps_every_token():
    sentences = make_sentences(TINY, 12, torch.Generator().manual_seed(0))
    for first in range(0, 12, 4):
        input_ids, labels, mask = pad(sentences, range(first, first + 4), 1).values()
        real, tokens = mask.bool(), slice(sentences.offsets[first], sentences.offsets[first + 4])
        assert input_ids[real].tolist() == sentences.input_ids[tokens].tolist()
        assert labels[real].tolist() == sentences.labels[tokens].tolist() and (labels[~real] == -100).all()
        assert (input_ids[~real] == 1).all() and (labels >= 0).any(1).all()


@pytest.mark.parametrize("options", [["--dtype", "fp32"], ["--dropout", "0", "--peft-adapters", "2"]], ids=["fp32", "bf16"])
def test_a_row_is_written(tmp_path, options, capsys):
    out = tmp_path / "results" / "whole_step.jsonl"
    for count in (1, 2):
        row = main([*TOY, *options, "--out", str(out)])
        lines = out.read_text().splitlines()
        assert len(lines) == count and json.loads(lines[-1]) == row
    assert {"commit", "dirty", "versions", "device", "shape", "dtype", "ratio", "baseline", "peak_rss_gib"} <= row.keys()
    assert row["seconds"]["p50"] > 0 and row["ratio"]["p20"] <= row["ratio"]["p50"] <= row["ratio"]["p80"]
    assert "ratio  " in capsys.readouterr().out


def test_a_wrong_result_is_not_recorded(tmp_path, monkeypatch):
    right = trainer.token_loss
    monkeypatch.setattr(trainer, "token_loss", lambda *args: (right(*args)[0] * 1.001, None))
    with pytest.raises(AssertionError, match="losses and gradient norms are off"):
        main([*TOY, "--dtype", "fp32", "--out", str(tmp_path / "rows.jsonl")])
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_step_beside_pefts_is_checked_and_scaled_to_all_adapters(monkeypatch):
    walls, made = iter([1.0, 1.0, *[4.0] * 6, 9.0, *[10.0] * 3, 9.0, *[8.0] * 3]), []
    monkeypatch.setattr(whole_step, "wall", lambda call: made.append(call()) or next(walls))
    sizes = dict(adapters=3, rank=4, utterances=2, device="cpu", dtype=torch.float32)
    assert whole_step.beside_peft(TOY_MODEL, **sizes) == (4.0, 8.0 * 3 / 2, 2) and len(made) == 16
    right = trainer.token_loss
    monkeypatch.setattr(trainer, "token_loss", lambda *args: (right(*args)[0] * 1.001, None))
    with pytest.raises(AssertionError, match="losses and gradient norms are off"):
        whole_step.beside_peft(TOY_MODEL, **sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_step_is_the_step_to_the_bit(dtype):
    results = []
    for enabled in (False, True):
        step = whole_step.make_step(TOY_MODEL, 3, 4, 2, dropout=0.2, dtype=dtype, device="cuda")
        graphs = Graphs(torch.device("cuda", torch.cuda.current_device()), enabled=enabled)
        call = step.by(graphs)
        losses = [call()[0] for _ in range(4)]
        results.append([*losses, step.bank.param.cpu(), step.bank.steps.cpu()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert any(captured is not None for captured in graphs._captured.values())
