"""A whole study: utterances in, score matrices and a report out.

Every LoRA learner of the study (an adapter per language, one adapter for all, several ranks, orders, seeds) advances in the
same packed pass over one frozen XLM-R. A run folder that was left unfinished is taken up where it stopped.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from .cl.backbone import load_backbone, tiny_config
from .cl.corpus import Corpus, load_corpus
from .cl.languages import LOCALES, check_locales
from .cl.results import results
from .cl.rundir import open_run
from .cl.runner import cohorts_of, train_study
from .cl.strategies import STRATEGIES
from .cl.stream import Stream
from .cl.study import Study, plan
from .cl.summary import summary_rows
from .config import Config
from .errors import UserError
from .files import write_json
from .models import AdapterBank
from .presets import PRESETS
from .report import write_report

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CALLS = 1200  # small additions that take what the host takes for a layer in a round: 4 ms where one takes 3.4 µs
NOT_RESULTS = ("out", "cache", "checkpoint_seconds", "device", "preset", "dry_run")  # settings that change no figure


def parse(arguments: Sequence[str]) -> Config:
    """The configuration of a command line: a preset's, with what the other flags override. Exits with 2 where it is malformed."""
    import tyro

    chosen = "demo"
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            chosen = arguments[i + 1]
        elif argument.startswith("--preset="):
            chosen = argument.split("=", 1)[1]
    if chosen not in PRESETS:
        raise UserError(f"unknown preset {chosen}; allowed: {', '.join(PRESETS)}")
    return tyro.cli(Config, args=list(arguments), default=PRESETS[chosen](), prog="python -m kloss.run", description=__doc__)


def prepare(config: Config, progress) -> tuple[Corpus, Study]:
    """The tokenised corpus and the plan. Raises UserError for anything that does not fit together."""
    config.checked()
    locales, options, tokenizer = check_locales(config.languages) or None, None, config.tokenizer
    if config.data == "synthetic":
        locales = locales or LOCALES
        sizes = {"train": config.limit or 200, "test": config.eval_limit or 60}
        options = sizes | {"overlap": config.overlap, "relatedness": config.relatedness}
    if tokenizer is None and config.backbone != "tiny":
        tokenizer = config.backbone
    corpus = load_corpus(
        config.data,
        tokenizer=tokenizer,
        locales=locales,
        limit=config.limit,
        eval_limit=config.eval_limit,
        max_length=config.max_length,
        cache=config.cache or None,
        seed=config.seed,
        report=progress,
        synthetic=options,
    )
    return corpus, plan(config, corpus.locales)


def device_of(name: str) -> torch.device:
    """The device that auto, cpu or cuda stands for; a GPU with its number. Raises UserError for cuda where there is no GPU."""
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu, or auto")
    return torch.device("cuda", torch.cuda.current_device())


def run(config: Config, progress) -> tuple[Path, dict]:
    """Runs a study, or continues one. Returns the run folder and the contents of scores.json."""
    device = device_of(config.checked().device)
    corpus, study = prepare(config, progress)
    for locale, count in corpus.truncated.items():
        if count:
            progress.say(f"{locale}: {count} utterances are longer than {corpus.max_length} subwords and were cut")
    identity = {name: value for name, value in asdict(config).items() if name not in NOT_RESULTS}
    with open_run(config.out or f"runs/{config.preset}", identity | {"corpus": corpus.fingerprint}) as folder:
        if not folder.done:
            load = partial(
                load_backbone,
                config.backbone,
                corpus,
                layers=config.tiny_layers,
                hidden=config.tiny_hidden,
                steps=config.pretrain_steps,
                batch=config.pretrain_batch,
                seed=config.seed,
                cache=config.cache or None,
                dtype=DTYPES[config.dtype],
                device=device,
                report=progress,
            )
            model = load()
            backbone, parameters = model.config, sum(p.numel() for p in model.parameters())
            del model
            folder.write_environment(device)
            outcome = train_study(config, corpus, study, load, folder, progress)
            write_json(folder.path / "scores.json", results(config, corpus, study, backbone, parameters, outcome))
        else:
            progress.say(f"{folder.path} is complete already; its report is made anew")
        write_report(folder.path)
        return folder.path, folder.scores()


def describe(config: Config, corpus: Corpus, study: Study) -> list[tuple[str, str]]:
    """The plan of a run, line by line, with memory and time as estimates."""
    utterances = sum(len(corpus.sentences(locale, "train").offsets) - 1 for locale in corpus.locales)
    tokens = [Stream.of(corpus, learner).tokens() for learner in study.learners]
    scored = sum(
        len(corpus.sentences(locale, "test").input_ids) for table in study.wanted for row in table.values() for locale in row
    )
    lines = [
        (
            "corpus",
            f"{corpus.name}: {len(corpus.locales)} languages, {utterances} training utterances, {len(corpus.labels)} labels",
        ),
        ("strategies", ", ".join(f"{STRATEGIES[name].name}" for name in config.strategies)),
        ("trials", f"{len(study.trials)} score matrices from {len(study.learners)} learners, each trained once"),
    ]
    backbone = tiny_config(corpus, config.tiny_layers, config.tiny_hidden) if config.backbone == "tiny" else None
    rounds = 0
    for number, members in enumerate(cohorts_of(study, config.together), 1):
        learners = [study.learners[g] for g in members]
        steps = max(Stream.of(corpus, learner).steps() for learner in learners)
        rounds += steps
        memory = ""
        if backbone is not None and learners[0].rank is not None:
            row = AdapterBank.width_of(backbone, max(learner.rank for learner in learners))
            memory = f", {len(members) * row * 16 / 2**20:.0f} MiB of weights, gradients and moments"
        lines.append(
            (
                f"cohort {number}",
                f"{len(members)} learners, {steps} rounds, {sum(tokens[g] for g in members)} tokens{memory}",
            )
        )
    lines.append(("scoring", f"{scored} tokens"))
    if backbone is not None:
        seconds = _estimated_seconds(backbone, rounds, sum(tokens), scored)
        lines.append(("time", f"about {seconds / 60:.1f} minutes on this machine after the backbone's warm-up (an estimate)"))
    return lines


def _estimated_seconds(backbone, rounds: int, trained: int, scored: int) -> float:
    """From the products' FLOPs at the speed of one such product here, twice over for all that grows with tokens and is no
    product, and from what the host does in a round however few its tokens are."""
    width, inner = backbone.hidden_size, backbone.intermediate_size
    x, weight, small = torch.randn(4096, width), torch.randn(inner, width), torch.randn(1, width)
    started = time.perf_counter()
    for _ in range(10):
        x @ weight.t()
    multiplied = time.perf_counter()
    for _ in range(CALLS):
        small + small
    called = time.perf_counter() - multiplied
    speed = 10 * 2 * x.numel() * inner / (multiplied - started)
    weights = backbone.num_hidden_layers * (4 * width * width + 2 * width * inner)
    return 2 * (trained * 4 + scored * 2) * weights / speed + rounds * backbone.num_hidden_layers * called


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 with one line on the error stream for a user's mistake."""
    from .console import Console

    console = Console()
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        with console.progress() as progress:
            if config.dry_run:
                lines = describe(config, *prepare(config, progress))
                path = None
            else:
                path, scores = run(config, progress)
        if path is None:
            console.plan(lines)
        else:
            console.results(summary_rows(scores), path / "report.html")
    except UserError as error:
        console.error(str(error))
        return 2
    except KeyboardInterrupt:
        console.error("stopped; the same command continues from the last checkpoint")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
