"""What learners' rules cost beside their batches, for the plan of a run."""

from collections.abc import Sequence
from typing import NamedTuple

from .corpus import Corpus
from .learner import Learner
from .step import COPIES
from .stream import Stream


class RuleWork(NamedTuple):
    """What a learner's rule computes beside its batches: tokens of forward and backward, and passes, one after another."""

    tokens: int
    passes: int


def rule_work(corpus: Corpus, learner: Learner) -> RuleWork:
    """Return the work of a learner's rule. Replayed sentences count with their mean length: which are drawn is not looked up."""
    rule, stream, last = learner.rule, Stream.of(corpus, learner), len(learner.experiences) - 1
    tokens = passes = 0
    if rule is None:
        return RuleWork(0, 0)
    for i in range(last + 1):
        if rule.replays and i > 0:
            stream.seek([i, 0, 0])
            pool, drawn, _ = stream.replayed(rule.number)
            steps = stream.steps_of(i)
            tokens += round(steps * len(drawn) * len(pool.input_ids) / pool.number)
            passes += steps
        if rule.SENTENCES and i < last:
            pool, some, _ = stream.some(i, rule.SENTENCES)
            tokens += len(pool.take(some).input_ids)
            passes += -(-len(some) // COPIES)
    return RuleWork(tokens, passes)


def rule_memory(learners: Sequence[Learner], width: int, itemsize: int) -> int:
    """Return the bytes of what the rules of learners note, and of their reference gradients.

    width: of a learner's row.
    itemsize: bytes of an element in the model's dtype.
    """
    rules = [learner.rule for learner in learners if learner.rule is not None]
    # Of blocks: which columns stay, and a copy of the row while the others are updated.
    return width * sum(4 * len(rule.state) + itemsize * rule.replays + 5 * rule.blocks for rule in rules)
