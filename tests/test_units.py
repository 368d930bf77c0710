"""Which runs are one value, which losses cannot be, and what two strategies' runs are paired by."""

import numpy as np
import pytest

from kloss.cl.effects import contrasts
from kloss.cl.languages import groups
from kloss.cl.statistics import crossed_interval, t_interval
from kloss.cl.strategies import STRATEGIES
from kloss.cl.summary import (
    by_language,
    change,
    comparisons,
    impact,
    lost,
    nothing_learned,
    summary_row,
    summary_rows,
    warnings,
)
from kloss.cl.units import paired, traits, unit_of, units, without_order
from kloss.config import Config
from kloss.errors import UserError

LOCALES = ("en-US", "de-DE", "ru-RU", "ja-JP")


def run_of(strategy, order=LOCALES, seed=0, R=None, name="Order 1", **more):
    rows = 2 if STRATEGIES[strategy].joint else len(order) + 1
    R = np.zeros((rows, len(order))) if R is None else np.array(R, dtype=object)
    run = {
        "strategy": strategy,
        "label": strategy,
        "lr": 1e-3,
        "order": list(order),
        "order_name": name,
        "seed": seed,
        "groups": None,
    }
    if strategy == "partial":
        run["groups"] = groups(order, "script")
    return run | {"R": R.tolist(), "diverged": None, "trainable_parameters": 1, "steps": 1} | more


def learned(order, value):
    """R of learners that never forget: `value` of each language from its own step on."""
    return [[value[m] if i > j else 0.0 for j, m in enumerate(order)] for i in range(len(order) + 1)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_could_be_lost_is_read_from_the_layout(strategy):
    own = traits(run_of(strategy))
    can_change = {
        "shared": [True, True, True, False],
        "vanilla": [True, True, True, False],
        "partial": [True, False, False, False],  # en-US and de-DE are the one script with two languages
    }.get(strategy, [False] * 4)
    assert own.can_change.tolist() == can_change
    can_destroy = {
        "shared": [False, True, True, True],
        "vanilla": [False, True, True, True],
        "partial": [False, True, False, False],
    }
    assert own.can_destroy.tolist() == can_destroy.get(strategy, [False] * 4)
    T = len(LOCALES)
    for i in range(len(own.own)):
        for j in range(T):
            assert own.own[i, j] == (strategy in ("shared", "vanilla") or STRATEGIES[strategy].joint or own_cell(strategy, i, j))


def own_cell(strategy, i, j):
    """Whether R[i, j] is the learner that the language ends with, for adapters of one language or one script."""
    if i == 0:  # all untrained cells are of learner 0
        return j == 0 or strategy == "partial" and j == 1
    return i > j or strategy == "partial" and j == 1


def test_orders_that_change_nothing_are_one_value():
    """Twelve orders of one seed's NON-SHARED learners were reported as 12 runs, with an interval of no width."""
    rng = np.random.default_rng(0)
    f1 = dict(zip(LOCALES, (0.6, 0.5, 0.4, 0.3), strict=True))
    orders = [tuple(rng.permutation(LOCALES).tolist()) for _ in range(12)]
    runs = [run_of("non-shared", order, R=learned(order, f1), name=f"Order {n}") for n, order in enumerate(orders, 1)]
    row = summary_row("NON-SHARED", runs)
    assert (row["runs"], row["units"]) == (12, 1) and row["f1"] == pytest.approx(0.45)
    assert row["f1_low"] is row["f1_high"] is row["f1_df"] is None
    other = dict(zip(LOCALES, (0.8, 0.7, 0.6, 0.5), strict=True))
    runs += [run_of("non-shared", order, 1, R=learned(order, other), name=f"Order {n}") for n, order in enumerate(orders, 1)]
    row = summary_row("NON-SHARED", runs)
    assert (row["runs"], row["units"], row["f1_df"]) == (24, 2, 1) and row["f1"] == pytest.approx(0.55)
    assert (row["f1_low"], row["f1_high"]) == pytest.approx(t_interval([0.45, 0.65])[:2])
    shared = [run | {"strategy": "shared"} for run in runs]
    assert summary_row("SHARED", shared)["units"] == 2 * len(set(orders)) == 24 - 2 * (12 - len(set(orders)))


def test_no_loss_by_construction_has_no_interval():
    f1 = dict(zip(LOCALES, (0.6, 0.5, 0.4, 0.3), strict=True))
    runs = [run_of("non-shared", seed=seed, R=learned(LOCALES, f1)) for seed in range(6)]
    for run in runs:
        run["R"][1][3] = 0.1 + 0.01 * run["seed"]  # the first adapter on the last language
    row = summary_row("NON-SHARED", runs)
    assert row["can_forget"] == 0
    for name, value in (("cbt", 0), ("kept", None), ("forgetting", 0)):
        assert row[name] == value and row[f"{name}_low"] is row[f"{name}_high"] is None
    assert row["cft_low"] is not None  # a measurement
    row = summary_row("SHARED", [run | {"strategy": "shared"} for run in runs])
    assert row["can_forget"] == 3 and row["cbt"] == 0 and row["cbt_low"] is None  # six equal values do not tell how they vary
    runs[0]["R"][-1][0] = 0.5
    row = summary_row("SHARED", [run | {"strategy": "shared"} for run in runs])
    assert row["cbt_low"] < row["cbt"] < 0
    assert summary_row("partial", [run_of("partial")])["can_forget"] == 1
    assert summary_row("MULTI", [run_of("multi")])["can_forget"] is None


def test_a_language_alone_in_its_group_is_in_no_average_of_loss():
    """Partially shared by script, ja-JP and ru-RU kept all: a contrast of scripts found a difference, made by the grouping."""
    R = learned(LOCALES, dict.fromkeys(LOCALES, 0.6))
    R[-1][0] = 0.3
    run = run_of("partial", R=R)
    assert by_language([run], lost(change)) == {"en-US": [pytest.approx(-0.3)]} | {
        m: [pytest.approx(np.nan, nan_ok=True)] for m in LOCALES[1:]
    }
    assert np.isnan([values[0] for m, values in by_language([run], impact).items() if m != "de-DE"]).all()
    row = summary_row("partial", [run])
    assert row["kept"] == pytest.approx(0.5) and row["cbt"] == pytest.approx(-0.1)
    assert [
        contrast.p_value == contrast.p_value
        for contrast in contrasts({m: v[0] for m, v in by_language([run], lost(change)).items()})
    ] == [False] * 4


def test_the_same_order_drawn_twice_is_one_order():
    runs = [run_of("shared", LOCALES[:2], name=name, R=learned(LOCALES[:2], dict.fromkeys(LOCALES, 0.5))) for name in "ab"]
    assert summary_row("SHARED", runs)["units"] == 1


def test_strategies_are_paired_by_seed_and_order():
    rng = np.random.default_rng(0)
    orders = {"Order 1": LOCALES, "Order 2": LOCALES[::-1]}
    runs = {"non-shared": [], "shared": []}
    for seed in range(3):
        base = rng.normal(0.5, 0.1)  # what a seed's draw gives to both
        for name, order in orders.items():
            runs["non-shared"].append(run_of("non-shared", order, seed, learned(order, dict.fromkeys(order, base)), name))
            lost = dict.fromkeys(order, base - 0.2 - 0.01 * (name == "Order 2"))
            runs["shared"].append(run_of("shared", order, seed, learned(order, lost), name))
    scores = {"runs": [*runs["non-shared"], *runs["shared"]]}
    (row,) = comparisons(scores)
    assert (row["label"], row["other"], row["units"]) == ("non-shared", "shared", 6)
    assert row["difference"] == pytest.approx(0.205)
    assert row["difference_high"] - row["difference_low"] < 0.2  # unpaired, seeds would spread by 0.1
    ends = [run["R"][-1][0] for run in runs["non-shared"]], [run["R"][-1][0] for run in runs["shared"]]
    table = paired(*runs.values(), *ends)
    assert len(table) == 6 and crossed_interval(table).low == row["difference_low"]
    multi = [run_of("multi", seed=seed, R=[[0.0] * 4, [0.7] * 4], name="all at once") for seed in range(2)]
    assert len(paired(multi, runs["shared"], [0.7, 0.7], ends[1])) == 4  # two seeds, each with both orders
    shared = [run for run in runs["shared"] if run["order_name"] == "Order 2"]
    partial = [run_of("partial", order, 0, name=name) for name, order in orders.items()]
    assert len(paired(partial, shared, [0.1, 0.2], [0.5] * 3)) == 1  # one order is left: it pairs with its own
    assert len(paired(partial, runs["shared"], [0.1, 0.2], ends[1])) == 2  # each with its own


def test_runs_of_different_orders_are_not_paired_where_others_diverged():
    """r=32 was 0.1 better in each order. With two of its three orders diverged its Order 1 was paired with all of r=8: +0.3."""
    orders = LOCALES, LOCALES[::-1], (LOCALES[1], LOCALES[0], *LOCALES[2:])
    for diverged in ([], [2], [1, 2]):
        runs = []
        for n, order in enumerate(orders):
            for rank, f1 in ((8, 0.5 - 0.2 * n), (32, 0.6 - 0.2 * n)):
                reason = "loss nan" if rank == 32 and n in diverged else None
                R, label = learned(order, dict.fromkeys(order, f1)), f"SHARED LoRA r={rank}"
                runs.append(run_of("shared", order, R=R, name=f"Order {n + 1}", label=label, diverged=reason))
        (row,) = comparisons({"runs": runs})
        sign = 1 if row["label"] == "SHARED LoRA r=32" else -1
        assert row["units"] == 3 - len(diverged) and sign * row["difference"] == pytest.approx(0.1)


def test_only_strategies_whose_ends_have_no_order_pair_with_every_order():
    free = {strategy for strategy in STRATEGIES if without_order(run_of(strategy))}
    assert free == {"non-shared", "mono", "multi", "lora-multi"}
    alone = dict(zip(LOCALES, LOCALES, strict=True))
    assert without_order(run_of("partial") | {"groups": alone}), "each language a group of its own"
    assert not without_order(run_of("non-shared") | {"strategy": "of a later version"})


def test_what_was_not_measured_is_no_unit():
    runs = [run_of("shared", seed=seed) for seed in range(3)]
    assert list(units(runs, [0.5, None, float("nan")])) == [unit_of(runs[0])]
    unknown = run_of("shared") | {"strategy": "of a later version"}
    assert traits(run_of("multi") | {"R": run_of("shared")["R"]}).own.all()
    assert traits(unknown).can_change.all() and traits(unknown).end != traits(unknown | {"order": list(LOCALES[::-1])}).end


def test_a_setting_named_twice_is_refused():
    for given, words in (
        ({"rank": (4, 8, 4)}, "--rank names 4 twice"),
        ({"lr": (1e-3, 0.001)}, "--lr names 0.001 twice"),
        ({"strategies": ("shared", "shared")}, "--strategies names shared twice"),
    ):
        with pytest.raises(UserError, match=words):
            Config(**given).checked()


def test_nothing_learned_is_said_first():
    low = dict.fromkeys(LOCALES, 0.04)
    scores = {"runs": [run_of("shared", R=learned(LOCALES, low)), run_of("multi", R=[[0.3] * 4, [0.01] * 4])]}
    assert nothing_learned(summary_rows(scores)) and warnings(summary_rows(scores))[0].startswith(
        "Nothing was learned: no learner reached 0.05 F1"
    )
    assert "(the best: 0.040)" in warnings(summary_rows(scores))[0]
    scores["runs"].append(run_of("non-shared", R=learned(LOCALES, low | {"ja-JP": 0.06})))
    assert not nothing_learned(summary_rows(scores))
    nothing, no_more, but_one = warnings(summary_rows(scores))
    assert nothing.startswith("shared learned nothing: it") and no_more.startswith("multi learned nothing: it")
    assert but_one.startswith("non-shared did not learn 3 of 4 languages") and "ja-JP" not in but_one
    scores["runs"][0]["diverged"] = "loss nan"
    assert warnings(summary_rows(scores))[-1] == "shared: 1 of 1 runs diverged and are in no average."
    one = {
        "runs": [
            run_of("shared", R=learned(LOCALES, dict.fromkeys(LOCALES, 0.5) | {"ja-JP": f1}), name=str(f1)) for f1 in (0.01, 0.08)
        ]
    }
    assert summary_rows(one)[0]["unlearned"] == ["ja-JP"] and "did not learn 1 of 4 languages" in warnings(summary_rows(one))[0]
    good = {"runs": [run_of("shared", R=learned(LOCALES, dict.fromkeys(LOCALES, 0.05)))]}
    assert warnings(summary_rows(good)) == [] and not nothing_learned(summary_rows({"runs": []}))
