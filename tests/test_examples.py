"""The scripts of examples/ train every adapter, and README's first steps with a model of one's own run as they stand."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("script", "adapters"), [("six_adapters", 6), ("three_losses", 3), ("own_llama", 5)])
def test_an_example_trains_every_adapter(script, adapters, capsys):
    first, last = runpy.run_path(str(ROOT / "examples" / f"{script}.py"))["main"]()
    assert first.shape == last.shape == (adapters,) and (last < 0.7 * first).all(), (first, last)
    assert len(capsys.readouterr().out.splitlines()) >= adapters


def test_all_examples_are_run_here():
    tried = re.findall(r'\("(\w+)", \d\)', Path(__file__).read_text(encoding="utf-8"))
    assert sorted(tried) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.filterwarnings("ignore")
def test_readmes_first_steps_run_and_peft_loads_their_adapters(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Many adapters in a model of yours")[2]
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert 20 <= len(program.splitlines()) <= 26
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(program.replace("model = Llama", "torch.manual_seed(0)\nmodel = Llama"), names)
    model, tokens = names["model"], names["tokens"]
    assert [int(steps) for steps in names["optimizer"].rows.steps] == [3, 3, 3]
    torch.manual_seed(0)
    base = LlamaForCausalLM(model.config)
    with torch.no_grad():
        plain = base.eval()(tokens).logits
        for name in ("en", "fr", "sw"):
            theirs = PeftModel.from_pretrained(LlamaForCausalLM(model.config), tmp_path / "adapters" / name).eval()
            theirs.load_state_dict({f"base_model.model.{k}": v for k, v in base.state_dict().items()}, strict=False)
            inner = {k.replace(".weight", ".base_layer.weight"): v for k, v in base.state_dict().items()}
            theirs.load_state_dict({f"base_model.model.{k}": v for k, v in inner.items()}, strict=False)
            with names["kloss"].use_adapters(model, [name]):
                torch.testing.assert_close(theirs(tokens).logits, wanted := model(tokens).logits)
            assert (wanted - plain).abs().max() > 1e-4
