"""Metrics of R against plain loops over the formulas, their identities, and the two statistical tests."""

import doctest
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kloss.cl import metrics, spans, statistics
from kloss.errors import UserError

SCORES = st.floats(0, 1, width=32)


@st.composite
def matrices(draw, largest=7, smallest=1, gaps=False):
    T = draw(st.integers(smallest, largest))
    element = st.one_of(SCORES, st.just(math.nan)) if gaps else SCORES
    return draw(arrays(np.float64, (T + 1, T), elements=element))


def mean(values):
    values = [v for v in values if not math.isnan(v)]
    return sum(values) / len(values) if values else math.nan


def close(result, expected):
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


def best_before(R, i, t):
    """max over k = 1..t-1 of R[k, i], of what was measured."""
    return max((R[k, i] for k in range(1, t) if not math.isnan(R[k, i])), default=math.nan)


@settings(deadline=None)
@given(matrices(gaps=True))
def test_every_metric_is_its_formula(R):
    """r counts rows from 0 and columns from 1, as the formulas do."""
    T = R.shape[1]
    steps = range(1, T + 1)
    r = {(i, j): R[i, j - 1] for i in range(T + 1) for j in steps}
    close(metrics.f1_per_step(R), [mean(r[t, j] for j in range(1, t + 1)) for t in steps])
    close(metrics.forward_transfer(R), mean(mean(r[i, j] for j in range(i + 1, T + 1)) for i in range(1, T)))
    cbt = [mean(r[t, i] - r[i, i] for i in range(1, t)) for t in steps]
    close(metrics.backward_transfer_per_step(R), cbt)
    close(metrics.backward_transfer(R), cbt[-1])
    close(metrics.gem_forward_transfer(R), mean(r[i - 1, i] - r[0, i] for i in range(2, T + 1)))
    lost = [mean(best_before(R, i - 1, t) - r[t, i] for i in range(1, t)) for t in steps]
    close(metrics.forgetting_per_step(R), lost)
    close(metrics.forgetting(R), mean(lost))
    kept = [mean(best_before(R, i - 1, t + 1) - r[t, i] for i in range(1, t)) for t in steps]
    close(metrics.forgetting_per_step(R, include_last=True), kept)
    close(metrics.multi_hop_backward_transfer(R), [mean(r[i, j] - r[i - 1, j] for j in range(1, i)) for i in steps])
    close(metrics.multi_hop_forward_transfer(R), [mean(r[i, j] - r[i - 1, j] for j in range(i + 1, T + 1)) for i in steps])
    close(
        metrics.multi_hop_backward_transfer(R, reading="retention"),
        [mean(r[i + h, i] - r[i, i] for h in range(1, T - i + 1)) for i in steps],
    )
    close(
        metrics.multi_hop_forward_transfer(R, reading="retention"),
        [mean(r[i - h, i] - r[0, i] for h in range(1, i)) for i in steps],
    )
    close(metrics.retention_curve(R), [mean(r[i + h, i] - r[i, i] for i in range(1, T - h + 1)) for h in range(1, T)])
    close(
        metrics.retention_curve(R, "forward"),
        [mean(r[i - h, i] - r[0, i] for i in range(h + 1, T + 1)) for h in range(1, T)],
    )
    kept = [r[T, i] / r[i, i] if i < T and r[i, i] >= metrics.FLOOR else math.nan for i in steps]
    close(metrics.retained(R), kept)
    close(metrics.when_learned(R), [r[i, i] for i in steps])


@settings(deadline=None)
@given(matrices(smallest=2))
def test_impacts_add_up_to_all_that_was_forgotten(R):
    T = R.shape[1]
    total = sum(R[T, j] - R[j + 1, j] for j in range(T))
    close(metrics.forgetting_by_cause(R).sum(), total)
    close(metrics.forgetting_by_cause(R).sum(), (T - 1) * metrics.backward_transfer(R))
    close(metrics.forgetting_by_cause(R)[1:], metrics.multi_hop_backward_transfer(R)[1:] * np.arange(1, T))


def test_a_sum_with_a_missing_term_is_not_measured():
    R = np.array([[0, 0, 0], [0.8, 0, 0], [np.nan, 0.6, 0], [0.2, 0.5, 0.7]])
    assert np.isnan(metrics.forgetting_by_cause(R)).tolist() == [False, True, True]
    close(metrics.multi_hop_backward_transfer(R), [np.nan, np.nan, -0.1])


@settings(deadline=None)
@given(matrices(smallest=2))
def test_forgetting_that_includes_the_last_row_is_never_negative(R):
    assert (metrics.forgetting_per_step(R, include_last=True)[1:] >= 0).all()


def test_nothing_later_changes_what_a_perfect_memory_scores():
    R = np.tril(np.full((4, 4), 0.7))
    R = np.vstack([np.zeros(4), R])
    assert metrics.backward_transfer(R) == 0 == metrics.forgetting(R)
    close(metrics.retention_curve(R), [0, 0, 0])


def test_unknown_reading_direction_and_shape_are_named():
    R = np.zeros((3, 2))
    with pytest.raises(UserError, match="impact, retention, not 'both'"):
        metrics.multi_hop_backward_transfer(R, reading="both")
    with pytest.raises(UserError, match="impact, retention"):
        metrics.multi_hop_forward_transfer(R, reading="both")
    with pytest.raises(UserError, match="backward, forward"):
        metrics.retention_by_hop(R, "sideways")
    for function in (metrics.forward_transfer, metrics.backward_transfer, metrics.forgetting):
        with pytest.raises(UserError, match=r"\(T\+1\) x T.*\(3, 3\)"):
            function(np.zeros((3, 3)))
    with pytest.raises(UserError, match="joint"):
        metrics.summarise(np.zeros((4, 5)))


@settings(deadline=None)
@given(matrices(gaps=True))
def test_summary_is_json_with_none_for_the_undefined(R):
    summary = metrics.summarise(R)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    T = R.shape[1]
    if T > 1:
        assert [len(summary[k]) for k in ("f1_per_step", "cbt_per_step", "mbt_impact", "retention_curve")] == [
            T,
            T,
            T,
            T - 1,
        ]
        assert summary["cbt_per_step"][0] is None
    if not np.isnan(R[-1]).any():
        close(summary["f1"], R[-1].mean())
        assert summary["worst"] == R[-1].min() == R[-1, summary["worst_position"] - 1]


@pytest.mark.parametrize("R", [[[0.1, None, 0.2], [0.5, 0.25, 0.75]], [[0.1], [0.5]]], ids=["joint", "one"])
def test_summary_of_one_step_leaves_transfer_undefined(R):
    summary = metrics.summarise(R)
    assert summary["f1"] == 0.5 and summary["f1_per_step"] == [0.5]
    assert summary["worst"] == min(R[1])
    assert all(value is None for name, value in summary.items() if not name.startswith(("f1", "worst")))
    assert set(summary) == set(metrics.summarise(np.zeros((4, 3))))


def test_summary_of_a_diverged_run_is_all_none_at_its_end():
    R = [[0.1, 0.1], [0.6, 0.2], [None, None]]
    summary = metrics.summarise(R)
    assert [summary[name] for name in ("f1", "worst", "cbt", "cft")] == [None, None, None, 0.2]
    assert summary["f1_per_step"] == [0.6, None]


def test_bootstrap_interval_is_the_normal_one_where_that_holds():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high, df = statistics.bootstrap_interval(values)
    assert df is None
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.02)
    wide = statistics.bootstrap_interval(values, level=0.99)
    assert wide[0] < low and wide[1] > high
    assert statistics.bootstrap_interval(values) == (low, high, df) != statistics.bootstrap_interval(values, seed=1)


def test_bootstrap_interval_of_few_values():
    for function in (statistics.bootstrap_interval, statistics.t_interval, statistics.interval):
        for values in ([0.5], [], [math.nan, 0.5], [0.5, math.nan, 0.5], [0.0] * 9):
            assert function(values) is statistics.NO_INTERVAL
    lumpy = [0, 0, 0, 0, 0, 1]  # a third of the resamples have no standard error
    assert statistics.bootstrap_interval(lumpy) == statistics.t_interval(lumpy)
    with pytest.raises(UserError, match="between 0 and 1, not 95"):
        statistics.bootstrap_interval([1, 2], level=95)


def test_t_quantiles_are_those_of_the_tables():
    table = {
        (0.975, 1): 12.7062,
        (0.975, 2): 4.3027,
        (0.975, 4): 2.7764,
        (0.975, 30): 2.0423,
        (0.95, 3): 2.3534,
        (0.995, 9): 3.2498,
    }
    for (p, df), value in table.items():
        assert statistics.t_quantile(p, df) == pytest.approx(value, abs=6e-5)
    assert statistics.t_quantile(0.975, 1000) == pytest.approx(1.96234, abs=1e-5)


@pytest.mark.parametrize("n", [3, 5, 9])
@pytest.mark.parametrize("kind", ["normal", "beta"])  # scores near 0.3, skewed
def test_an_interval_covers_what_its_name_says(n, kind):
    """Of a percentile bootstrap as it was, 50 % at n = 2, 74 % at 3, 84 % at 5."""
    rng = np.random.default_rng(n)
    data = rng.normal(0, 1, (2000, n)) if kind == "normal" else rng.beta(3, 6, (2000, n)) - 1 / 3
    few = n < statistics.FEWEST_TO_RESAMPLE
    assert statistics.interval(data[0]) == (statistics.t_interval if few else statistics.bootstrap_interval)(data[0])
    ends = [statistics.t_interval(row) if few else statistics.bootstrap_interval(row, samples=1000) for row in data]
    covered = np.mean([low <= 0 <= high for low, high, _ in ends])
    assert abs(covered - 0.95) <= 0.02


def test_orders_and_seeds_that_cross_are_not_independent_values():
    rng, hits, naive = np.random.default_rng(0), [], []
    for _ in range(400):
        table = rng.normal(0, 1, (3, 1)) + rng.normal(0, 0.3, (1, 3)) + rng.normal(0, 0.3, (3, 3))
        low, high, df = statistics.crossed_interval({(i, j): table[i, j] for i in range(3) for j in range(3)})
        assert df == 2
        hits.append(low <= 0 <= high)
        low, high, _ = statistics.interval(table)
        naive.append(low <= 0 <= high)
    assert 0.93 <= np.mean(hits) <= 0.99 and np.mean(naive) < 0.8
    lacking = {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 4.0}  # means of a, b: 1.5, 4; of 0, 1: 2.5, 2
    halves = [np.ptp(statistics.t_interval(means)[:2]) / 2 for means in ([1.5, 4.0], [2.5, 2.0])]
    low, high, df = statistics.crossed_interval(lacking)
    assert (low, high, df) == pytest.approx((7 / 3 - math.hypot(*halves), 7 / 3 + math.hypot(*halves), 1))
    assert statistics.crossed_interval({("a", 0): 1.0}) is statistics.NO_INTERVAL
    level = {(i, j): float(j) for i in "ab" for j in range(2)}  # equal means of a and b say nothing, those of 0 and 1 do
    swapped = {(j, i): value for (i, j), value in level.items()}
    assert statistics.crossed_interval(level) == statistics.crossed_interval(swapped) == statistics.t_interval([0.0, 1.0])


@pytest.mark.parametrize("levels", [(3, 3), (5, 5), (6, 4), (8, 8)])
def test_an_interval_over_orders_and_seeds_covers_what_it_says_where_both_do_something(levels):
    """The wider one of the two factors' intervals covered 0.91 with five of each, and 0.92 with eight."""
    rng, hits = np.random.default_rng(0), []
    for _ in range(500):
        table = rng.normal(0, 1, (levels[0], 1)) + rng.normal(0, 1, (1, levels[1])) + rng.normal(0, 0.3, levels)
        low, high, df = statistics.crossed_interval(dict(np.ndenumerate(table)))
        assert df == (min(levels) - 1 if min(levels) < statistics.FEWEST_TO_RESAMPLE else None)
        hits.append(low <= 0 <= high)
    assert 0.945 <= np.mean(hits) <= 0.995


def test_difference_interval_is_welchs():
    a, b = [5.1, 4.9, 5.6, 5.2, 5.0], [3.9, 4.4, 4.1]
    low, high, df = statistics.difference_interval(a, b)
    va, vb = np.var(a, ddof=1) / 5, np.var(b, ddof=1) / 3
    exact = (va + vb) ** 2 / (va**2 / 4 + vb**2 / 2)
    assert df == int(exact) == 4
    centre, half = np.mean(a) - np.mean(b), 2.776445 * math.sqrt(va + vb)
    np.testing.assert_allclose([low, high], [centre - half, centre + half], atol=1e-4)
    assert statistics.difference_interval([1.0], b) is statistics.NO_INTERVAL
    assert statistics.difference_interval([1.0, 1.0], [0.0, 0.0]) is statistics.NO_INTERVAL


def test_what_another_learner_scored_cannot_be_forgotten():
    R = np.array([[0, 0, 0], [0.6, 0.4, 0.5], [0.6, 0.3, 0.6], [0.6, 0.3, 0.2]])  # an adapter each: nothing is lost
    own = np.tri(4, 3, -1, dtype=bool)
    assert metrics.forgetting(R) > 0.02  # the neighbour's adapter did better on the second language before its own
    summary = metrics.summarise(R, own)
    assert summary["forgetting"] == summary["forgetting_last"] == summary["forgetting_including_last"] == 0
    assert metrics.summarise(R, np.ones((4, 3), bool)) == metrics.summarise(R)


@settings(deadline=None, max_examples=30)
@given(*2 * [st.lists(st.integers(-3, 3), min_size=1, max_size=4)])
def test_exact_permutation_test_counts_every_split(a, b):
    pool, n = a + b, len(a)
    splits = []
    for chosen in itertools.combinations(range(len(pool)), n):
        rest = [pool[i] for i in range(len(pool)) if i not in chosen]
        splits.append(abs(sum(pool[i] for i in chosen) / n - sum(rest) / len(rest)))
    observed = sum(a) / n - sum(b) / len(b)
    result = statistics.permutation_test(a, b)
    close(result.difference, observed)
    close(result.p_value, sum(s >= abs(observed) - 1e-9 for s in splits) / len(splits))


def test_sampled_permutation_test_agrees_with_the_exact_one():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 8), rng.normal(0.8, 1, 7)
    exact = statistics.permutation_test(a, b).p_value
    sampled = statistics.permutation_test(a, b, samples=5000).p_value
    assert 0.01 < exact < 0.9 and abs(exact - sampled) < 0.02 and exact != sampled
    far = statistics.permutation_test(np.arange(20), np.arange(100, 120), samples=999)
    assert far.p_value == 1 / 1000  # never 0: the observed split is one of them


def test_permutation_test_of_an_empty_group_is_not_measured():
    assert all(math.isnan(v) for v in statistics.permutation_test([1, 2], [math.nan]))


def test_label_layout_refuses_what_is_not_bio():
    with pytest.raises(UserError, match="'E-date' is not a BIO label"):
        spans.label_layout(("O", "B-date", "E-date"))


@pytest.mark.parametrize("module", [metrics, spans, statistics])
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
