"""A whole study: utterances in, score matrices and a report out.

All LoRA learners of a study train in the same packed passes over one frozen XLM-R: one per language, one for all languages,
several ranks, orders and seeds. The same command continues a run that was stopped.
"""

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields, make_dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro

from .cl.backbone import DTYPES, load_backbone, tiny_config, warm_up_threads
from .cl.banks import row_of
from .cl.begun import begun, changes, check_backbone, digest_of_weights, groups_of
from .cl.boards import writer
from .cl.corpus import Corpus, load_corpus
from .cl.experiments import idle, with_experiments
from .cl.languages import LOCALES, check_locales
from .cl.learner import BALANCED
from .cl.results import results, score_table
from .cl.rule_costs import rule_memory
from .cl.rundir import RunFolder, open_run
from .cl.runner import Progress, on_signals, train_study, unsaved
from .cl.shapes import check_scores
from .cl.shares import cohorts_of
from .cl.spans import slot_names
from .cl.strategies import STRATEGIES
from .cl.study import Study, plan
from .cl.summary import best_on_dev, chosen_on_dev, comparisons, summary_rows, warnings
from .config import Config
from .console import Console, Silent
from .errors import UserError
from .estimate import Machine, check_patterns, describe, plan_for, with_pass_tokens
from .files import leaving_pipes, read_json, shown
from .machine import keep_memory, on_threads, remarks
from .models import XLMRForTokenClassification
from .presets import PRESETS
from .processes import ALONE, Processes, ProcessLost, own_gpu, started
from .report import write_report

DIVERGED = 3  # exit status


def parse(arguments: Sequence[str]) -> Config:
    """Return a command line's configuration: a preset, overridden by the other flags. Exits with status 2 if malformed."""
    for argument in arguments:
        if re.search("[\ud800-\udfff]", argument):  # what the shell gave as other bytes
            raise UserError(f"the argument '{shown(argument)}' is not UTF-8")
    preset_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    preset_only.add_argument("--preset", nargs="?")
    name = preset_only.parse_known_args(arguments)[0].preset
    preset = PRESETS.get(name, PRESETS["demo"])()  # tyro refuses an unknown name below
    sections = []
    for base in reversed(Config.__bases__):
        defaults = base(**{field.name: getattr(preset, field.name) for field in fields(base)})
        sections.append((base.__name__.removesuffix("Config").lower(), base, defaults))
    options: object = tyro.cli(
        make_dataclass("Options", sections),
        args=list(arguments),
        prog="python -m kloss.run",
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return Config(**{name: value for section in vars(options).values() for name, value in vars(section).items()})


def prepare(config: Config, progress: Progress) -> tuple[Corpus, Study]:
    """Return the tokenised corpus and the plan. Raises UserError for settings that do not fit together."""
    config = config.checked()
    for line in without_effect(config):
        progress.say(line)
    names, synthetic = check_locales(config.languages), None
    locales = None if names_all(config) else names or None
    if config.data == "synthetic":
        locales = locales or LOCALES
        synthetic = {"overlap": config.overlap, "relatedness": config.relatedness}
        limits = {"train": config.limit, "test": config.eval_limit}
        if config.eval_split == "dev":  # more than the few of the default; training stays the same
            limits["dev"] = config.eval_limit
        synthetic |= {name: limit for name, limit in limits.items() if limit is not None}
    load = partial(
        load_corpus,
        config.data,
        tokenizer=config.tokenizer or (None if config.backbone == "tiny" else config.backbone),
        locales=locales,
        limit=config.limit,
        eval_limit=config.eval_limit,
        max_length=config.max_length,
        cache=config.cache,
        seed=config.seed,
        progress=progress,
        synthetic=synthetic,
        vocabulary=config.vocabulary,
    )
    corpus = load()
    absent = [locale for locale in names if locale not in corpus.locales]
    if absent:
        raise UserError(f"{corpus.name} has no utterances in {', '.join(absent)}")
    empty = [locale for locale in corpus.locales if not corpus.sentences(locale, config.eval_split).number]
    if empty:
        raise UserError(f"--eval-split {config.eval_split}: {config.data} has no such utterances of {', '.join(empty[:5])}")
    study = plan(config, corpus.locales)
    for line in idle(config, study) if config.experiments != PRESETS[config.preset]().experiments else ():
        progress.say(line)
    study = with_experiments(config, study)
    check_patterns(config, corpus, study)
    if any(learner.tokenizer == BALANCED for learner in study.learners):
        corpus = replace(corpus, others={BALANCED: load(balanced=True)})
    return corpus, study


def folder_of(config: Config) -> Path:
    return Path(config.out or f"runs/{config.preset}")


def names_all(config: Config) -> bool:
    """Return whether `--languages` names all locales in their own order: the same study as naming none, so the same caches.

    A run folder that an earlier version began with all of them named goes on as it began.
    """
    return config.languages == LOCALES and begun(folder_of(config) / "config.json").get("languages") != list(LOCALES)


def with_selection(config: Config) -> Config:
    """Return the configuration with the rank and rate that `--select` chooses. Raises UserError where it can choose none."""
    if not config.select:
        return config
    try:
        scores = read_json(Path(config.select) / "scores.json")
        check_scores(scores)
        rank, lr = best_on_dev(scores)
    except UserError as error:
        raise UserError(f"--select {config.select}: {error}") from error
    return replace(config, rank=(rank,), lr=(lr,))


def without_effect(config: Config) -> list[str]:
    """Return a line for each flag that was given, that is, differs from the preset, and changes nothing in this study."""
    preset, strategies = PRESETS[config.preset](), [STRATEGIES[name] for name in config.strategies]
    reasons = (
        ("no strategy is partial", "partial" not in config.strategies, "groups"),
        ("every strategy trains all languages at once", all(s.joint for s in strategies), "order orders"),
        ("every strategy trains whole models", all(s.full for s in strategies), "rank alpha lr lora_dropout trains max_learners"),
        ("no strategy trains whole models", not any(s.full for s in strategies), "full_lr"),
        ("no experiment is remedies", "remedies" not in config.experiments, "remedies"),
        ("no experiment is methods", "methods" not in config.experiments, "methods"),
        ("no experiment is parts", "parts" not in config.experiments, "shared_parts"),
        ("nothing is dropped", config.dropout == config.lora_dropout == 0, "dropout_seed"),
        ("the data is not synthetic", config.data != "synthetic", "overlap relatedness"),
        ("the backbone is not tiny", config.backbone != "tiny", "tiny_layers tiny_hidden pretrain_steps pretrain_batch"),
        ("it is for --dry-run", not config.dry_run, "plan_for"),
        ("no tokenizer is trained", bool(config.tokenizer or config.backbone != "tiny"), "vocabulary"),
    )
    names = [(name, reason) for reason, applies, group in reasons if applies for name in group.split()]
    given = [(name, reason) for name, reason in names if getattr(config, name) != getattr(preset, name)]
    return [f"--{name.replace('_', '-')} has no effect: {reason}" for name, reason in given]


def device_of(name: str) -> torch.device:
    """Return the device for auto, cpu or cuda, a GPU with its index. Raises UserError for cuda without a GPU."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu, or auto")
    return torch.device("cuda", own_gpu())


def check_memory(config: Config, corpus: Corpus, study: Study, machine: Machine) -> None:
    """Raise UserError if the tiny backbone, or its largest cohort of adapters, takes more memory than the device has."""
    if config.backbone != "tiny":
        return  # its sizes are not known yet
    sizes = tiny_config(config, corpus)
    width, tokens = sizes.hidden_size, sizes.vocab_size + sizes.max_position_embeddings
    each = 16  # bytes of a weight, its gradient and two moments
    needed = {f"the tiny backbone of width {width:,}": each * width * (tokens + 12 * sizes.num_hidden_layers * width)}
    for members, rank in cohorts_of(plan_for(config, corpus, study, sizes, machine)):
        if rank is not None:
            learners = [study.learners[g] for g in members]
            row = row_of(sizes, learners[0], rank)
            noted = rule_memory(learners, row, DTYPES[config.dtype].itemsize)
            name = f"a cohort of {len(members):,} adapters of rank {rank:,} (see --max-learners)"
            needed[f"{name}, with what rules note," if noted else name] = each * len(members) * row + noted
    for name, size in needed.items():
        if size > machine.memory:
            there = f"{machine.device} has {machine.memory / 2**30:,.1f}"
            raise UserError(f"{name} needs {size / 2**30:,.1f} GiB for training; {there}")


def run(config: Config, progress: Progress, processes: Processes = ALONE) -> tuple[Path, dict]:
    """Run a study, or continue one; as one of several processes, a share of it.

    Returns the run folder and the contents of scores.json. Raises ProcessLost if another process cannot do its share.
    """
    config, once = config.checked(), progress if processes.rank == 0 else Silent()  # what all would say
    with processes.first():
        device = device_of(config.device)
        corpus, study = prepare(config, once)
        machine = Machine.of(device, processes.number)
        check_memory(config, corpus, study, machine)
    for locale, count in corpus.truncated.items():
        if count:
            once.say(f"{locale}: {count} utterances are longer than {corpus.max_length} subwords and were cut")
    if config.select:
        once.say(f"chosen on dev in {config.select}: rank {config.rank[0]}, learning rate {config.lr[0]:g}")
    identity = config.identity() | {"corpus": corpus.fingerprint} | ({"languages": []} if names_all(config) else {})
    identity |= groups_of(config, corpus, folder_of(config), once.say)
    identity |= {f"corpus, {name}": own.fingerprint for name, own in corpus.others.items()}
    with contextlib.ExitStack() as stack:
        with processes.first():
            folder = stack.enter_context(open_run(folder_of(config), identity, processes.rank, processes.number))
        if folder.done:
            if processes.rank == 0 and config.backbone != "tiny" and begun(folder.path / "env.json").get("backbone"):
                check_backbone(config, folder, digest_of_weights(load_backbone(config, corpus, torch.device("cpu"), once)))
            once.say(f"{folder.path} is complete already; its report is made anew")
        else:
            _train(config, corpus, study, device, folder, progress, processes)
        if processes.rank == 0:
            for line in unsaved(folder, study) if config.save_adapters else ():
                once.say(line)
            write_report(folder.path)
        return folder.path, folder.scores()


def _train(
    config: Config,
    corpus: Corpus,
    study: Study,
    device: torch.device,
    folder: RunFolder,
    progress: Progress,
    processes: Processes,
) -> None:
    """Train what is left of a study, and write its scores."""
    once = progress if processes.rank == 0 else Silent()
    with processes.first():
        model = load_backbone(config, corpus, device, once)
        backbone, parameters, digest = model.config, model.num_parameters, digest_of_weights(model)
        if processes.rank == 0:
            check_backbone(config, folder, digest)
        if processes.number > 1:
            found = {"the corpus": corpus.fingerprint, "the backbone": digest}
            for name, own in corpus.others.items():
                found[f"the backbone under tokenizer {name}"] = digest_of_weights(load_backbone(config, own, device, once))
        del model
    if processes.number > 1:
        processes.check_same(found)
    warm_up = warm_up_threads(config, corpus, once)
    for line in (*remarks(device), *changes(config, folder, digest, warm_up)):
        once.say(line)
    if processes.rank == 0:
        folder.write_environment(device, digest, warm_up)
    machine = Machine.of(device, processes.number)
    shares = plan_for(config, corpus, study, backbone, machine)
    config = with_pass_tokens(config, study, shares, backbone, machine)

    def load(own: Corpus) -> XLMRForTokenClassification:
        return load_backbone(config, own, device, once)

    outcome = train_study(config, corpus, study, load, folder, progress, processes, shares)
    with processes.first():
        if processes.rank == 0:
            folder.save_table("scores.csv", score_table(study, outcome))
            if config.slot_counts:
                folder.save_table("slots.csv", score_table(study, outcome, slot_names(corpus.labels)))
            folder.save_scores(results(config, corpus, study, backbone, parameters, outcome))
            folder.remove_other_checkpoints()


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns its exit status: 0, 1 if another process of the job ended, 2 for a user's mistake (one line on stderr), 3 if a learner
    diverged (the rest is reported), 128 + the signal that stopped it. An experiment's own learner counts as well as those of
    score matrices.
    """
    console, processes = Console(), ALONE
    try:
        with on_signals(_interrupt), started() as processes, contextlib.ExitStack() as stack:
            with processes.first():
                config = with_selection(parse(sys.argv[1:] if arguments is None else arguments).checked())
                stack.enter_context(on_threads(config.threads))
                if config.dry_run and processes.rank == 0:
                    _print_plan(config, console, processes.number)
            keep_memory()
            if config.tensorboard:
                writer()
            if not config.dry_run:
                with console.progress(processes.rank) as progress:
                    folder, scores = run(config, progress, processes)
                return _print_scores(scores, folder, console if processes.rank == 0 else None)
    except UserError as error:
        console.error(shown(error, 2000), processes.rank)
        return 2
    except ProcessLost:
        if processes.rank == 0:
            console.error("another process has ended; the same command continues, on any number of processes")
        return 1
    except KeyboardInterrupt as interrupt:
        if processes.rank == 0:
            console.error("stopped; the same command continues from the last checkpoint")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    return 0


def _print_plan(config: Config, console: Console, number: int) -> None:
    """Print the plan. number: of processes."""
    with console.progress() as progress:
        machine = Machine.named(config.plan_for) if config.plan_for else Machine.of(device_of(config.device), number)
        lines = describe(config, *prepare(config, progress), machine)
    console.plan(lines)


def _print_scores(scores: dict, folder: Path, console: Console | None) -> int:
    """Print a run's summary, unless another process does, and return the exit status."""
    rows, besides = summary_rows(scores), scores.get("diverged_besides", [])
    if console is not None:
        advice = chosen_on_dev(scores, rows)
        console.summary(warnings(rows, besides), rows, comparisons(scores), advice, folder / "report.html")
    return DIVERGED if besides or any(row["diverged"] for row in rows) else 0


if __name__ == "__main__":
    with leaving_pipes():
        sys.exit(main())
