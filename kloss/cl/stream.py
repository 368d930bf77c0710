"""What a learner trains on, batch after batch. Its position is three counters, so a resumed stream is the same stream."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .corpus import Corpus, Sentences
from .learner import Learner


class StreamBatch(NamedTuple):
    sentences: Sentences  # all of the experience
    indices: np.ndarray  # int64 [n], which of them are in the batch
    ended: bool  # whether the batch ends the experience


class Stream:
    """Batches of training sentences, one experience after another.

    experiences: the locales of each experience, whose sentences are pooled.
    Every epoch visits each sentence once, in an order drawn from (seed, experience, epoch). Its last batch may be short.
    """

    def __init__(self, corpus: Corpus, experiences: Sequence[Sequence[str]], *, epochs: int, batch_size: int, seed: int):
        self.corpus, self.experiences = corpus, experiences
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.experience = self.epoch = self.batch = 0
        self._loaded: tuple[int, int] | None = None
        self._replayed: tuple[tuple[int, float], Sentences] | None = None

    @classmethod
    def of(cls, corpus: Corpus, learner: Learner) -> "Stream":
        """Return a learner's stream at its start."""
        epochs, batch_size, seed = learner.epochs, learner.batch_size, learner.seed
        return cls(corpus, learner.experiences, epochs=epochs, batch_size=batch_size, seed=seed)

    def _pool_of(self, experience: int) -> Sentences:
        return Sentences.concatenate([self.corpus.sentences(locale, "train") for locale in self.experiences[experience]])

    @property
    def finished(self) -> bool:
        return self.experience == len(self.experiences)

    def counters(self) -> list[int]:
        """Return the position: experience, epoch, batch."""
        return [self.experience, self.epoch, self.batch]

    def seek(self, counters: Sequence[int]) -> None:
        """Continue at the position `counters`."""
        self.experience, self.epoch, self.batch = counters

    def next(self) -> StreamBatch:
        """Return the next batch and advance the counters."""
        if self._loaded is None or self._loaded[0] != self.experience:
            self._pool = self._pool_of(self.experience)
        if self._loaded != (self.experience, self.epoch):
            generator = np.random.default_rng([self.seed, self.experience, self.epoch])
            self._order = generator.permutation(self._pool.number)
            self._loaded = (self.experience, self.epoch)
        pool, first = self._pool, self.batch * self.batch_size
        index = self._order[first : first + self.batch_size]
        self.batch += 1
        if first + self.batch_size >= len(self._order):
            self.epoch, self.batch = self.epoch + 1, 0
        ended = self.epoch == self.epochs
        if ended:
            self.experience, self.epoch = self.experience + 1, 0
        return StreamBatch(pool, index, ended)

    def some(self, experience: int, count: int) -> StreamBatch:
        """Return `count` sentences of an experience, at even distances; all if there are fewer."""
        pool = self._pool_of(experience)
        return StreamBatch(pool, _even(pool.number, count), False)

    def replayed(self, share: float) -> StreamBatch:
        """Return a batch for the present position, drawn from `share` of the sentences of each locale of earlier experiences."""
        if self._replayed is None or self._replayed[0] != (self.experience, share):
            earlier = dict.fromkeys(locale for locales in self.experiences[: self.experience] for locale in locales)
            whole = [self.corpus.sentences(locale, "train") for locale in earlier]
            parts = [part.take(_even(part.number, math.ceil(share * part.number))) for part in whole]
            self._replayed = (self.experience, share), Sentences.concatenate(parts)
        pool = self._replayed[1]
        generator = np.random.default_rng([self.seed, *self.counters()])
        return StreamBatch(pool, generator.permutation(pool.number)[: self.batch_size], False)

    def steps(self) -> int:
        """Return the number of batches of the whole stream."""
        return sum(self.epochs * -(-self.sentences(i) // self.batch_size) for i in range(len(self.experiences)))

    def sentences(self, experience: int) -> int:
        """Return the number of training sentences of an experience."""
        return sum(self.corpus.sentences(locale, "train").number for locale in self.experiences[experience])

    def batch_tokens(self) -> float:
        """Return the tokens of a full batch, on average."""
        sentences = sum(self.epochs * self.sentences(k) for k in range(len(self.experiences)))
        return self.batch_size * self.tokens() / sentences

    def tokens(self) -> int:
        """Return the number of tokens of the whole stream."""
        locales = [locale for experience in self.experiences for locale in experience]
        return self.epochs * sum(len(self.corpus.sentences(locale, "train").input_ids) for locale in locales)


def _even(number: int, count: int) -> np.ndarray:
    """Return the indices of `count` of `number` sentences, at even distances; of all if there are fewer."""
    count = min(number, count)
    return np.arange(count) * number // max(count, 1)
