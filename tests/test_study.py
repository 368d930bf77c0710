"""Strategies as streams and cells: who learns what, and whose score stands where in R."""

import json
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from kloss.cl.languages import LOCALES as ALL_LOCALES
from kloss.cl.learner import Learner
from kloss.cl.strategies import STRATEGIES
from kloss.cl.study import make_orders, plan
from kloss.config import Config, StrategyName
from kloss.errors import UserError
from kloss.presets import PRESETS, first_five, paper

LOCALES = ("en-US", "de-DE", "ru-RU", "ja-JP")


def cells(name, order=LOCALES, groups=None):
    layout = STRATEGIES[name].layout(order, groups)
    return layout, [[layout.cell(i, j) for j in range(len(order))] for i in range(layout.rows)]


def test_non_shared_cells():
    layout, rows = cells("non-shared")
    assert layout.streams == [[[locale]] for locale in LOCALES]
    assert rows[0] == [(0, 0)] * 4  # nothing trained
    assert rows[2] == [(0, 1), (1, 1), (1, 1), (1, 1)]  # own adapter, else the one trained last
    assert rows[4] == [(0, 1), (1, 1), (2, 1), (3, 1)]


def test_shared_cells():
    layout, rows = cells("shared")
    assert layout.streams == [[[locale] for locale in LOCALES]]
    assert rows == [[(0, i)] * 4 for i in range(5)]


def test_partially_shared_cells():
    groups = {"en-US": "Latin", "de-DE": "Latin", "ru-RU": "Cyrillic", "ja-JP": "Japanese"}
    order = ("en-US", "ru-RU", "de-DE", "ja-JP")
    layout, rows = cells("partial", order, groups)
    assert layout.streams == [[["en-US"], ["de-DE"]], [["ru-RU"]], [["ja-JP"]]]
    assert rows[1] == [(0, 1), (0, 1), (0, 1), (0, 1)]
    assert rows[2] == [(0, 1), (1, 1), (0, 1), (1, 1)]  # de-DE has its group's before its own turn, ja-JP the last trained
    assert rows[3] == [(0, 2), (1, 1), (0, 2), (0, 2)]
    assert rows[4] == [(0, 2), (1, 1), (0, 2), (2, 1)]


def test_joint_cells():
    for name in ("lora-multi", "multi"):
        layout, rows = cells(name)
        assert layout.streams == [[list(LOCALES)]] and rows == [[(0, 0)] * 4, [(0, 1)] * 4]


def test_equal_learners_are_trained_once():
    config = Config(strategies=("non-shared", "shared", "mono", "lora-multi"), orders=3, seeds=2, rank=(4, 8))
    study = plan(config, LOCALES)
    assert len(study.trials) == 3 * 2 * (2 + 2 + 1) + 2 * 2
    # NON-SHARED and MONO have the same learners in every order, SHARED has not; joint training has no order.
    assert len(study.learners) == 4 * 2 * 2 + 3 * 2 * 2 + 4 * 2 + 2 * 2
    assert {trial.order_name for trial in study.trials if trial.strategy == "lora-multi"} == {"all at once"}
    for trial in study.trials:
        for i in range(trial.layout.rows):
            for j, locale in enumerate(trial.order):
                learner, experience = trial.layout.cell(i, j)
                assert locale in study.to_score[trial.learners[learner]][experience]


def test_learners_have_the_settings_of_the_configuration():
    shared = dict(epochs=3, batch_size=5, warmup=7, dropout=0.2, weight_decay=0.3, max_norm=2.0)
    config = Config(
        strategies=("shared", "vanilla"), order=LOCALES, seed=11, rank=(4,), alpha=6.0, lr=(0.5,), full_lr=0.25,
        lora_dropout=0.4, **shared,
    )  # fmt: skip
    lora, full = plan(config, LOCALES).learners
    shared |= dict(experiences=tuple((locale,) for locale in LOCALES), seed=11, alpha=6.0)
    assert lora == Learner(rank=4, lr=0.5, lora_dropout=0.4, **shared)
    assert full == Learner(rank=None, lr=0.25, lora_dropout=0.0, **shared)
    assert plan(replace(config, alpha=None), LOCALES).learners[0].alpha == 4.0
    assert plan(replace(config, alpha=0.0), LOCALES).learners[0].alpha == 0.0


def test_matrix_reads_the_cells_and_leaves_holes():
    study = plan(Config(strategies=("shared",)), ("en-US", "de-DE"))
    trial = study.trials[0]
    first, second = trial.order
    scores = [{0: {first: [0, 5, 4], second: [0, 0, 4]}, 1: {first: [2, 4, 4], second: [1, 2, 4]}}]
    assert trial.matrix(scores) == [[0, 0], [0.5, pytest.approx(1 / 3)], [None, None]]


def test_orders():
    config = Config(orders=2, order=("ja-JP", "en-US", "ru-RU", "de-DE"))
    orders = make_orders(config, LOCALES)
    assert orders["Order 1"] == config.order and sorted(orders["Order 2"]) == sorted(LOCALES)
    assert make_orders(Config(orders=2), LOCALES)["Order 2"] == orders["Order 2"]
    assert make_orders(Config(orders=1, seed=1), LOCALES) != make_orders(Config(orders=1), LOCALES)
    with pytest.raises(UserError, match="each of the 4 languages once"):
        make_orders(Config(order=("ja-JP", "en-US")), LOCALES)
    with pytest.raises(UserError, match="each of the 4 languages once, got 5: ja-JP ja-JP en-US"):
        make_orders(replace(config, order=("ja-JP", *config.order)), LOCALES)


def test_user_groups(tmp_path):
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"en-US": "x", "de-DE": "y", "ru-RU": "y", "ja-JP": "x"}))
    study = plan(Config(strategies=("partial",), groups=str(file)), LOCALES)
    assert len(study.learners) == 2
    with pytest.raises(UserError, match="script, family or a JSON file"):
        plan(Config(strategies=("partial",), groups="colour"), LOCALES)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"en-US": ["x"], "de-DE": "y", "ru-RU": "y", "ja-JP": "x"}', "en-US"),
        ('{"en-US": 1, "de-DE": "y", "ru-RU": "y", "ja-JP": "x"}', "en-US"),
        ('{"en-US": {}, "de-DE": "y", "ru-RU": "y", "ja-JP": "x"}', "en-US"),
        ('{"en-US": "\\ud800", "de-DE": "y", "ru-RU": "y", "ja-JP": "x"}', "en-US"),
        ('{"en-US": "x", "xx": "y"}', "unknown locale 'xx'"),
        ('["en-US"]', "an object is needed"),
        ("[" * 100_000, "JSON"),
        ('{"en-US": ' + "1" * 5000 + "}", "5000 digits"),
    ],
    ids=range(8),
)
def test_odd_groups_are_a_users_error(tmp_path, text, words):
    (tmp_path / "groups.json").write_text(text)
    with pytest.raises(UserError, match=words):
        plan(Config(strategies=("partial",), groups=str(tmp_path / "groups.json")), LOCALES)


def test_groups_with_an_impossible_file_name():
    for name in ("x" * 300, "x/" * 3000, "x\0y"):
        with pytest.raises(UserError, match="script, family or a JSON file"):
            plan(Config(strategies=("partial",), groups=name), LOCALES)


def test_paper_preset_is_the_papers_where_it_is_known():
    config = paper().checked()
    assert (config.rank, config.lr, config.epochs, config.dropout) == ((32, 64, 256), (5e-6,), 100, 0.1)
    of_the_paper = {"non-shared", "shared", "partial", "lora-multi", "vanilla", "multi", "mono"}
    assert of_the_paper == set(config.strategies) <= set(STRATEGIES)


def test_the_command_line_offers_every_strategy_and_preset():
    assert get_args(StrategyName) == tuple(STRATEGIES)
    assert get_args(get_type_hints(Config)["preset"]) == tuple(PRESETS)


def test_first_five_are_those_of_the_papers_order_1():
    config = first_five().checked()
    assert make_orders(config, config.languages)["Order 1"] == make_orders(paper(), ALL_LOCALES)["Order 1"][:5]
    study = plan(config, config.languages)
    assert len(study.learners) == config.seeds and {x.rank for x in study.learners} == {64}
    assert all([e.locales for e in x.experiences] == [(locale,) for locale in config.order] for x in study.learners)
