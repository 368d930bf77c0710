"""Where a CPU's training step spends its time: shares, and the command."""

import json
from dataclasses import replace

import pytest
import torch

from bench import bank_ops
from kloss.kernels.cpu_library import built
from kloss.models import XLMRForTokenClassification


def test_shares_of_a_step_are_whole():
    operators = {"aten::mm": 0.5, "aten::addmm": 0.1, "kloss::cpu_lora_backward_": 0.2, "aten::view": 0.9, "kloss::adamw_": 0.05}
    got = bank_ops.shares(2.0, 0.1, operators)
    assert got["frozen products"] == pytest.approx(0.3) and got["LoRA terms"] == pytest.approx(0.1)
    assert got[bank_ops.PACKING] == pytest.approx(0.05) and got["GELU"] == 0
    assert got[bank_ops.REST] == pytest.approx(1 - 0.3 - 0.1 - 0.025 - 0.05), "a view counts as dispatch"
    assert sum(got.values()) == pytest.approx(1)


def test_the_command_measures_a_step_on_a_cpu(tmp_path, monkeypatch, capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 99}
    for name in ("BASE", "TINY"):
        monkeypatch.setattr(bank_ops, name, replace(getattr(bank_ops, name), **sizes))
    XLMRForTokenClassification.random(bank_ops.TINY).save_pretrained(tmp_path)
    out = tmp_path / "rows.jsonl"
    options = [
        "--steps",
        "--threads",
        str(torch.get_num_threads()),
        "--model",
        str(tmp_path),
        "--dtype",
        "fp32",
        "--rounds",
        "1",
        "--cases",
        "model x 52",
        "tiny",
        "--out",
        str(out),
    ]
    rows = bank_ops.main(options)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert [(row["name"], row["adapters"]) for row in rows] == [("model x 52", 52), ("tiny x 1", 1)]
    assert rows[0]["scoring_tokens_per_second"] > 0 and rows[1]["scoring_tokens_per_second"] is None
    for row in rows:
        assert sum(row["shares"].values()) == pytest.approx(1) and row["seconds"] > 0
        assert not built() or row["shares"]["frozen products"] > 0 and row["shares"]["AdamW"] > 0
    assert "| frozen products |" in capsys.readouterr().out
