"""Configurations with a name."""

from collections.abc import Callable
from dataclasses import replace

from .cl.languages import LOCALES
from .cl.study import random_order
from .config import Config

DEMO_LANGUAGES = ("en-US", "de-DE", "es-ES", "ru-RU", "ar-SA", "hi-IN", "ja-JP", "th-TH", "ko-KR", "tr-TR")


def demo() -> Config:
    """Ten synthetic languages, a few minutes on two CPU cores: does a shared adapter forget what separate ones keep?"""
    return Config(languages=DEMO_LANGUAGES, limit=150, eval_limit=50, seeds=3, experiments=("where", "pairs"))


def paper() -> Config:
    """The paper's main table: XLM-R base, 52 locales, every strategy. The report lists our choices where the paper has none."""
    return Config(
        data="AmazonScience/massive",
        backbone="xlm-roberta-base",
        strategies=("non-shared", "shared", "partial", "lora-multi", "vanilla", "multi", "mono"),
        rank=(32, 64, 256),
        lr=(5e-6,),
        full_lr=5e-6,
        epochs=100,
        batch_size=32,
        orders=3,
        seeds=3,
        warmup=100,
        dtype="bf16",
        pass_tokens=0,
        checkpoint_seconds=900,
        preset="paper",
    )


def first_five() -> Config:
    """The paper's SHARED r=64 on the first five languages of Order 1, with CBT after each step."""
    five = random_order(LOCALES, seed=0, number=1)[:5]
    return replace(paper(), languages=five, order=five, strategies=("shared",), rank=(64,), orders=1, preset="first-five")


def damage() -> Config:
    """The demo's languages: what does learning one do to each other one that an adapter of all of them knows?"""
    return replace(demo(), strategies=("lora-multi",), experiments=("damage",), preset="damage")


PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "paper": paper,
    "first-five": first_five,
    "damage": damage,
}
