"""A whole study: utterances in, score matrices and a report out.

All LoRA learners of a study train in the same packed passes over one frozen XLM-R: one per language, one for all languages,
several ranks, orders and seeds. The same command continues a run that was stopped.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields, make_dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro

from .cl.backbone import load_backbone, tiny_config, warm_up_threads
from .cl.corpus import Corpus, load_corpus
from .cl.experiments import idle, with_experiments
from .cl.languages import LOCALES, check_locales
from .cl.learner import BALANCED
from .cl.results import results, score_table
from .cl.rundir import open_run
from .cl.runner import Progress, cohorts_of, on_signals, train_study
from .cl.shapes import check_scores
from .cl.strategies import STRATEGIES
from .cl.study import Study, plan
from .cl.summary import best_on_dev, chosen_on_dev, comparisons, summary_rows, warnings
from .config import Config
from .console import Console
from .errors import UserError
from .estimate import describe, with_pass_tokens
from .files import read_json, shown
from .machine import keep_memory, on_threads, remarks
from .models import AdapterBank
from .presets import PRESETS
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
    locales, synthetic = check_locales(config.languages) or None, None
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
    empty = [locale for locale in corpus.locales if not corpus.sentences(locale, config.eval_split).number]
    if empty:
        raise UserError(f"--eval-split {config.eval_split}: {config.data} has no such utterances of {', '.join(empty[:5])}")
    study = plan(config, corpus.locales)
    for line in idle(config, study) if config.experiments != PRESETS[config.preset]().experiments else ():
        progress.say(line)
    study = with_experiments(config, study)
    if any(learner.tokenizer == BALANCED for learner in study.learners):
        corpus = replace(corpus, others={BALANCED: load(balanced=True)})
    return corpus, study


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
        ("no experiment is parts", "parts" not in config.experiments, "shared_parts"),
        ("the data is not synthetic", config.data != "synthetic", "overlap relatedness"),
        ("the backbone is not tiny", config.backbone != "tiny", "tiny_layers tiny_hidden pretrain_steps pretrain_batch"),
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
    return torch.device("cuda", torch.cuda.current_device())


def gpu_memory(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def check_memory(config: Config, corpus: Corpus, study: Study, device: torch.device) -> None:
    """Raise UserError if the tiny backbone, or its largest cohort of adapters, takes more memory than the device has."""
    if config.backbone != "tiny":
        return  # its sizes are not known yet
    sizes = tiny_config(config, corpus)
    width, tokens = sizes.hidden_size, sizes.vocab_size + sizes.max_position_embeddings
    needed = {f"the tiny backbone of width {width:,}": width * (tokens + 12 * sizes.num_hidden_layers * width)}
    for members in cohorts_of(study, config.max_learners):
        ranks = [learner.rank for learner in (study.learners[g] for g in members) if learner.rank is not None]
        if ranks:
            name = f"a cohort of {len(ranks):,} adapters of rank {max(ranks):,} (see --max-learners)"
            needed[name] = len(ranks) * AdapterBank.width_of(sizes, max(ranks))
    there = gpu_memory(device) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name, values in needed.items():
        if 16 * values > there:  # weight, gradient, two moments
            raise UserError(f"{name} needs {values / 2**26:,.1f} GiB for training; {device} has {there / 2**30:,.1f}")


def run(config: Config, progress: Progress) -> tuple[Path, dict]:
    """Run a study, or continue one. Returns the run folder and the contents of scores.json."""
    config = config.checked()
    device = device_of(config.device)
    corpus, study = prepare(config, progress)
    check_memory(config, corpus, study, device)
    for locale, count in corpus.truncated.items():
        if count:
            progress.say(f"{locale}: {count} utterances are longer than {corpus.max_length} subwords and were cut")
    if config.select:
        progress.say(f"chosen on dev in {config.select}: rank {config.rank[0]}, learning rate {config.lr[0]:g}")
    identity = config.identity() | {"corpus": corpus.fingerprint}
    identity |= {f"corpus, {name}": own.fingerprint for name, own in corpus.others.items()}
    with open_run(config.out or f"runs/{config.preset}", identity) as folder:
        if folder.done:
            progress.say(f"{folder.path} is complete already; its report is made anew")
        else:
            for line in remarks(device):
                progress.say(line)
            model = load_backbone(config, corpus, device, progress)
            backbone, parameters = model.config, model.num_parameters
            del model
            threads = _threads_before(folder.path / "env.json")
            if threads not in (None, torch.get_num_threads()):
                progress.say(
                    f"the run stopped on {threads} threads and goes on with {torch.get_num_threads()}: "
                    "scores may differ from those of a run that was not stopped"
                )
            warm_up = warm_up_threads(config, corpus, progress)
            if not config.exact and warm_up not in (None, torch.get_num_threads()):
                progress.say(
                    f"the tiny backbone in the cache was warmed up on {warm_up} thread{'s' * (warm_up != 1)}, this run has "
                    f"{torch.get_num_threads()}: warmed up on as many it would have other weights, and the run other scores"
                )
            folder.write_environment(device, warm_up)
            config = with_pass_tokens(config, study, backbone, gpu_memory(device))
            outcome = train_study(
                config, corpus, study, lambda own: load_backbone(config, own, device, progress), folder, progress
            )
            folder.save_table(score_table(study, outcome))
            folder.save_scores(results(config, corpus, study, backbone, parameters, outcome))
        write_report(folder.path)
        return folder.path, folder.scores()


def _threads_before(environment: Path) -> int | None:
    """Return the threads that env.json names; None without it, or if it is damaged: it is about to be written anew."""
    with contextlib.suppress(UserError):
        return read_json(environment).get("threads")
    return None


def _interrupt(number: int) -> None:
    raise KeyboardInterrupt(number)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns its exit status: 0, 2 for a user's mistake (one line on stderr), 3 if a learner diverged (the rest is reported),
    128 + the signal that stopped it.
    """
    console = Console()
    try:
        with on_signals(_interrupt), contextlib.ExitStack() as stack:
            config = with_selection(parse(sys.argv[1:] if arguments is None else arguments).checked())
            stack.enter_context(on_threads(config.threads))
            keep_memory()
            if config.dry_run:
                with console.progress() as progress:
                    memory = None if config.pass_tokens else gpu_memory(device_of(config.device))  # a plan needs no GPU
                    lines = describe(config, *prepare(config, progress), memory)
                console.plan(lines)
            else:
                with console.progress() as progress:
                    folder, scores = run(config, progress)
                rows = summary_rows(scores)
                advice = chosen_on_dev(scores, rows)
                console.summary(warnings(rows), rows, comparisons(scores), advice, folder / "report.html")
                return DIVERGED if any(row["diverged"] for row in rows) else 0
    except UserError as error:
        console.error(shown(error, 2000))
        return 2
    except KeyboardInterrupt as interrupt:
        console.error("stopped; the same command continues from the last checkpoint")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
