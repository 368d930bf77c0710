"""What a learner trains on, batch after batch; where it stands is three counters, so a resumed stream is the same stream."""

from collections.abc import Sequence

import numpy as np

from .corpus import Corpus, Sentences
from .learner import Learner
from .packing import pooled


class Stream:
    """Batches of the training sentences of a learner's experiences, one experience after another.

    experiences: for each, the locales whose sentences are pooled. Every epoch visits each sentence once, in an order drawn
    from (seed, experience, epoch); its last batch may be short.
    """

    def __init__(self, corpus: Corpus, experiences: Sequence[Sequence[str]], *, epochs: int, batch_size: int, seed: int):
        self.corpus, self.experiences = corpus, experiences
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.experience = self.epoch = self.batch = 0
        self._loaded: tuple[int, int] | None = None

    @classmethod
    def of(cls, corpus: Corpus, learner: Learner) -> "Stream":
        """A learner's stream from its start."""
        epochs, batch_size, seed = learner.epochs, learner.batch_size, learner.seed
        return cls(corpus, learner.experiences, epochs=epochs, batch_size=batch_size, seed=seed)

    @property
    def finished(self) -> bool:
        return self.experience == len(self.experiences)

    def counters(self) -> list[int]:
        """All there is to know: experience, epoch, batch."""
        return [self.experience, self.epoch, self.batch]

    def seek(self, counters: Sequence[int]) -> None:
        """Continue from counters."""
        self.experience, self.epoch, self.batch = counters

    def next(self) -> tuple[Sentences, np.ndarray, bool]:
        """The pool, the indices of the batch's sentences in it, and whether this batch ends an experience."""
        if self._loaded is None or self._loaded[0] != self.experience:
            locales = self.experiences[self.experience]
            self._pool = pooled([self.corpus.sentences(locale, "train") for locale in locales])
        if self._loaded != (self.experience, self.epoch):
            generator = np.random.default_rng([self.seed, self.experience, self.epoch])
            self._order = generator.permutation(len(self._pool.offsets) - 1)
            self._loaded = (self.experience, self.epoch)
        pool, first = self._pool, self.batch * self.batch_size
        index = self._order[first : first + self.batch_size]
        self.batch += 1
        if first + self.batch_size >= len(self._order):
            self.epoch, self.batch = self.epoch + 1, 0
        ended = self.epoch == self.epochs
        if ended:
            self.experience, self.epoch = self.experience + 1, 0
        return pool, index, ended

    def steps(self) -> int:
        """Batches of the whole stream."""
        return sum(self.epochs * -(-self.sentences(i) // self.batch_size) for i in range(len(self.experiences)))

    def sentences(self, experience: int) -> int:
        """Number of training sentences of an experience."""
        return sum(len(self.corpus.sentences(locale, "train").offsets) - 1 for locale in self.experiences[experience])

    def tokens(self) -> int:
        """Tokens of the whole stream."""
        locales = [locale for experience in self.experiences for locale in experience]
        return self.epochs * sum(len(self.corpus.sentences(locale, "train").input_ids) for locale in locales)
