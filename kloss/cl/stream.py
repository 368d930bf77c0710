"""What a learner trains on, batch after batch. Its position is three counters, so a resumed stream is the same stream."""

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

    @classmethod
    def of(cls, corpus: Corpus, learner: Learner) -> "Stream":
        """Return a learner's stream at its start."""
        epochs, batch_size, seed = learner.epochs, learner.batch_size, learner.seed
        return cls(corpus, learner.experiences, epochs=epochs, batch_size=batch_size, seed=seed)

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
            locales = self.experiences[self.experience]
            self._pool = Sentences.concatenate([self.corpus.sentences(locale, "train") for locale in locales])
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
