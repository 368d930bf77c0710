"""The backbone of a run: real weights, or a small XLM-R warmed up by masked-language modelling on the corpus itself."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..errors import UserError
from ..machine import on_threads
from ..models import BASE, TINY, XLMRConfig, XLMRForTokenClassification
from .cache import cache_folder, key, open_entry
from .corpus import Corpus, OnProgress, Sentences
from .packing import Part, pack

FORMAT = 2  # part of the cache key; increment when the same settings give another model
MASKED, RATE, WARMUP = 0.3, 1e-3, 0.1
NOISE = 1000  # negative tokens per step, drawn from the text
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_backbone(config: Config, corpus: Corpus, device: torch.device, progress: OnProgress) -> XLMRForTokenClassification:
    """Load the model to adapt, with one head output per label of the corpus, and embeddings of the corpus's tokens alone.

    Raises UserError for a checkpoint that cannot be loaded, or one whose vocabulary or positions are too few for the corpus.
    """
    name = str(tiny_backbone(config, corpus, progress)) if config.backbone == "tiny" else config.backbone
    model = XLMRForTokenClassification.from_pretrained(
        name, len(corpus.labels), DTYPES[config.dtype], str(device), torch.from_numpy(corpus.words())
    )
    if corpus.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {corpus.vocab_size} entries, more than the {model.config.vocab_size} of backbone {name}; "
            "use the tokenizer that belongs to the backbone (--tokenizer)"
        )
    _check_positions(model.config, corpus, name)
    return model


def _check_positions(sizes: XLMRConfig, corpus: Corpus, name: str) -> None:
    if corpus.max_length > sizes.max_length:
        raise UserError(f"--max-length {corpus.max_length} is beyond backbone {name}'s {sizes.max_length}")


def tiny_config(config: Config, corpus: Corpus) -> XLMRConfig:
    """Return the tiny backbone's sizes for a corpus: heads of width 32, feed-forward layers 4 times as wide as the rest.

    Positions count from the corpus's padding token, as in XLM-R, and are as many whatever its id.
    Init std is scaled by sqrt(768 / width): unscaled, attention is too weak at width 128.
    Raises UserError for utterances longer than its positions.
    """
    _check_positions(TINY, corpus, "tiny")
    width = config.tiny_hidden
    return replace(
        TINY,
        initializer_range=BASE.initializer_range * math.sqrt(BASE.hidden_size / width),
        vocab_size=corpus.vocab_size,
        num_labels=len(corpus.labels),
        num_hidden_layers=config.tiny_layers,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=max(1, width // 32),
        pad_token_id=corpus.pad_id,
        max_position_embeddings=TINY.max_length + corpus.pad_id + 1,
    )


def tiny_backbone(config: Config, corpus: Corpus, progress: OnProgress) -> Path:
    """Return the folder of a small XLM-R after masked-language modelling on the corpus's training text, made if not cached.

    30 % of the tokens are predicted: 80 % of these masked, 10 % replaced, 10 % left alone. Devlin et al. 2019
    (arXiv 1810.04805) predict 15 %. Embeddings of tokens that the text never uses keep their initial values.
    """
    return _tiny(config, corpus, progress)[0]


def warm_up_threads(config: Config, corpus: Corpus, progress: OnProgress) -> int | None:
    """Return how many threads the tiny backbone was warmed up on, which changes its weights; None without a warm-up.

    The count is kept with the backbone, but is no part of its cache key: a run continued on another count finds its backbone.
    """
    return _tiny(config, corpus, progress)[1]["threads"] if config.backbone == "tiny" else None


def _tiny(config: Config, corpus: Corpus, progress: OnProgress) -> tuple[Path, dict[str, Any]]:
    """Return the tiny backbone's folder and what is kept with it; both are made if not cached.

    With `exact` it is another one, warmed up on one thread: on several, products of all its gradients sum in another order.
    """
    sizes, threads = tiny_config(config, corpus), 1 if config.exact else torch.get_num_threads()
    settings = [FORMAT, corpus.fingerprint, sizes, config.pretrain_steps, config.pretrain_batch, config.seed]
    folder = cache_folder(config.cache) / f"backbone-{key(*settings, *['exact'] * config.exact)}"

    def make(temporary: Path) -> None:
        with on_threads(threads):
            _warmed_up(config, corpus, sizes, progress).save_pretrained(temporary)

    return folder, open_entry(folder, make, progress, threads=threads if config.pretrain_steps else None)


def _warmed_up(config: Config, corpus: Corpus, sizes: XLMRConfig, progress: OnProgress) -> XLMRForTokenClassification:
    """Return the tiny backbone, of the sizes `tiny_config` gives."""
    steps, seed = config.pretrain_steps, config.seed
    if corpus.mask_id is None and steps:
        raise UserError(f"the tokenizer in {corpus.tokenizer_folder} has no mask token, which the tiny backbone learns with")
    model = XLMRForTokenClassification.random(sizes, seed)
    text = Sentences.concatenate([corpus.sentences(locale, "train") for locale in corpus.locales])
    used = np.union1d(text.input_ids, [i for i in (corpus.mask_id, corpus.pad_id) if i is not None])
    small = XLMRForTokenClassification.random(replace(sizes, vocab_size=len(used)), seed)
    compact = text._replace(input_ids=np.searchsorted(used, text.input_ids).astype(np.int32))
    if corpus.mask_id is not None and steps:
        special = torch.from_numpy(np.searchsorted(used, [i for i in (corpus.bos_id, corpus.eos_id) if i in used]))
        mask = int(np.searchsorted(used, corpus.mask_id))
        _masked_language_modelling(small, compact, special, mask, config, progress)
    trained, rows = small.state_dict(), torch.from_numpy(used).long()
    embeddings = model.word_embeddings.weight.detach().index_copy(0, rows, trained["word_embeddings.weight"])
    model.load_state_dict(trained | {"word_embeddings.weight": embeddings})
    return model


def _masked_language_modelling(
    model: XLMRForTokenClassification, text: Sentences, special: Tensor, mask: int, config: Config, progress: OnProgress
) -> None:
    """Train `model` by masked-language modelling with a sampled softmax (Ma and Collins 2018, arXiv 1809.01812, ranking loss).

    A softmax over all 29,000 entries took most of the time, and hundreds of steps learned only unigram frequencies.
    The candidates are the step's predicted tokens and NOISE tokens drawn from the text, so frequencies cancel.
    The output layer is the embedding matrix, as in XLM-R.

    special: int64 [n], ids that are never predicted.
    mask: id of the mask token.
    """
    steps, seed = config.pretrain_steps, config.seed
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = model.config.hidden_size
        head = nn.Sequential(nn.Linear(width, width, dtype=torch.float32), nn.GELU(), nn.LayerNorm(width, dtype=torch.float32))
    parameters = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
    optimizer = torch.optim.AdamW([*parameters, *head.parameters()], lr=RATE, weight_decay=0.01, fused=True)

    def rate(step: int) -> float:
        return min((step + 1) / (WARMUP * steps), (steps - step) / ((1 - WARMUP) * steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    draw = np.random.default_rng(seed)
    for step in range(steps):
        packed = pack([Part(text, draw.integers(text.number, size=min(config.pretrain_batch, text.number)), 0)], 1)
        ids = packed.input_ids
        predicted = (torch.rand(ids.shape, generator=generator, dtype=torch.float32) < MASKED) & ~torch.isin(ids, special)
        kind = torch.rand(ids.shape, generator=generator, dtype=torch.float32)
        replaced = torch.where(kind < 0.8, mask, torch.randint(model.config.vocab_size, ids.shape, generator=generator))
        hidden = model.encode(torch.where(predicted & (kind < 0.9), replaced, ids), packed.cu_seqlens)
        noise = torch.from_numpy(text.input_ids[draw.integers(len(text.input_ids), size=NOISE)])
        candidates, target = torch.unique(torch.cat([ids[predicted], noise]), return_inverse=True)
        logits = F.linear(head(hidden[predicted]), model.word_embeddings(candidates))
        loss = F.cross_entropy(logits, target[: len(logits)], reduction="sum") / max(1, len(logits))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, steps, f"warming up the tiny backbone, loss {loss.item():.2f}")
