"""Five adapters learn at once in a Llama of one's own, each its own text, and peft loads one: python examples/own_llama.py"""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import kloss

TEXTS = {"abc": "abcabcabc", "alphabet": "abcdefghi", "back": "ihgfedcba", "pairs": "aabbccdde", "zigzag": "abacadaea"}


def main() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))  # yours: any that from_pretrained returns
    (plain := LlamaForCausalLM(base.config)).load_state_dict(base.state_dict())  # for peft, below
    tokens = torch.tensor([list(text.encode()) * 4 for text in TEXTS.values()])  # a row for each adapter
    model, losses = kloss.attach(base, adapters=list(TEXTS), rank=16), []
    optimizer = kloss.optim.AdapterAdamW(model, lr=1e-2)
    for _ in range(41):
        with kloss.use_adapters(model, list(TEXTS)) as ids:
            losses.append(kloss.adapter_losses(model(tokens).logits, tokens, ids, shift=True))
        losses[-1].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, first, last in zip(TEXTS, losses[0].tolist(), losses[-1].tolist(), strict=True):
        print(f"{name}: loss {first:.2f} → {last:.2f}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), kloss.use_adapters(model, ["zigzag"]):
        kloss.adapters.save(model, folder)
        theirs = PeftModel.from_pretrained(plain, Path(folder) / "zigzag")
        torch.testing.assert_close(theirs(tokens[4:]).logits, model(tokens[4:]).logits)
    return losses[0].detach(), losses[-1].detach()


if __name__ == "__main__":
    main()
