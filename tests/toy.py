"""A corpus of made-up sentences in memory, and a model small enough to train in a test."""

from dataclasses import replace

import numpy as np

from kloss.cl.corpus import Sentences
from kloss.cl.shares import alone, cohorts_of
from kloss.config import Config
from kloss.models import TINY, XLMRForTokenClassification

LABELS = ("O", "B-date", "B-time", "I-date", "I-time")


class ToyCorpus:
    """Looks like `kloss.cl.corpus.Corpus` to streams, training and scoring: locale l's token 5+k mostly has label k+l."""

    name, labels, vocab_size, bos_id, pad_id, eos_id = "toy", LABELS, 40, 0, 1, 2
    max_length = 16

    def __init__(self, locales=("aa", "bb", "cc"), sentences=12, seed=0):
        self.locales = tuple(locales)
        self._parts = {
            (locale, partition): self._draw(np.random.default_rng([seed, i, j]), sentences, i)
            for i, locale in enumerate(locales)
            for j, partition in enumerate(("train", "test"))
        }

    def _draw(self, draw, sentences, shift):
        ids, labels, offsets = [], [], [0]
        for _ in range(sentences):
            words = draw.integers(5, self.vocab_size, size=draw.integers(1, 9))
            ids += [self.bos_id, *words, self.eos_id]
            labels += [-100, *((words + shift) % len(LABELS)), -100]
            offsets.append(len(ids))
        return Sentences(np.array(ids, np.int32), np.array(labels, np.int32), np.array(offsets))

    def words(self):
        return np.arange(self.vocab_size)

    def sentences(self, locale, partition):
        return self._parts[locale, partition]

    def under(self, tokenizer):
        return self


def cohorts(study):
    """The learners of each cohort of one process."""
    return [members for members, _ in cohorts_of(alone(Config(), study))]


def toy_model(seed=0, **sizes):
    """One or two layers, 32 wide, with the toy corpus's labels."""
    wanted = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64} | sizes
    config = replace(TINY, vocab_size=ToyCorpus.vocab_size, num_labels=len(LABELS), **wanted)
    return XLMRForTokenClassification.random(config, seed)
