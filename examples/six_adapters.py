"""Six adapters of one language model learn six languages in the same batches; all of them get gradients.

With peft only the active adapter is trained, and `set_adapter` freezes the others (huggingface/peft issue 631). Here each row of
a batch names its adapter. A language is ten words of its own in any order, so the best loss is log 10 = 2.30.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kloss

LANGUAGES = ["Ada", "Bel", "Cyn", "Dor", "Elu", "Fae"]
WORDS, LENGTH = 10, 12


def main(steps: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Train. Returns the losses of the six adapters at first and at last."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS * len(LANGUAGES), **sizes))
    kloss.attach(model, adapters=LANGUAGES, rank=8)
    optimizer = kloss.optim.AdapterAdamW(model, lr=5e-3, max_norm=1.0)
    history = []
    for _ in range(steps):
        owners = LANGUAGES * 4
        first_word = WORDS * torch.tensor([LANGUAGES.index(name) for name in owners])
        batch = first_word[:, None] + torch.randint(WORDS, (len(owners), LENGTH))
        with kloss.use_adapters(model, owners) as ids:
            logits = model(batch).logits
        losses = kloss.adapter_losses(logits, batch, ids, shift=True)
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.detach())
        if len(history) == 1:
            print("gradient norms of the first step:", *(f"{norm:.2f}" for norm in optimizer.norms))
    for name, first, last in zip(LANGUAGES, history[0], history[-1], strict=True):
        print(f"{name}: loss {first:.2f} at first, {last:.2f} at last")
    return history[0], history[-1]


if __name__ == "__main__":
    main()
