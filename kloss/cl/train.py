"""The loop: learners advance together, one packed step at a time, and are scored as experiences end."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ..config import Config
from ..errors import UserError
from ..models import AdapterBank, Rows, XLMRForTokenClassification
from ..models.methods import FusionBank
from ..models.rows import STATE, overwrite
from .banks import bank_of, lora_bank
from .corpus import Corpus
from .evaluate import evaluate
from .graphs import Graphs
from .learner import ALL, Learner, Scores, Table
from .packing import Part, pack, send
from .probes import State
from .progress import Record, check_progress
from .spans import f1_from_counts
from .states import KeptRow
from .step import PackedStep, Ruled, StepSettings, frozen_columns, squared_gradients, train_step
from .stream import Stream


class Cohort:
    """Learners that advance together: each has a row of the bank, a stream and a table of scores.

    learners: all of one `kind`, or one that trains the whole model.
    to_score: for each learner, experiences completed -> locales to score.
    pass_tokens: tokens of one packed pass, about; a learner's batch is never split.
    partition: dev or test, what is scored.
    to_keep: for each learner, the experiences after which its row is given to `keep`, as the state of a learner of the cohort.
    score_every: for each learner, after how many steps of an experience it is scored besides, on what is scored at the end of the
        experience; 0: never.
    rank: the bank's, if it is to be larger than the learners'.
    slot_counts: whether the counts of each slot type are kept too.
    exact: as in AdapterBank; then a learner's weights have the same bits in any company, if the largest rank is the same.
    Attributes: scores, slots (three counts of each type, end to end) and curves by step, one per learner; failed, {learner: why
        its training ended early}; losses, {learner: that of its last step}.
    """

    def __init__(
        self,
        model: XLMRForTokenClassification,
        corpus: Corpus,
        learners: Sequence[Learner],
        to_score: Sequence[Mapping[int, Sequence[str]]],
        *,
        pass_tokens: int = Config.pass_tokens,
        exact: bool = False,
        rank: int | None = None,
        partition: str = "test",
        to_keep: Sequence[Container[int]] = (),
        keep: Callable[[State, KeptRow], None] | None = None,
        score_every: Sequence[int] = (),
        slot_counts: bool = False,
    ):
        self.model, self.corpus, self.learners, self.to_score = model, corpus, learners, to_score
        self.pass_tokens, self.exact, self.partition = pass_tokens, exact, partition
        self.to_keep, self.keep = to_keep, keep
        self.score_every, self.slot_counts = score_every or [0] * len(learners), slot_counts
        self.tables = ("scores", *["curves"] * any(self.score_every), *["slots"] * slot_counts)  # in the state
        self.device = model.classifier.weight.device
        self.bank = bank_of(model, learners, rank or 0, exact=exact)
        self._donors: dict[tuple, AdapterBank] = {}
        self.streams = [Stream.of(corpus, learner) for learner in learners]
        self.rules = {g: learner.rule for g, learner in enumerate(learners) if learner.rule is not None}
        self.noted = {g: {n: torch.zeros_like(self.bank.param[g]) for n in rule.state} for g, rule in self.rules.items()}
        self.scores: list[Scores] = [{} for _ in learners]
        self.curves: list[Scores] = [{} for _ in learners]
        self.slots: list[Scores] = [{} for _ in learners]
        self.failed: dict[int, str] = {}
        self.losses: dict[int, float] = {}
        self.tokens = 0
        self._team: _Team | None = None

    def begin(self, g: int, rows: Sequence[KeptRow]) -> None:
        """Have a learner that has not trained begin with what it takes of a row of another one, or with its donors' rows."""
        bank, donors, takes = self.bank, self.learners[g].donors, self.learners[g].takes
        if isinstance(bank, FusionBank):
            if donors not in self._donors:
                self._donors[donors] = lora_bank(self.model, [donor for donor, _ in donors], exact=self.exact)
                for m, row in enumerate(rows):
                    self._donors[donors].load_row_(m, row.param, row.rank)
            bank.give_(g, self._donors[donors])
        else:
            assert isinstance(bank, AdapterBank)
            drawn = bank.param[g].clone()
            bank.load_row_(g, rows[0].param, rows[0].rank)
            if takes != ALL:
                bank.param[g] = bank.param[g].where(bank.columns(takes), drawn)
                bank.refresh(g)

    @property
    def steps(self) -> Tensor:
        """Updates of each learner so far, int64 [G] on the host."""
        steps = self.bank.steps.cpu().clone()
        if self._team is not None:
            steps[self._team.learners] = self._team.bank.steps.cpu()
        return steps

    def f1_when_learned(self) -> float | None:
        """Mean F1 of the learners on what they have learned last, where that was scored."""
        counts = []
        for learner, table in zip(self.learners, self.scores, strict=True):
            last = max(table, default=0)
            own = learner.experiences[last - 1].locales if last else ()
            counts += [table[last][locale] for locale in own if locale in table[last]]
        return float(f1_from_counts(counts).mean()) if counts else None

    def total_tokens(self) -> int:
        """Training tokens from start to end."""
        return sum(stream.tokens() for stream in self.streams)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and JSON of everything that decides how training goes on."""
        if self._team is not None:
            self._team.rewind()
            self._team.write_back()
        counters = [stream.counters() for stream in self.streams]
        tables = {name: [{str(at): row for at, row in table.items()} for table in getattr(self, name)] for name in self.tables}
        failed = {str(g): reason for g, reason in self.failed.items()}
        return self._tensors(), {"counters": counters, "failed": failed, "tokens": self.tokens, **tables}

    def _tensors(self) -> dict[str, Tensor]:
        """The bank's state, and what rules have noted."""
        noted = {f"{name} of {g}": tensor for g, tensors in self.noted.items() for name, tensor in tensors.items()}
        return self.bank.state() | noted

    def load_state(self, tensors: dict[str, Tensor], state: dict, *, finite: bool = False) -> None:
        """The inverse of `state`. Raises UserError if tensors and JSON cannot be these learners'.

        finite: refuse weights and moments that are not finite, but for learners that have diverged.
        """
        check_progress(state, self.learners, self.corpus, self.to_score, self.score_every, self.slot_counts)
        overwrite(self._tensors(), tensors)
        self._go_on(tensors, state, finite)

    def _go_on(self, tensors: dict[str, Tensor], state: dict, finite: bool = False) -> None:
        """Take over what `load_state` is given, but for the tensors' contents, which are there."""
        self.bank.refresh()
        for g, stream in enumerate(self.streams):
            if not 0 <= self.steps[g] <= stream.steps():
                raise UserError(f"steps of learner {g} are {int(self.steps[g])}, not 0 to {stream.steps()}")
            for name in ("param", "exp_avg", "exp_avg_sq") if finite and str(g) not in state["failed"] else ():
                if not tensors[name][g].isfinite().all():
                    raise UserError(f"{name} of learner {g} is not finite")
        for stream, counters in zip(self.streams, state["counters"], strict=True):
            stream.seek(counters)
        for name in (name for name in self.tables if name in state):
            setattr(self, name, [{int(at): row for at, row in table.items()} for table in state[name]])
        self.failed = {int(g): reason for g, reason in state["failed"].items()}
        self.tokens = state["tokens"]

    def resume(self, records: Mapping[int, Record]) -> None:
        """Have learners go on from where they were in other cohorts. Raises UserError for records that cannot be theirs."""
        tensors, state = self.state()
        for g, record in records.items():
            place = {name: tensors[name][g] for name in STATE} | self.noted.get(g, {})
            for name, value in self._fitted(g, record).items():
                place[name].copy_(value)
            state["counters"][g] = record.counters
            for name in self.tables:
                state[name][g] = getattr(record, name)
            if record.failed is not None:
                state["failed"][str(g)] = record.failed
            self.streams[g].seek(record.counters)
        state["tokens"] = sum(stream.tokens() * stream.step // stream.steps() for stream in self.streams)
        self._go_on(tensors, state)

    def _fitted(self, g: int, record: Record) -> dict[str, Tensor]:
        """What a record keeps of its row, as in this bank; nothing of a learner that is at its end."""
        wanted = {*STATE, *self.noted.get(g, ())}
        if record.row and record.row.keys() != wanted:
            raise UserError(f"its tensors are {', '.join(sorted(record.row))}, not {', '.join(sorted(wanted))}")
        if not isinstance(self.bank, AdapterBank) or record.rank in (None, self.bank.rank):
            return record.row
        rank = record.rank
        return {name: value if name == "steps" else self.bank.placed(g, value, rank) for name, value in record.row.items()}

    def train(self, after_step: Callable[["Cohort", float], None] = lambda cohort, loss: None) -> None:
        """Train every learner to the end of its stream.

        after_step: called as after_step(cohort, mean loss) after each step; it may take the `state`.
        """
        untouched = [g for g, stream in enumerate(self.streams) if stream.counters() == [0, 0, 0] and 0 not in self.scores[g]]
        untouched = [g for g in untouched if g not in self.failed]
        self._score(self.bank, untouched, untouched)
        while learners := [g for g in range(len(self.learners)) if not self.ended(g)]:
            self._team = team = _Team(self, learners)
            while team.goes_on():
                loss, ended, due = team.advance()
                if ended:
                    team.note(ended)
                    self._score(team.bank, [learners[row] for row in ended], ended, team.graphs)
                if due:
                    self._trace(team, due)
                after_step(self, loss)
            team.write_back()
            self._team = None

    def ended(self, g: int) -> bool:
        """Whether a learner trains no more."""
        return self.streams[g].finished or g in self.failed

    def _score(self, bank: Rows, learners: Sequence[int], rows: Sequence[int], graphs: Graphs | None = None) -> None:
        """Score `learners` (bank rows `rows`) at the point they have reached in their streams. graphs: of this bank."""
        cells: list[tuple[int, str, Table, Table]] = []
        for g, row in zip(learners, rows, strict=True):
            experience = self.streams[g].experience
            if self.keep is not None and experience in self.to_keep[g]:
                assert isinstance(self.bank, AdapterBank)  # probes are made of adapters
                self.keep(State(g, experience), KeptRow(bank.param[row], self.bank.rank))
            table, slots = (each[g].setdefault(experience, {}) for each in (self.scores, self.slots))
            cells += [(row, locale, table, slots) for locale in self.to_score[g].get(experience, ())]
        self._fill(bank, cells, graphs)

    def _trace(self, team: "_Team", due: Mapping[int, int]) -> None:
        """Score learners within their experiences. due: row -> steps of its learner so far."""
        cells: list[tuple[int, str, Table, Table]] = []
        for row, step in due.items():
            g = team.learners[row]
            table = self.curves[g].setdefault(step, {})
            cells += [(row, locale, table, {}) for locale in self.to_score[g].get(self.streams[g].experience + 1, ())]
        self._fill(team.bank, cells, team.graphs)

    def _fill(self, bank: Rows, cells: Sequence[tuple[int, str, Table, Table]], graphs: Graphs | None) -> None:
        """Score (row of the bank, locale) and put the counts, and those of slot types if they are kept, into tables."""
        counts = evaluate(
            self.model, bank, self.corpus, [(row, locale) for row, locale, *_ in cells],
            partition=self.partition, pass_tokens=self.pass_tokens, graphs=graphs, by_slot=self.slot_counts,
        )  # fmt: skip
        for (_, locale, table, slots), count in zip(cells, counts, strict=True):
            table[locale] = (count.sum(0) if self.slot_counts else count).tolist()
            if self.slot_counts:
                slots[locale] = count.flatten().tolist()


class _Team:
    """The learners of a cohort that are training, with their rows side by side in a bank.

    On a GPU a learner that has ended stays as an idle row, so that captured graphs stay valid, until half of the rows are idle.
    """

    def __init__(self, cohort: Cohort, learners: list[int]):
        self.cohort, self.learners = cohort, learners
        everyone = len(learners) == len(cohort.learners)
        self.bank = cohort.bank if everyone else cohort.bank.select(learners)
        self.settings = StepSettings.of([cohort.learners[g] for g in learners], cohort.device, exact=cohort.exact, bank=self.bank)
        self.rated = any(experience.rate != 1 for g in learners for experience in cohort.learners[g].experiences)
        self.graphs = Graphs(cohort.device, enabled=self.bank.capturable)
        self._ahead: tuple[PackedStep, list[list[int]]] | None = None
        self._start()

    def _start(self) -> None:
        """Note who trains, and cut the rows into passes."""
        self.rewind()
        self.live = [row for row, g in enumerate(self.learners) if not self.cohort.ended(g)]
        mask = torch.zeros(len(self.learners), dtype=torch.bool)
        mask[self.live] = True
        self.active = send(mask, self.cohort.device)
        self.passes = self._passes()
        self._freeze()

    def _freeze(self) -> None:
        """Note what of each row does not train where its stream stands."""
        learners = [self.cohort.learners[g] for g in self.learners]
        if any(learner.ranks_of(0) for learner in learners):
            experiences = [self.cohort.streams[g].experience for g in self.learners]
            self.settings = self.settings._replace(frozen=frozen_columns(learners, self.bank, experiences))

    def goes_on(self) -> bool:
        """Whether the team trains on. Learners that have ended are made idle, if it may keep them."""
        if any(self.cohort.ended(self.learners[row]) for row in self.live):
            self._start()
            return self.graphs.enabled and 2 * len(self.live) > len(self.learners)
        return True

    def _passes(self) -> list[tuple[int, int]]:
        """Cut the rows into ranges of about `pass_tokens` tokens a step; a learner's batch is never split."""
        passes, first, room = [], 0, float(self.cohort.pass_tokens)
        for row in self.live:
            tokens = self.cohort.streams[self.learners[row]].batch_tokens()
            if room < self.cohort.pass_tokens and tokens > room:
                passes.append((first, row))
                first, room = row, float(self.cohort.pass_tokens)
            room -= tokens
        return [*passes, (first, len(self.learners))]

    def _pack(self) -> PackedStep:
        """All that the next step needs of the streams, which move on."""
        packed = PackedStep([], [], {}, [], self._rate())
        for first, last in self.passes:
            parts = []
            for row in (row for row in self.live if first <= row < last):
                stream = self.cohort.streams[self.learners[row]]
                packed.ruled.extend(self._ruled(row, stream))
                batch = stream.next()
                parts.append(Part(batch.sentences, batch.indices, row - first))
                packed.ended.extend([row] * batch.ended)
                if stream.due(self.cohort.score_every[self.learners[row]]):
                    packed.due[row] = stream.step
            packed.batches.append(pack(parts, last - first, padded=self.graphs.enabled))
        return packed

    def _rate(self) -> Tensor | None:
        if not self.rated:
            return None
        streams = [self.cohort.streams[g] for g in self.learners]
        return send(torch.tensor([stream.rate for stream in streams], dtype=torch.float64), self.cohort.device)

    def _ruled(self, row: int, stream: Stream) -> list[Ruled]:
        """The row with its rule, if it has one that applies to its stream's next batch."""
        g = self.learners[row]
        rule = self.cohort.rules.get(g)
        if rule is None or stream.experience == 0:
            return []
        memory = None
        if rule.replays:
            pool, indices, _ = stream.replayed(rule.number)
            memory = pack([Part(pool, indices, 0)], 1, padded=self.graphs.enabled)
        return [Ruled(row, rule, self.cohort.noted[g], memory, self.cohort.learners[g].ranks_of(stream.experience))]

    def note(self, ended: Sequence[int]) -> None:
        """Have the rules of rows whose experience has ended note what was learned."""
        for row in ended:
            g = self.learners[row]
            rule, stream = self.cohort.rules.get(g), self.cohort.streams[g]
            if rule is not None and not stream.finished:
                rule.learned(self.bank.param[row], self.cohort.noted[g], partial(self._squares, row, stream))
                before, ranks = (self.cohort.learners[g].ranks_of(stream.experience - back) for back in (1, 0))
                if ranks is not None and before is not None:
                    assert isinstance(self.bank, AdapterBank)
                    self.bank.open_(row, ranks, before)
        self._freeze()

    def _squares(self, row: int, stream: Stream, count: int) -> Tensor:
        sentences = stream.some(stream.experience - 1, count)
        return squared_gradients(self.cohort.model, self.bank, self.settings, row, sentences)

    def _pack_ahead(self) -> None:
        """Pack the next step, while a GPU computes this one. Not across the end of an experience, where scores come between."""
        before = [self.cohort.streams[g].counters() for g in self.learners]
        packed = self._pack()
        self._ahead = packed, before
        if packed.ended:
            self.rewind()

    def rewind(self) -> None:
        """Take back what is packed ahead, so that the streams stand where training does."""
        if self._ahead is not None:
            for g, counters in zip(self.learners, self._ahead[1], strict=True):
                self.cohort.streams[g].seek(counters)
            self._ahead = None

    def advance(self) -> tuple[float, list[int], dict[int, int]]:
        """Train every live row for one step.

        Returns the mean of the finite losses, the rows whose experience has ended, and those due as in `PackedStep`. A row whose
        loss or gradient norm is not finite is entered in the cohort's `failed`.
        """
        cohort = self.cohort
        batches, ended, due, ruled, rate = self._pack() if self._ahead is None else self._ahead[0]
        self._ahead = None
        cohort.tokens += sum(batch.tokens for batch in batches)
        train = partial(train_step, cohort.model, self.bank, self.settings, graphs=self.graphs, active=self.active)
        results = train(batches, ruled=ruled, rate=rate)
        both = torch.stack([result.float() for result in results])
        if self.graphs.enabled and not ended:
            self._pack_ahead()
        loss, norms = both.cpu()  # the one wait for a GPU
        for row in (~(torch.isfinite(loss) & torch.isfinite(norms))).nonzero()[:, 0].tolist():  # idle rows have zeros
            reason = f"loss {float(loss[row]):g}, gradient norm {float(norms[row]):g}"
            cohort.failed[self.learners[row]] = f"diverged at step {int(self.bank.steps[row]) + 1}: {reason}"
            ended = [other for other in ended if other != row]
            due.pop(row, None)
        loss = loss[self.live]
        cohort.losses = dict(zip((self.learners[row] for row in self.live), loss.tolist(), strict=True))
        finite = loss[torch.isfinite(loss)]
        return float(finite.mean()) if finite.numel() else math.nan, ended, due

    def write_back(self) -> None:
        """Copy the rows, with their optimiser's state, to the cohort's bank."""
        if self.bank is not self.cohort.bank:
            self.cohort.bank.copy_rows_(self.learners, self.bank)
