"""The paper's findings beside a run's: planted, turned round, not there, not tested."""

import numpy as np
import pytest
from test_report import FIVE, fake_run, fake_scores, report, text_of

from kloss.cl.languages import LANGUAGES, LOCALES
from kloss.cl.summary import by_label, summary_rows
from kloss.report import paper

ISOLATION, FALL, MULTI, SCRIPTS, DESTROYERS, TRANSFER, RANKS = range(7)
TWENTY = tuple(dict.fromkeys(("zh-CN", "ja-JP", *LOCALES[::3])))


def verdicts(runs, **more):
    scores = {"runs": runs, **more}
    lines = paper.findings(scores, by_label(runs), summary_rows(scores))
    return [here for _, here, _ in lines], [verdict for *_, verdict in lines]


def ending(strategy, f1, seeds=3, learned=None, order=FIVE, rank=8):
    """Runs whose languages all end at f1 and a little more with each seed. learned: F1 when learned."""
    runs = []
    for seed in range(seeds):
        end = f1 + 0.01 * seed
        R = np.tril(np.full((len(order) + 1, len(order)), end if learned is None else learned), -1)
        R[-1] = end
        if strategy == "multi" or strategy == "lora-multi":
            R = np.stack([np.zeros(len(order)), np.full(len(order), end)])
        runs.append(fake_run(strategy, order, seed=seed, label=f"{strategy} r={rank}", R=R) | {"rank": rank})
    return runs


@pytest.mark.parametrize(
    ("non_shared", "shared", "verdict"),
    [(0.7, 0.5, "replicated"), (0.4, 0.5, "turned round"), (None, 0.5, "not tested: takes --strategies non-shared shared")],
)
def test_isolation(non_shared, shared, verdict):
    rng = np.random.default_rng(0)
    runs = ending("shared", shared)
    for run in runs:
        run["R"][-1] = [f1 + 0.004 * rng.normal() for f1 in run["R"][-1]]
    here, lines = verdicts(runs + (ending("non-shared", non_shared) if non_shared else []))
    assert lines[ISOLATION].startswith(verdict)
    if non_shared:
        points = float(here[ISOLATION].text.replace("−", "-").removesuffix(" points"))
        assert points == pytest.approx(100 * (non_shared - shared), abs=0.5)
    one = ending("non-shared", 0.7, seeds=1) + ending("shared", 0.5, seeds=1)
    assert verdicts(one)[1][ISOLATION] == "open: no interval" and verdicts(one)[0][ISOLATION].interval == "no interval"
    floor = ending("non-shared", 0.7) + ending("shared", 0.0)
    assert verdicts(floor)[1][ISOLATION].startswith("not tested"), "what learned nothing lost nothing"


@pytest.mark.parametrize(
    ("learned", "verdict"), [(0.8, "replicated"), (0.6, "in part: it falls by less"), (0.35, "turned round")]
)
def test_the_fall(learned, verdict):
    here, lines = verdicts(ending("shared", 0.5, learned=learned))
    assert lines[FALL] == verdict and here[FALL].text == f"{'−' if learned > 0.5 else '+'}{abs(51 - 100 * learned):.1f} points"
    assert verdicts(ending("non-shared", 0.5))[1][FALL].startswith("not tested")


def test_the_joint_one():
    others = ending("non-shared", 0.6) + ending("shared", 0.5)
    for run in others[:3]:
        run["R"][-1][0] += 0.02 * run["seed"]
    assert verdicts(others + ending("multi", 0.7))[1][MULTI] == "replicated"
    assert verdicts(others + ending("lora-multi", 0.7))[1][MULTI] == "in part: lora-multi r=8"
    here, lines = verdicts(others + ending("multi", 0.55))
    assert lines[MULTI] == "turned round" and here[MULTI].interval.startswith("multi r=8 minus non-shared r=8: −")
    assert verdicts(others)[1][MULTI].startswith("not tested") and verdicts(ending("multi", 0.7))[1][MULTI].startswith(
        "not tested"
    )


def kept_by(share, orders=1):
    """SHARED over 20 languages. share: locale -> what it keeps."""
    runs = []
    for number in range(orders):
        order = [TWENTY[i] for i in np.random.default_rng(number).permutation(len(TWENTY))]
        R = np.tril(np.full((len(order) + 1, len(order)), 0.6), -1)
        R[-1, :-1] = [0.6 * share(m) for m in order[:-1]]
        runs.append(fake_run("shared", order, order_name=f"Order {number + 1}", R=R))
    return runs


def test_scripts():
    noise = dict(zip(LOCALES, 0.02 * np.random.default_rng(0).normal(size=len(LOCALES)), strict=True))
    latin = {m for m in LOCALES if LANGUAGES[m].script == "Latin"}
    planted = {
        "replicated": lambda m: (0.8 if m in latin else 0.4) + noise[m],
        "turned round": lambda m: (0.4 if m in latin else 0.8) + noise[m],
        "open: no evidence of a difference": lambda m: 0.6 + noise[m],
    }
    for verdict, share in planted.items():
        here, lines = verdicts(kept_by(share))
        assert lines[SCRIPTS] == verdict and here[SCRIPTS].interval.startswith("not Latin against Latin, p 0.")
    assert verdicts(ending("shared", 0.5, order=FIVE[:2]))[1][SCRIPTS].startswith("not tested")


def test_destroyers():
    def runs(by, orders=8):
        made = []
        for number in range(orders):
            order = [TWENTY[i] for i in np.random.default_rng(number).permutation(len(TWENTY))]
            draw, R = np.random.default_rng([number, 1]), np.zeros((len(order) + 1, len(order)))
            for i, m in enumerate(order, 1):
                R[i] = R[i - 1] - np.where(np.arange(len(order)) < i - 1, by.get(m, 0.01) + 0.002 * draw.normal(), 0)
                R[i, i - 1] = 0.9
            made.append(fake_run("shared", order, order_name=f"Order {number + 1}", R=R.clip(0, 1)))
        return made

    here, lines = verdicts(runs({"zh-CN": 0.06, "ja-JP": 0.06}))
    assert lines[DESTROYERS] == "replicated" and here[DESTROYERS].text.startswith("zh-CN −")
    assert verdicts(runs({"zh-CN": 0.06}))[1][DESTROYERS] == "in part"
    assert verdicts(runs({"fr-FR": 0.0}))[1][DESTROYERS] != "replicated"
    assert verdicts(runs({"zh-CN": 0.06, "ja-JP": 0.06}, orders=4))[1][DESTROYERS].startswith(
        "not tested: takes --strategies shared --orders 5"
    )


def test_ranks_and_transfer():
    def pair(apart):
        runs = ending("shared", 0.5, rank=32) + ending("shared", 0.5 + apart, rank=256)
        for run in runs[3:]:
            run["R"][-1][0] += 0.002 * run["seed"]
        return verdicts(runs)[1][RANKS]

    assert (pair(0.002), pair(0.05), pair(-0.05)) == ("replicated", "not so", "not so")
    here, lines = verdicts(ending("shared", 0.5), experiments={"pairs": [{"locales": ["de-DE", "ja-JP"]}]})
    assert lines[RANKS] == "not tested: takes --rank 32 256" and here[RANKS] == "–"
    assert (here[TRANSFER], lines[TRANSFER]) == ("see “Who gives to whom?”", "described, not tested")


def test_the_page_has_every_finding(tmp_path):
    text = text_of(report(tmp_path, fake_scores(FIVE, ("non-shared", "shared", "multi"))))
    found = text.split("What it found, and what this run finds")[1].split("Along the sequence")[0]
    assert found.count("not tested") == 3 and "On a synthetic corpus" not in found  # destroyers, transfer, ranks
    empty = fake_scores(FIVE, runs=[])
    assert report(tmp_path / "empty", empty).count("not tested: takes") == 7
