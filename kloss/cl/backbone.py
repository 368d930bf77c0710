"""The backbone of a run: real weights, or a small XLM-R warmed up by masked-language modelling on the corpus itself."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..models import BASE, TINY, XLMRConfig, XLMRForTokenClassification
from .cache import cache_folder, written
from .corpus import Corpus
from .packing import pack, pooled

FORMAT = 2  # part of the cache key; one more whenever the same arguments give another model
MASKED, RATE, WARMUP = 0.3, 1e-3, 0.1
NOISE = 1000  # tokens drawn from the text at each step, which the predicted ones must be told from


def load_backbone(
    name: str,
    corpus: Corpus,
    *,
    layers: int = 4,
    hidden: int = 128,
    steps: int = 600,
    batch: int = 128,
    seed: int = 0,
    cache: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    report: Callable[[int, int, str], None] | None = None,
) -> XLMRForTokenClassification:
    """The model to adapt, with a head as wide as the corpus has labels.

    name: "tiny", or a folder or hub name. layers, hidden, steps, batch, seed: of the tiny one. Raises UserError for a
    checkpoint that cannot be loaded or whose vocabulary or positions are too small for the corpus.
    """
    if name == "tiny":
        folder = tiny_backbone(corpus, layers, hidden, steps, batch, seed, cache, report or (lambda done, total, text: None))
        name = str(folder)
    model = XLMRForTokenClassification.from_pretrained(name, len(corpus.labels), dtype, device)
    if corpus.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {corpus.vocab_size} entries, more than the {model.config.vocab_size} of backbone {name}; "
            "use the tokenizer that belongs to the backbone (--tokenizer)"
        )
    if corpus.max_length > model.config.max_position_embeddings - 2:
        raise UserError(
            f"--max-length {corpus.max_length} is beyond backbone {name}'s {model.config.max_position_embeddings - 2}"
        )
    return model


def tiny_config(corpus: Corpus, layers: int, hidden: int) -> XLMRConfig:
    """Sizes of the tiny backbone for a corpus: heads of 32, feed-forward layers four times as wide as the rest. Weights are drawn
    with XLM-R's deviation at the base model's width: at a smaller one the same number hides a token's context from it."""
    return replace(
        TINY,
        initializer_range=BASE.initializer_range * math.sqrt(BASE.hidden_size / hidden),
        vocab_size=corpus.vocab_size,
        num_labels=len(corpus.labels),
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=max(1, hidden // 32),
        pad_token_id=corpus.pad_id,
    )


def tiny_backbone(
    corpus: Corpus, layers: int, hidden: int, steps: int, batch: int, seed: int, cache: str | None, report: Callable
) -> Path:
    """Folder of a small XLM-R after `steps` steps of masked-language modelling on the corpus's training text.

    30 % of the tokens are predicted: 80 % of these masked, 10 % replaced, 10 % left (Devlin et al. 2019, arXiv 1810.04805, who
    predict 15 %). Kept in the cache by everything that decides it. Entries of the vocabulary that the text never uses stay as
    drawn.
    """
    config = tiny_config(corpus, layers, hidden)
    key = hashlib.blake2b(repr((FORMAT, corpus.fingerprint, config, steps, batch, seed)).encode(), digest_size=16).hexdigest()
    folder = cache_folder(cache or None) / f"backbone-{key}"
    if folder.is_dir():
        return folder
    if corpus.mask_id is None and steps:
        raise UserError(f"the tokenizer in {corpus.tokenizer_folder} has no mask token, which the tiny backbone learns with")
    model = XLMRForTokenClassification.random(config, seed)
    text = pooled([corpus.sentences(locale, "train") for locale in corpus.locales])
    used = np.union1d(text.input_ids, [i for i in (corpus.mask_id, corpus.pad_id) if i is not None])
    small = XLMRForTokenClassification.random(replace(config, vocab_size=len(used)), seed)
    compact = text._replace(input_ids=np.searchsorted(used, text.input_ids).astype(np.int32))
    if steps:
        special = torch.from_numpy(np.searchsorted(used, [i for i in (corpus.bos_id, corpus.eos_id) if i in used]))
        mask = int(np.searchsorted(used, corpus.mask_id))
        _masked_language_modelling(small, compact, special, mask, steps, batch, seed, report)
    with torch.no_grad():
        rows = model.word_embeddings.weight
        rows[torch.from_numpy(used).long()] = small.word_embeddings.weight
        trained = {name: value for name, value in small.state_dict().items() if name != "word_embeddings.weight"}
        model.load_state_dict(trained | {"word_embeddings.weight": rows})
    with written(folder) as temporary:
        model.save_pretrained(temporary)
    return folder


class _LanguageModelHead(nn.Module):
    """Predicts tokens from hidden states with the embedding matrix as the output layer, as XLM-R's own head does."""

    def __init__(self, width: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """x: [n, H], embeddings: [m, H] -> logits [n, m]."""
        return F.linear(self.norm(F.gelu(self.dense(x))), embeddings)


def _masked_language_modelling(model, text, special: Tensor, mask: int, steps: int, batch: int, seed: int, report) -> None:
    """Each token is told from the step's other ones and from NOISE drawn from the text (Ma and Collins 2018, arXiv 1809.01812,
    ranking loss), so how frequent tokens are need not be learnt: with a loss over 29,000 entries, frequencies were all that
    hundreds of steps learnt, in hidden states without a context, at most of the cost."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = _LanguageModelHead(model.config.hidden_size)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
    optimizer = torch.optim.AdamW([*parameters, *head.parameters()], lr=RATE, weight_decay=0.01, fused=True)

    def rate(step: int) -> float:
        return min((step + 1) / (WARMUP * steps), (steps - step) / ((1 - WARMUP) * steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    sentences = len(text.offsets) - 1
    draw = np.random.default_rng(seed)
    for step in range(steps):
        packed = pack([(text, draw.integers(sentences, size=min(batch, sentences)), 0)], 1)
        ids = packed.input_ids
        chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & ~torch.isin(ids, special)
        kind = torch.rand(ids.shape, generator=generator)
        replaced = torch.where(kind < 0.8, mask, torch.randint(model.config.vocab_size, ids.shape, generator=generator))
        hidden = model.encode(torch.where(chosen & (kind < 0.9), replaced, ids), packed.cu_seqlens)
        noise = torch.from_numpy(text.input_ids[draw.integers(len(text.input_ids), size=NOISE)])
        candidates, place = torch.unique(torch.cat([ids[chosen], noise]), return_inverse=True)
        logits = head(hidden[chosen], model.word_embeddings(candidates))
        loss = F.cross_entropy(logits, place[: len(logits)], reduction="sum") / max(1, len(logits))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        report(step + 1, steps, f"warming up the tiny backbone, loss {loss.item():.2f}")
