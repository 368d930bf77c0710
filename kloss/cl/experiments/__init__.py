"""Experiments: questions to a study beyond its score matrices, each with what it scores besides and what it concludes.

To add one: a module with `plan`, `record`, SHAPE and `analyse`, a line in EXPERIMENTS, and its name in `config.ExperimentName`.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ...config import Config
from ...errors import UserError
from ..probes import Counts
from ..shapes import Shape, check_shape
from ..study import Study
from . import (
    damage,
    matched,
    mechanism,
    merge,
    methods,
    order,
    pairs,
    parts,
    remedies,
    savings,
    scripts,
    tokenizer,
    weights,
    where,
)
from .section import Needs, Section

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus


class Experiment(NamedTuple):
    """What an experiment does.

    strategies: those that it looks at, of which the study must have one.
    plan: from a study to what must be trained and scored besides; nothing where it lacks what the experiment looks at.
    record: from corpus and study, the scores of its learners and the counts of the plan's probes to the entries of scores.json.
    shape: of an entry.
    analyse: from the contents of scores.json and these entries to the section of the report; None without data.
    languages: what it needs of them besides that there are two or more.
    """

    strategies: tuple[str, ...]
    plan: Callable[[Config, Study], Needs]
    record: Callable[[Config, "Corpus", Study, Any, list[Counts]], list[dict[str, Any]]]
    shape: Shape
    analyse: Callable[[Mapping[str, Any], list[dict[str, Any]]], Section | None]
    languages: str = ""


EXPERIMENTS = {
    "where": Experiment(("shared", "partial"), where.plan, where.record, where.SHAPE, where.analyse),
    "damage": Experiment(("lora-multi",), damage.plan, damage.record, damage.SHAPE, damage.analyse),
    "merge": Experiment(("non-shared",), merge.plan, merge.record, merge.SHAPE, merge.analyse),
    "order": Experiment(("shared",), order.plan, order.record, order.SHAPE, order.analyse),
    "pairs": Experiment(("non-shared",), pairs.plan, pairs.record, pairs.SHAPE, pairs.analyse),
    "mechanism": Experiment(("shared",), mechanism.plan, mechanism.record, mechanism.SHAPE, mechanism.analyse),
    **{
        name: Experiment(
            ("shared",), partial(matched.plan, setting), partial(matched.record, setting), matched.SHAPE, matched.analyse, several
        )
        for name, setting, several in (("rates", "lr", "with several --lr"), ("ranks", "rank", "with several --rank"))
    },
    "remedies": Experiment(("shared",), remedies.plan, remedies.record, remedies.SHAPE, remedies.analyse),
    "methods": Experiment(("shared",), methods.plan, methods.record, methods.SHAPE, methods.analyse),
    "weights": Experiment(
        ("shared",), weights.plan, weights.record, weights.SHAPE, weights.analyse, "with --strategies non-shared beside it"
    ),
    "parts": Experiment(("shared",), parts.plan, parts.record, parts.SHAPE, parts.analyse),
    "savings": Experiment(("shared",), savings.plan, savings.record, savings.SHAPE, savings.analyse),
    "tokenizer": Experiment(
        ("shared",),
        tokenizer.plan,
        tokenizer.record,
        tokenizer.SHAPE,
        tokenizer.analyse,
        "of several scripts, --backbone tiny and no --tokenizer: a pretrained backbone's embeddings belong to its vocabulary",
    ),
    "scripts": Experiment(
        ("shared",), scripts.plan, scripts.record, scripts.SHAPE, scripts.analyse, "of one script and one of another"
    ),
}


def with_experiments(config: Config, study: Study) -> Study:
    """The study with all that its experiments need."""
    probes = []
    for name in dict.fromkeys(config.experiments):
        needs = EXPERIMENTS[name].plan(config, study)
        for learner, to_score in needs.learners:
            if learner not in study.learners:
                study.learners.append(learner)
                study.to_score.append({})
            g = study.learners.index(learner)
            _score(study.to_score[g], [(experience, locale) for experience in to_score for locale in to_score[experience]])
        for g, experience, locale in needs.cells:
            _score(study.to_score[g], [(experience, locale)])
        probes += [(name, probe) for probe in needs.probes]
    return study._replace(probes=tuple(probes))


def _score(to_score: dict[int, list[str]], cells: Iterable[tuple[int, str]]) -> None:
    """Add cells (experiences completed, locale) to what is scored of a learner, each once."""
    for experience, locale in cells:
        scored = to_score.setdefault(experience, [])
        if locale not in scored:
            scored.append(locale)


def idle(config: Config, study: Study) -> list[str]:
    """A line for each experiment that a study gives nothing to look at."""
    names = [name for name in dict.fromkeys(config.experiments) if not any(EXPERIMENTS[name].plan(config, study))]
    lines = []
    for name in names:
        wanted = " or ".join(EXPERIMENTS[name].strategies), f"two languages or more {EXPERIMENTS[name].languages}".strip()
        lines.append(f"--experiments {name} has no effect: it needs --strategies {wanted[0]}, of {wanted[1]}")
    return lines


def recorded(
    config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]
) -> dict[str, list[dict[str, Any]]]:
    """ "experiments" of scores.json. scores: of all learners. counts: of all probes."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name in dict.fromkeys(config.experiments):
        own = [count for (of, _), count in zip(study.probes, counts, strict=True) if of == name]
        results[name] = EXPERIMENTS[name].record(config, corpus, study, scores, own)
    return results


def sections(scores: Mapping[str, Any]) -> Iterable[Section]:
    """The sections of the experiments in scores.json that this version knows. Raises UserError for damaged entries."""
    for name, data in (scores.get("experiments") or {}).items():
        if name in EXPERIMENTS:
            try:
                check_shape(data, [EXPERIMENTS[name].shape])
            except UserError as error:
                raise UserError(f"scores.json is not what kloss wrote: experiments.{name}, {error}") from error
            section = EXPERIMENTS[name].analyse(scores, data)
            if section is not None:
                yield section
