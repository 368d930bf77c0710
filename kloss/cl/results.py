"""scores.json: the score matrix and the metrics of every trial, what they were measured on, and what was our choice."""

import csv
import io
import math
from collections.abc import Hashable, Sequence
from itertools import chain

from ..config import Config
from ..models import XLMRConfig
from .corpus import Corpus
from .experiments import recorded
from .experiments.methods import PREFIX
from .metrics import FLOOR, summarise
from .rules import EWC
from .runner import Outcome
from .strategies import STRATEGIES
from .stream import Stream
from .study import Study, Trial
from .summary import comparisons, summary_rows
from .units import traits, unit_of

TRIAL = ("strategy", "label", "rank", "lr", "order", "order_name", "seed", "groups")  # copied from a trial
CLIPPED = "each learner's gradient norm clipped"
CHOICES = (
    f"AdamW with β 0.9 and 0.999, decoupled weight decay, {CLIPPED}, a constant rate behind a short "
    "linear warm-up, and one optimiser state through a learner's whole sequence.",
    "LoRA on every linear layer of the encoder (query, key, value, attention output, both feed-forward layers), not on the "
    "pooler; alpha is the rank unless given; A uniform in ±1/√K, B zero; one dropout mask for the fused query, key and value.",
    "A tagging head per learner, trained with its adapter; learners of one seed start from the same draw.",
    "The orders of the languages are random, drawn from the seed; Order 1 is the first, unless one was given.",
    "Micro span F1 as seqeval computes it on BIO labels; the first subword of a word is labelled. ja-JP, zh-CN and zh-TW are "
    "split into characters, with runs of ASCII kept whole.",
    "NON-SHARED and MONO: a language not yet learned is scored with the learner trained last. Partially shared: with its "
    "group's learner, or with the one trained last while its group has learned nothing.",
    f"A learner whose best F1 on a language just after its training is below {FLOOR:.2f} has learned nothing.",
    "Forgetting is from the best earlier score of the same learner. The share kept is F1 at the end over F1 when learned, for "
    f"languages with {FLOOR:.2f} or more when learned.",
    "Intervals are over final scores of different learners: Student's below five values, else a studentised bootstrap. Where "
    "orders and seeds cross, the squared widths over orders and over seeds add up.",
    "CFT after Winata et al. 2023; multi-hop transfer in two readings of ours, impact and retention.",
    "The tiny backbone is a small XLM-R warmed up by masked-language modelling on the corpus's own training text: 30 % of the "
    "tokens, each to be told from tokens drawn from the text. It is not XLM-R base, and its figures are not the paper's.",
)

REMEDIES = (
    "Replay adds that share of each earlier language's utterances to each experience, at even distances, the same in every "
    "epoch; A-GEM draws a batch of them for each step and takes its gradient without dropout.",
    f"L2 pulls with half the squared distance to the adapter at the end of the last experience. EWC is online, with decay "
    f"{EWC.KEEP}; its Fisher information is the mean square of the gradients of {EWC.SENTENCES} single utterances with their own "
    "labels, scaled to a mean of 1. Rules act before clipping.",
    "O-LoRA: a language trains ranks of its own, as many as plain SHARED's and with the same scaling; those of earlier languages "
    "stay. The penalty is of squared entries, as in the paper's text; its published code takes absolute values, and penalises "
    "norms besides. The head is shared and trains on; new ranks begin with the second moments of those before.",
    "LR ADJUST is our reading of Winata et al. 2023, whose formula was not at hand: an experience has the given factor times the "
    "rate of the one before.",
)
TOKENIZER = (
    "The balanced tokenizer is trained on as much text as the study's, in which each script has as many words: drawn without "
    "replacement where there are more, repeated where there are fewer. A word of a language labelled by character is one.",
)

METHODS = (
    f"Prefix tuning learns {PREFIX} keys and values of each layer, drawn normal with deviation 1 as peft's, without Li and "
    "Liang's reparametrisation; positions of tokens stay as they are. IA³ has factors of keys, values and the feed-forward's "
    "inner activation, which begin at 1; weight decay pulls them there.",
    "Fusion is our reading of AdapterFusion (Pfeiffer et al. 2021): the NON-SHARED adapters of all languages of the study stay "
    "as they are, and a learner trains a gate for each of them in each layer, which begins at their mean and decays to "
    "it; AdapterFusion's own weights depend on the token.",
    "Learners of these methods have no dropout of inputs as adapters have, and a head with LoRA's rate.",
)
OF_EXPERIMENTS = {"remedies": REMEDIES, "methods": METHODS, "tokenizer": TOKENIZER}


def results(config: Config, corpus: Corpus, study: Study, backbone: XLMRConfig, parameters: int, outcome: Outcome) -> dict:
    """The contents of scores.json, JSON-ready.

    parameters: number of the backbone's parameters.
    Runs of one "unit" have the same final scores, for they are of the same learners. "diverged_besides" is there where a learner
    of an experiment, whose scores are in no run, diverged or was not begun.
    """
    in_runs = {g for trial in study.trials for g in trial.learners}
    besides = [
        f"{learner.name} {reason}"
        for g, (learner, reason) in enumerate(zip(study.learners, outcome.failed, strict=True))
        if reason and g not in in_runs
    ]
    runs: list[dict] = []
    numbers: dict[Hashable, int] = {}
    trained = study._replace(weights=outcome.weights)
    for trial in study.trials:
        matrix = trial.matrix(outcome.scores)
        reasons = [f"{study.learners[g].name} {outcome.failed[g]}" for g in trial.learners if outcome.failed[g]]
        runs.append(
            {
                **{name: getattr(trial, name) for name in TRIAL},
                "trainable_parameters": sum(outcome.weights[g] for g in trial.learners),
                "steps": sum(Stream.of(corpus, study.learners[g]).steps() for g in trial.learners),
                "diverged": "; ".join(reasons) or None,
                "R": matrix,
            }
        )
        run = runs[-1]
        run["metrics"] = summarise(matrix, traits(run).own)
        if config.score_every:
            run["curves"] = curves(config, corpus, study, trial, outcome)
        run["unit"] = numbers.setdefault((trial.label, trial.lr, *unit_of(run)), len(numbers))
    return {
        "format": 1,
        "name": config.preset,
        "corpus": {
            "name": corpus.name,
            "synthetic": config.data == "synthetic",
            "locales": corpus.locales,
            "labels": len(corpus.labels),
            "train_utterances": _count(corpus, "train"),
            "test_utterances": _count(corpus, "test"),
            "scored": config.eval_split,
            "scored_utterances": _count(corpus, config.eval_split),
            "truncated": corpus.truncated,
            "tokens_per_word": {locale: round(corpus.tokens_per_word(locale), 3) for locale in corpus.locales},
        },
        "backbone": {
            "name": config.backbone,
            "parameters": parameters,
            "layers": backbone.num_hidden_layers,
            "hidden": backbone.hidden_size,
            "vocabulary": backbone.vocab_size,
        },
        "runs": runs,
        "summary": summary_rows({"runs": runs}),
        "comparisons": comparisons({"runs": runs}),
        **({"experiments": recorded(config, corpus, trained, outcome.scores, outcome.probed)} if config.experiments else {}),
        **({"diverged_besides": besides} if besides else {}),
        "choices": [
            choice.replace(CLIPPED, "gradients not clipped") if math.isinf(config.max_norm) else choice
            for choice in (*CHOICES, *chain(*(OF_EXPERIMENTS[name] for name in OF_EXPERIMENTS if name in config.experiments)))
        ],
    }


def curves(config: Config, corpus: Corpus, study: Study, trial: Trial, outcome: Outcome) -> list[dict]:
    """Scores within experiences.

    An entry has the experience, counted from 1, the steps so far, and locale -> true positives, predicted and gold spans.
    learner: which of the trial's, counted from 0.
    """
    entries = []
    for learner, g in enumerate(trial.learners):
        curve, marks = outcome.curves[g], Stream.of(corpus, study.learners[g]).marks(config.score_every).items()
        entries += [
            {"learner": learner, "experience": i + 1, "step": step, "counts": curve[step]} for step, i in marks if step in curve
        ]
    return entries


COLUMNS = ("strategy", "rank", "rate", "order", "seed", "step", "trained", "tested", "TP", "predicted", "gold")


def score_table(study: Study, outcome: Outcome, slots: Sequence[str] = ()) -> str:
    """The contents of scores.csv: a line for each measured cell of each R, with its span counts.

    With the names of slot types those of slots.csv: a line for each type that occurs in a cell, predicted or in gold.

    step: row of R, 0 before training. trained: the locale learned in that step, all of them for joint training. tested: the
    locale that was scored. Cells of different runs may be the same measurement: equal learners are trained once.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow((*COLUMNS[:-3], *["slot"] * bool(slots), *COLUMNS[-3:]))
    for trial in study.trials:
        joint = STRATEGIES[trial.strategy].joint
        for step in range(trial.layout.rows):
            trained = "" if step == 0 else " ".join(trial.order) if joint else trial.order[step - 1]
            for column, locale in enumerate(trial.order):
                counts = trial.counts(outcome.slots if slots else outcome.scores, step, column)
                if counts is None:
                    continue
                cell = (trial.strategy, trial.rank, trial.lr, trial.order_name, trial.seed, step, trained, locale)
                lines = [([slot], counts[3 * k : 3 * k + 3]) for k, slot in enumerate(slots)] or [([], counts)]
                table.writerows((*cell, *slot, *own) for slot, own in lines if any(own) or not slot)
    return text.getvalue()


def _count(corpus: Corpus, partition: str) -> dict[str, int]:
    return {locale: corpus.sentences(locale, partition).number for locale in corpus.locales}
