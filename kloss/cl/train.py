"""The loop: learners advance together, one packed forward and backward pass a round, and are scored as experiences end."""

import math
from collections.abc import Callable, Sequence

import torch

from ..kernels import adapter_adamw_, row_keys, token_loss
from ..models import AdapterBank, FlatModel, StepDropout, XLMRForTokenClassification
from .corpus import Corpus
from .evaluate import evaluate
from .learner import Learner
from .packing import pack
from .stream import Stream

BETAS, EPS = (0.9, 0.999), 1e-8


class Cohort:
    """Learners that advance together: a row of weights, a row of moments, a stream and a table of scores each.

    learners: all of them LoRA, or one that trains the whole model. wanted: for each learner, what to score after how many
    experiences: {experience: locales}. exact: as in AdapterBank; then a learner's weights are the same to the bit whoever is
    here, as long as the largest rank is. Attributes: scores, for each learner {experience: {locale: [TP, predicted, gold]}};
    failed, {learner: what happened}; steps int64 [G].
    """

    def __init__(
        self,
        model: XLMRForTokenClassification,
        corpus: Corpus,
        learners: Sequence[Learner],
        wanted: Sequence[dict[int, Sequence[str]]],
        *,
        pass_tokens: int = 8192,
        exact: bool = False,
    ):
        self.model, self.corpus, self.learners, self.wanted = model, corpus, learners, wanted
        self.pass_tokens, self.exact = pass_tokens, exact
        self.device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
        if learners[0].rank is None:
            assert len(learners) == 1, "models are trained one at a time"
            generator = torch.Generator().manual_seed(learners[0].seed)
            with torch.no_grad():
                shape = model.classifier.weight.shape
                head = torch.empty(shape).normal_(0, model.config.initializer_range, generator=generator)
                model.classifier.weight.copy_(head)
                model.classifier.bias.zero_()
            self.bank = FlatModel(model)
        else:
            model.freeze_backbone()
            self.bank = AdapterBank(
                model,
                len(learners),
                [learner.rank for learner in learners],
                alpha=[learner.alpha for learner in learners],
                seeds=[learner.seed for learner in learners],
                dtype=dtype,
                device=self.device,
                exact=exact,
            )
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.bank.param), torch.zeros_like(self.bank.param)
        self.steps = torch.zeros(len(learners), dtype=torch.long)
        self.streams = [Stream.of(corpus, learner) for learner in learners]
        self.scores: list[dict[int, dict[str, list[int]]]] = [{} for _ in learners]
        self.failed: dict[int, str] = {}
        self.tokens = 0
        self._team: _Team | None = None

    def total_tokens(self) -> int:
        """Training tokens from start to end."""
        return sum(stream.tokens() for stream in self.streams)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and JSON of everything that decides how this goes on."""
        if self._team is not None:
            self._team.give_back()
        tensors = {
            "param": self.bank.param,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "steps": self.steps,
        }
        counters = [stream.counters() for stream in self.streams]
        scores = [{str(experience): row for experience, row in table.items()} for table in self.scores]
        failed = {str(g): reason for g, reason in self.failed.items()}
        return tensors, {"counters": counters, "scores": scores, "failed": failed, "tokens": self.tokens}

    def load_state(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        """The inverse of `state`."""
        with torch.no_grad():
            self.bank.param.copy_(tensors["param"])
        self.bank.refresh()
        self.exp_avg.copy_(tensors["exp_avg"])
        self.exp_avg_sq.copy_(tensors["exp_avg_sq"])
        self.steps.copy_(tensors["steps"])
        for stream, counters in zip(self.streams, state["counters"], strict=True):
            stream.seek(counters)
        self.scores = [{int(experience): row for experience, row in table.items()} for table in state["scores"]]
        self.failed = {int(g): reason for g, reason in state["failed"].items()}
        self.tokens = state["tokens"]

    def train(self, after_round: Callable[["Cohort", float], None] = lambda cohort, loss: None) -> None:
        """Trains every learner to the end of its stream. after_round(cohort, mean loss) is called behind each round, where
        `state` may be taken."""
        untouched = [g for g, stream in enumerate(self.streams) if stream.counters() == [0, 0, 0] and 0 not in self.scores[g]]
        self._score(self.bank, untouched, untouched)
        while rows := [g for g, s in enumerate(self.streams) if not s.finished and g not in self.failed]:
            self._team = team = _Team(self, rows)
            while not any(self.streams[g].finished or g in self.failed for g in rows):
                loss, ended = team.advance()
                self._score(team.bank, [rows[i] for i in ended], ended)
                after_round(self, loss)
            team.give_back()
            self._team = None

    def _score(self, bank, learners: Sequence[int], rows: Sequence[int]) -> None:
        """Fills the scores of learners, which are the given rows of the bank, after the experiences that they have had."""
        pairs, places = [], []
        for g, row in zip(learners, rows, strict=True):
            experience = self.streams[g].experience
            table = self.scores[g].setdefault(experience, {})
            for locale in self.wanted[g].get(experience, ()):
                pairs.append((row, locale))
                places.append((table, locale))
        bank = bank if isinstance(bank, AdapterBank) else None
        counts = evaluate(self.model, bank, self.corpus, pairs, pass_tokens=self.pass_tokens)
        for (table, locale), count in zip(places, counts.tolist(), strict=True):
            table[locale] = count


class _Team:
    """The learners of a cohort that are still training, with their rows side by side."""

    def __init__(self, cohort: Cohort, rows: list[int]):
        self.cohort, self.rows = cohort, rows
        self.whole = len(rows) == len(cohort.learners)
        learners = [cohort.learners[g] for g in rows]
        if self.whole:
            self.bank, self.exp_avg, self.exp_avg_sq = cohort.bank, cohort.exp_avg, cohort.exp_avg_sq
        else:
            self.bank = cohort.bank.select(rows)
            self.index = torch.tensor(rows, device=cohort.device)
            self.exp_avg, self.exp_avg_sq = cohort.exp_avg[self.index], cohort.exp_avg_sq[self.index]
        self.steps = cohort.steps[rows]

        def each(name: str) -> torch.Tensor:
            return torch.tensor([getattr(learner, name) for learner in learners], dtype=torch.float32)

        self.weight_decay, self.max_norm = each("weight_decay"), each("max_norm")
        self.seeds = torch.tensor([learner.seed for learner in learners], device=cohort.device)
        drop = {name: each(name).to(cohort.device) for name in ("dropout", "lora_dropout")}
        # Without dropout an op may sum in another order: an exact learner keeps p = 0, as beside neighbours that drop.
        self.dropout = {name: p if cohort.exact or bool(p.any()) else None for name, p in drop.items()}
        self.passes = self._passes(learners)

    def _passes(self, learners: Sequence[Learner]) -> list[tuple[int, int]]:
        """Ranges of rows that share a pass: a round's tokens may exceed what a pass should hold, a batch is never split."""
        passes, first, room = [], 0, self.cohort.pass_tokens
        for i, (learner, g) in enumerate(zip(learners, self.rows, strict=True)):
            stream = self.cohort.streams[g]
            tokens = (
                learner.batch_size
                * stream.tokens()
                / sum(stream.epochs * stream.sentences(k) for k in range(len(stream.experiences)))
            )
            if i > first and tokens > room:
                passes.append((first, i))
                first, room = i, self.cohort.pass_tokens
            room -= tokens
        return [*passes, (first, len(learners))]

    def advance(self) -> tuple[float, list[int]]:
        """One step of every row. Returns the mean loss, and the rows whose experience has ended. A row whose loss or gradient
        is not finite is not updated and is entered in the cohort's `failed`."""
        cohort, losses, ended = self.cohort, [], []
        self.bank.zero_grad()
        for first, last in self.passes:
            drawn = [cohort.streams[g].next() for g in self.rows[first:last]]
            ended += [first + i for i, (_, _, end) in enumerate(drawn) if end]
            parts = [(pool, index, i) for i, (pool, index, _) in enumerate(drawn)]
            batch = pack(parts, last - first, cohort.device)
            steps = self.steps[first:last].to(cohort.device)[batch.segments.adapter.long()]
            keys = row_keys(steps, batch.sequence, batch.cu_seqlens, rows=batch.input_ids.numel())
            hidden, lora = (p if p is None else p[first:last] for p in self.dropout.values())
            seeds, row_adapter = self.seeds[first:last], batch.segments.row_adapter
            dropout = StepDropout(hidden, hidden, lora, seeds, keys, row_adapter, cohort.model.num_sites)
            bank = self.bank.span(first, last) if isinstance(self.bank, AdapterBank) else None
            logits = cohort.model(batch.input_ids, batch.cu_seqlens, batch.segments, bank, dropout=dropout)
            loss, _ = token_loss(logits, batch.labels, batch.segments)
            loss.sum().backward()
            losses.append(loss.detach())
            cohort.tokens += batch.input_ids.numel()
        learners = [cohort.learners[g] for g in self.rows]
        lr = torch.tensor([x.rate(int(step)) for x, step in zip(learners, self.steps, strict=True)])
        norms = adapter_adamw_(
            self.bank.param,
            self.bank.grad,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            lr,
            betas=BETAS,
            eps=EPS,
            weight_decay=self.weight_decay,
            max_norm=self.max_norm,
            active=torch.ones(len(self.rows), dtype=torch.bool),
        )
        self.bank.refresh()
        cohort.steps[self.rows] = self.steps
        loss, norms = torch.cat(losses).cpu(), norms.cpu()
        for i in (~(torch.isfinite(loss) & torch.isfinite(norms))).nonzero()[:, 0].tolist():
            g = self.rows[i]
            reason = f"loss {float(loss[i]):g}, gradient norm {float(norms[i]):g}"
            cohort.failed[g] = f"diverged at step {int(self.steps[i]) + 1}: {reason}"
            ended = [row for row in ended if row != i]
        finite = loss[torch.isfinite(loss)]
        return float(finite.mean()) if finite.numel() else math.nan, ended

    def give_back(self) -> None:
        """Writes the rows back to the cohort."""
        if not self.whole:
            with torch.no_grad():
                self.cohort.bank.param[self.index] = self.bank.param
            self.cohort.exp_avg[self.index], self.cohort.exp_avg_sq[self.index] = self.exp_avg, self.exp_avg_sq
