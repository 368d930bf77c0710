"""What a learner trains on, batch after batch. Its position is three counters, so a resumed stream is the same stream."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .corpus import Corpus, Sentences
from .learner import Experience, Learner


class StreamBatch(NamedTuple):
    sentences: Sentences  # all of the experience
    indices: np.ndarray  # int64 [n], which of them are in the batch
    ended: bool  # whether the batch ends the experience


class Stream:
    """Batches of training sentences, one experience after another.

    epochs: of experiences that do not say how many.
    Every epoch visits each sentence once, in an order drawn from (seed, experience, epoch). Its last batch may be short.
    """

    def __init__(
        self, corpus: Corpus, experiences: Sequence[Experience | Sequence[str]], *, epochs: int, batch_size: int, seed: int
    ):
        self.corpus, self.experiences = corpus, [Experience.of(experience) for experience in experiences]
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.experience = self.epoch = self.batch = 0
        self._loaded: tuple[int, int] | None = None
        self._replayed: tuple[tuple[int, float], Sentences] | None = None

    @classmethod
    def of(cls, corpus: Corpus, learner: Learner) -> "Stream":
        """Return a learner's stream at its start, under the learner's tokenizer."""
        epochs, batch_size, seed = learner.epochs, learner.batch_size, learner.seed
        own = corpus.under(learner.tokenizer)
        return cls(own, learner.experiences, epochs=epochs, batch_size=batch_size, seed=seed)

    def _whole(self, experience: int) -> list[Sentences]:
        """All training sentences of each locale of an experience."""
        return [self.corpus.sentences(locale, "train") for locale in self.experiences[experience].locales]

    def _parts(self, experience: int) -> list[Sentences]:
        """Those of them that take part."""
        whole = self._whole(experience)
        counts = self.experiences[experience].counts([part.number for part in whole])
        return [_some(part, count) for part, count in zip(whole, counts, strict=True)]

    @property
    def finished(self) -> bool:
        return self.experience == len(self.experiences)

    @property
    def rate(self) -> float:
        """What multiplies the learner's rates in the next step."""
        return 1.0 if self.finished else self.experiences[self.experience].rate

    @property
    def within(self) -> int:
        """Batches of the present experience so far."""
        return self.epoch * self.batches(self.experience) + self.batch if self.epoch or self.batch else 0

    @property
    def step(self) -> int:
        """Batches so far."""
        return sum(self.steps_of(i) for i in range(self.experience)) + self.within

    def due(self, every: int) -> bool:
        """Whether a learner is scored where it stands: every so many batches of an experience, 0: never. Not at its end."""
        return every > 0 and self.within > 0 and self.within % every == 0

    def marks(self, every: int) -> dict[int, int]:
        """The steps of the whole stream after which a learner is `due`, each with its experience, counted from 0."""
        marks: dict[int, int] = {}
        first = 0
        for i in range(len(self.experiences) if every else 0):
            marks |= {first + step: i for step in range(every, self.steps_of(i), every)}
            first += self.steps_of(i)
        return marks

    def counters(self) -> list[int]:
        """Return the position: experience, epoch, batch."""
        return [self.experience, self.epoch, self.batch]

    def seek(self, counters: Sequence[int]) -> None:
        """Continue at the position `counters`."""
        self.experience, self.epoch, self.batch = counters

    def comes_by(self, counters: Sequence[int]) -> bool:
        """Return whether a stream like this one can be at this position."""
        if len(counters) != 3 or not 0 <= counters[0] <= len(self.experiences):
            return False
        if counters[0] == len(self.experiences):
            return list(counters[1:]) == [0, 0]
        return 0 <= counters[1] < self._epochs(counters[0]) and 0 <= counters[2] < self.batches(counters[0])

    def next(self) -> StreamBatch:
        """Return the next batch and advance the counters."""
        if self._loaded is None or self._loaded[0] != self.experience:
            self._pool = Sentences.concatenate(self._parts(self.experience))
        if self._loaded != (self.experience, self.epoch):
            generator = np.random.default_rng([self.seed, self.experience, self.epoch])
            self._order = generator.permutation(self._pool.number)
            self._loaded = (self.experience, self.epoch)
        pool, first = self._pool, self.batch * self.batch_size
        index = self._order[first : first + self.batch_size]
        self.batch += 1
        if first + self.batch_size >= len(self._order):
            self.epoch, self.batch = self.epoch + 1, 0
        ended = self.epoch == self._epochs(self.experience)
        if ended:
            self.experience, self.epoch = self.experience + 1, 0
        return StreamBatch(pool, index, ended)

    def some(self, experience: int, count: int) -> StreamBatch:
        """Return `count` sentences of an experience, at even distances; all if there are fewer."""
        pool = Sentences.concatenate(self._parts(experience))
        return StreamBatch(pool, _even(pool.number, count), False)

    def replayed(self, share: float) -> StreamBatch:
        """Return a batch for the present position, drawn from `share` of the sentences of each locale of earlier experiences."""
        if self._replayed is None or self._replayed[0] != (self.experience, share):
            earlier = dict.fromkeys(locale for experience in self.experiences[: self.experience] for locale in experience.locales)
            whole = [self.corpus.sentences(locale, "train") for locale in earlier]
            parts = [_some(part, math.ceil(share * part.number)) for part in whole]
            self._replayed = (self.experience, share), Sentences.concatenate(parts)
        pool = self._replayed[1]
        generator = np.random.default_rng([self.seed, *self.counters(), 1])  # without the 1 batch 0 is drawn as `next` draws
        return StreamBatch(pool, generator.permutation(pool.number)[: self.batch_size], False)

    def steps(self) -> int:
        """Return the number of batches of the whole stream."""
        return sum(self.steps_of(i) for i in range(len(self.experiences)))

    def steps_of(self, experience: int) -> int:
        """Return the number of batches of an experience."""
        return self._epochs(experience) * self.batches(experience)

    def batches(self, experience: int) -> int:
        """Return the number of batches of an epoch of an experience."""
        return -(-self.sentences(experience) // self.batch_size)

    def _epochs(self, experience: int) -> int:
        return self.experiences[experience].epochs or self.epochs

    def sentences(self, experience: int) -> int:
        """Return the number of training sentences of an experience."""
        return sum(self.experiences[experience].counts([part.number for part in self._whole(experience)]))

    def batch_tokens(self) -> float:
        """Return the tokens of a full batch, on average."""
        return self.batch_size * self.tokens() / self.visits()

    def visits(self) -> int:
        """Return the sentences of the whole stream, each as often as it is visited."""
        return sum(self._epochs(i) * self.sentences(i) for i in range(len(self.experiences)))

    def tokens(self) -> int:
        """Return the number of tokens of the whole stream."""
        return sum(self._epochs(i) * sum(len(part.input_ids) for part in self._parts(i)) for i in range(len(self.experiences)))


def _some(sentences: Sentences, count: int) -> Sentences:
    """Return `count` sentences at even distances; all if there are no more."""
    return sentences if count >= sentences.number else sentences.take(_even(sentences.number, count))


def _even(number: int, count: int) -> np.ndarray:
    """Return the indices of `count` of `number` sentences, at even distances; of all if there are fewer."""
    count = min(number, count)
    return np.arange(count) * number // max(count, 1)
