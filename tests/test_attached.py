"""Training through `attach` against peft: both sides take the same steps, and a side that does not is not timed."""

import json

import pytest

from bench import attached

pytest.importorskip("peft")
SMALL = ["--width", "64", "--rank", "4", "--layers", "1", "--tokens", "6", "--rows", "2", "--rounds", "2"]


def test_a_small_comparison(tmp_path, capsys):
    rows = attached.main([*SMALL, "--adapters", "1", "12", "--out", str(tmp_path / "rows.jsonl")])
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    for row, adapters in zip(rows, (1, 12), strict=True):
        assert row["adapters"] == adapters and row["ratio"]["kloss"] == 1 and min(row["seconds"].values()) > 0
        assert row["seconds"].keys() == {"kloss", "peft", "peft without set_adapter"}
    assert "12 adapters x 2 sentences of 6 tokens" in capsys.readouterr().out


def test_other_losses_are_not_timed(monkeypatch):
    """Without clipping on one side the first losses agree, and those after an update do not."""
    monkeypatch.setattr(attached.nn.utils, "clip_grad_norm_", lambda *_: None)
    monkeypatch.setattr(attached, "MAX_NORM", 1e-12)
    monkeypatch.setattr(attached, "LR", 0.1)
    with pytest.raises(AssertionError, match="peft's losses differ from ours"):
        attached.main([*SMALL, "--adapters", "2"])
