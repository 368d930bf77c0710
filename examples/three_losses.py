"""Three adapters of one sentence encoder, three losses, one backward pass.

Each sentence is embedded under all three adapters, in one forward pass: a row for each. The losses are of three kinds, each
adapter learns from its own, and they are added up (asked for in huggingface/peft issue 2639).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import kloss

ADAPTERS = ["topic", "length", "paraphrase"]
PAD, TOPICS, WORDS = 0, 4, 10


def sentences(rows: int) -> tuple[Tensor, Tensor]:
    """Sentences of 4 to 12 words, most of them of the sentence's topic: ids [rows, 12], topics [rows]."""
    topic = torch.randint(TOPICS, (rows, 1))
    words = 1 + WORDS * torch.where(torch.rand(rows, 12) < 0.7, topic, torch.randint(TOPICS, (rows, 12)))
    ids = words + torch.randint(WORDS, (rows, 12))
    return torch.where(torch.arange(12) < torch.randint(4, 13, (rows, 1)), ids, PAD), topic[:, 0]


def paraphrased(ids: Tensor) -> Tensor:
    """The sentences with their words in another order."""
    order = torch.where(ids == PAD, 2.0, torch.rand(ids.shape)).argsort(1)
    return ids.gather(1, order)


def main(steps: int = 40) -> tuple[Tensor, Tensor]:
    """Train. Returns the three losses, as means of the first ten steps and of the last ten."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    encoder = kloss.attach(BertModel(BertConfig(vocab_size=1 + TOPICS * WORDS, **sizes)), adapters=ADAPTERS, rank=8)
    heads = nn.ModuleDict({"topic": nn.Linear(64, TOPICS), "length": nn.Linear(64, 1)})
    optimizers = kloss.optim.AdapterAdamW(encoder, lr=[2e-3, 5e-3, 2e-3]), torch.optim.AdamW(heads.parameters(), lr=1e-2)

    def embed(ids: Tensor, adapters: list[str]) -> Tensor:
        """The embeddings of sentences under some adapters: [adapters, B, 64]."""
        rows, owners = ids.repeat(len(adapters), 1), [name for name in adapters for _ in ids]
        with kloss.use_adapters(encoder, owners):
            states = encoder(rows, attention_mask=rows != PAD).last_hidden_state
        mask = (rows != PAD)[..., None]
        return ((states * mask).sum(1) / mask.sum(1)).unflatten(0, (len(adapters), -1))

    history = []
    for _ in range(steps):
        ids, topics = sentences(16)
        by_topic, by_length, by_meaning = embed(ids, ADAPTERS)
        (again,) = embed(paraphrased(ids), ["paraphrase"])
        likeness = F.normalize(by_meaning, dim=1) @ F.normalize(again, dim=1).T / 0.05
        losses = torch.stack([
            F.cross_entropy(heads["topic"](by_topic), topics),
            F.mse_loss(heads["length"](by_length)[:, 0], (ids != PAD).sum(1) / 12),
            F.cross_entropy(likeness, torch.arange(len(ids))),
        ])  # fmt: skip
        losses.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        history.append(losses.detach())
    first, last = torch.stack(history[:10]).mean(0), torch.stack(history[-10:]).mean(0)
    for name, before, after in zip(ADAPTERS, first, last, strict=True):
        print(f"{name}: loss {before:.3f} at first, {after:.3f} at last")
    return first, last


if __name__ == "__main__":
    main()
