from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from streetvision.core.errors import UserError
from streetvision.stats import bootstrap
from streetvision.stats.bootstrap import (
    BIASED,
    BOOTSTRAP,
    JACKKNIFE,
    Resting,
    degrees_of_freedom,
    group_intervals,
    group_sign_flip_test,
    paired_group_interval,
    resample_multiplicities,
    spread,
)
from streetvision.stats.metrics import (
    METRIC_NAMES,
    PLAIN_ECE,
    GroupTable,
    all_metrics,
    all_metrics_batch,
    mcc_from_counts,
    prior_weights,
)
from tests.benchmarks.intervals import WORLDS, ece_coverage, unequal_coverage

# Their bins are cut at quantiles of the whole sample, which a loop over resamples cannot see.
FIXED_BINS = {"ece_equal_mass", "ece_debiased"}


def clustered(n_groups, rng, size=12, spread=1.2):
    """Images of a group share how hard they are, so they are far from independent; sizes vary."""
    sizes = rng.integers(size // 2, size * 3 // 2 + 1, n_groups)
    groups = np.repeat(np.arange(n_groups), sizes)
    y = rng.integers(0, 2, len(groups))
    ease = rng.normal(1.5, spread, n_groups)[groups]
    logit = ease * (2 * y - 1) + rng.normal(0, 1, len(groups))
    return y, 1 / (1 + np.exp(-logit)), groups


@pytest.mark.parametrize("prior", [None, 0.3])
@pytest.mark.parametrize("decimals", [9, 1])
def test_resamples_equal_a_naive_loop(prior, decimals):
    rng = np.random.default_rng(0)
    y, p, groups = clustered(65, rng, size=4)
    p = p.round(decimals)
    table = GroupTable.build(y, p, groups, prior)
    [rows] = resample_multiplicities(65, 40, np.random.default_rng(5))
    fast = all_metrics_batch(table, rows, prior)
    for r, row in enumerate(rows.astype(int)):
        chosen = np.concatenate(
            [np.flatnonzero(groups == g) for g in np.repeat(np.arange(65), row)]
        )
        weights = None if prior is None else prior_weights(y[chosen], prior)
        slow = all_metrics(y[chosen], p[chosen], weights)
        for name in set(METRIC_NAMES) - FIXED_BINS:
            assert fast[name][r] == pytest.approx(slow[name], abs=1e-12), name


def test_fixed_bins_of_a_resample_equal_a_naive_loop():
    rng = np.random.default_rng(0)
    y, p, groups = clustered(65, rng, size=4)
    edges = np.sort(p)[np.ceil(np.arange(1, 15) * len(p) / 15).astype(int) - 1]
    bins = (p[:, None] > edges).sum(axis=1)
    [rows] = resample_multiplicities(65, 20, np.random.default_rng(5))
    fast = all_metrics_batch(GroupTable.build(y, p, groups, None), rows, None)
    for r, row in enumerate(rows.astype(int)):
        gap, square, n = 0.0, 0.0, row[groups].sum()
        for k in range(15):
            m = row[groups] * (bins == k)
            if m.sum():
                error = m @ (p - y) / m.sum()
                gap += m.sum() / n * abs(error)
            if m.sum() > 1:
                share = m @ y / m.sum()
                square += m.sum() / n * (error**2 - share * (1 - share) / (m.sum() - 1))
        assert fast["ece_equal_mass"][r] == pytest.approx(gap, abs=1e-12)
        root = np.sign(square) * np.sqrt(abs(square))
        assert fast["ece_debiased"][r] == pytest.approx(root, abs=1e-9)


def test_multiplicities_are_draws_with_replacement_whatever_the_block():
    blocks = list(resample_multiplicities(3000, 800, np.random.default_rng(0)))
    rows = np.concatenate(blocks)
    assert len(blocks) > 1
    assert rows.shape == (800, 3000)
    assert (rows.sum(axis=1) == 3000).all()
    # Multinomial: mean 1, variance (1 - 1/G).
    assert rows.var() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("n_groups", [20, 90])
def test_intervals_are_the_same_in_blocks_of_a_few_rows(n_groups, monkeypatch):
    sample = clustered(n_groups, np.random.default_rng(3), size=4)
    whole = group_intervals(*sample, 0.5, n_resamples=150, seed=2)
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 7 * n_groups)
    rows = []
    evaluate = bootstrap.all_metrics_batch
    monkeypatch.setattr(
        bootstrap,
        "all_metrics_batch",
        lambda table, block, *rest: rows.append(len(block)) or evaluate(table, block, *rest),
    )
    pieces = group_intervals(*sample, 0.5, n_resamples=150, seed=2)
    assert sum(rows) == 1 + n_groups + 150 * (n_groups == 90)
    assert max(rows) == 7
    assert pieces.keys() == whole.keys()
    for name in set(whole) - set(PLAIN_ECE):
        interval = whole[name]
        found = (pieces[name].value, pieces[name].low, pieces[name].high)
        assert found == pytest.approx((interval.value, interval.low, interval.high), abs=1e-12)


def freedom(left_out, effective):
    """Satterthwaite's degrees of freedom, with SciPy's unbiased kurtosis; no more than the groups have."""
    n = len(left_out)
    excess = max(scipy.stats.kurtosis(left_out, bias=False), 0)
    return min(2 / (excess / n + 2 / (n - 1)), effective - 1)


def standard_errors(left_out, sizes):
    """Jackknife's, and that of contributions whose variance is τ² + ω² / n, by SciPy's NNLS."""
    n, has = len(left_out), sizes > 0
    jackknife = (n - 1) / n * sum((x - left_out.mean()) ** 2 for x in left_out)
    share = sizes[has] / sizes.sum()
    squares = [
        ((x - left_out.mean()) * (1 - w) / w) ** 2 * n / (n - 1)
        for x, w in zip(left_out[has], share, strict=True)
    ]
    design = np.stack([np.ones(len(share)), 1 / share], axis=1)
    modelled = share**2 @ (design @ scipy.optimize.nnls(design, np.array(squares))[0])
    return np.sqrt([jackknife, modelled])


def of_metric(name, y, groups, prior):
    """Images of a metric's classes by group [K times G], weighed to the prior, and the effective number."""
    classes = {"recall": [1], "fnr": [1], "fpr": [0]}.get(name, [0, 1])
    counts = [np.bincount(groups[y == c], minlength=groups.max() + 1) for c in classes]
    effective = min(n.sum() ** 2 / (n**2).sum() for n in counts)
    shares = [1.0] if len(classes) == 1 else [1 - prior, prior]
    return sum(w * n / n.sum() for w, n in zip(shares, counts, strict=True)), effective


@pytest.mark.parametrize("equal", [True, False])
def test_spread_is_the_larger_of_two_standard_errors(equal):
    rng = np.random.default_rng(0)
    differ = []
    for _ in range(30):
        sizes = np.full(40, 7.0) if equal else np.ceil(5 * (rng.pareto(1.5, 40) + 1))
        errors = rng.normal(0, np.sqrt(0.05 + 2 / sizes))
        total = sizes @ errors
        left_out = (total - sizes * errors) / (sizes.sum() - sizes)
        resting = Resting.of(sizes[:, None])
        assert resting.effective == pytest.approx(sizes.sum() ** 2 / (sizes**2).sum())
        wanted = standard_errors(left_out, sizes)
        got = spread(left_out, resting)
        assert got == pytest.approx((wanted.max(), freedom(left_out, resting.effective)))
        differ.append(wanted[1] / wanted[0])
    if equal:
        np.testing.assert_allclose(differ, 1)
    else:
        assert min(differ) < 0.99
        assert max(differ) > 1.01


def test_effective_groups_are_those_of_the_class_with_fewer():
    images = np.array([[8.0, 1.0], [8.0, 1.0], [0.0, 1.0]])
    two = Resting.of(images, 0.25)
    assert two.effective == pytest.approx(2)
    np.testing.assert_allclose(two.share, [0.375 + 1 / 12, 0.375 + 1 / 12, 1 / 12])
    np.testing.assert_allclose(Resting.of(images).share, [9 / 19, 9 / 19, 1 / 19])
    assert Resting.of(images[:, 1:]).effective == pytest.approx(3)
    assert Resting.of(images * [1, 0]).effective == 0


def test_percentiles_of_the_resamples_are_the_interval():
    """At the level at which percentiles have Student's t and the factor G / (G - 1) of a variance.

    Then they are moved away from the value, by what the jackknife does not see.
    """
    y, p, groups = clustered(90, np.random.default_rng(1))
    [rows] = resample_multiplicities(90, 500, np.random.default_rng(9))
    table = GroupTable.build(y, p, groups, 0.5)
    values = all_metrics_batch(table, rows, 0.5)
    left_out = all_metrics_batch(table, 1 - np.eye(90), 0.5)
    got = group_intervals(y, p, groups, 0.5, n_resamples=500, level=0.9, seed=9)
    factors = []
    for name in set(METRIC_NAMES) - {*PLAIN_ECE, "ece_debiased"}:
        sizes, effective = of_metric(name, y, groups, 0.5)
        reach = scipy.stats.t.ppf(0.95, freedom(left_out[name], effective))
        tail = scipy.stats.norm.sf(reach * np.sqrt(90 / 89))
        assert 0.02 < tail < 0.05
        errors = standard_errors(left_out[name], sizes)
        factors.append(errors.max() / errors[0])
        ends = np.quantile(values[name], [tail, 1 - tail])
        low, high = got[name].value + (ends - got[name].value) * factors[-1]
        assert (got[name].low, got[name].high) == pytest.approx((low, min(high, 1)))
        assert got[name].method == BOOTSTRAP
        assert got[name].effective_groups == pytest.approx(effective)
    assert max(factors) > 1.05
    point = all_metrics(y, p, prior_weights(y, 0.5))
    assert {k: v.value for k, v in got.items()} == pytest.approx(point)


def test_degrees_of_freedom_are_those_of_the_variance():
    """A mean's variance, estimated from n draws, varies as σ⁴ 2 / df: here of exponential draws (κ = 6)."""
    rng = np.random.default_rng(0)
    variances = rng.exponential(size=(20_000, 400)).var(axis=1, ddof=1)
    draws = rng.exponential(size=100_000)
    without = (draws.sum() - draws) / (len(draws) - 1)
    of_one = degrees_of_freedom(without, len(draws)) / len(draws)
    assert of_one == pytest.approx(2 / variances.var() / 400, rel=0.1)
    normal = rng.normal(size=100_000)
    assert degrees_of_freedom(normal, 100_000) == pytest.approx(100_000, rel=0.05)
    # Lighter tails than a normal's give no more than a normal's, nor do too few groups to tell.
    assert degrees_of_freedom(np.tile([-1.0, 1.0], 25), 50) == pytest.approx(49)
    assert degrees_of_freedom(np.array([0.0, 0.0, 9.0]), 3) == 2
    assert degrees_of_freedom(np.ones(9), 7) == 6


@pytest.mark.parametrize(("n_groups", "exponent"), [(60, 1.2), (300, 1.2), (100, 2.0)])
def test_intervals_hold_where_few_groups_are_large_and_some_fail(n_groups, exponent):
    """Pareto sizes; the model fails in one group of 25, of which resamples of the large ones see nothing."""
    for metric in ("mcc", "fnr"):
        found = unequal_coverage(n_groups, exponent, 300, metric)
        assert found.covered >= 0.885, metric  # of 300: 92 % less twice the standard error
        assert found.given > 0.85


def test_no_interval_where_few_groups_make_most_of_the_data():
    y, p, groups = equal(70)
    big = np.where(groups < 50, 0, groups)  # 21 groups, one of which has 70 % of the images
    got = group_intervals(y, p, big, 0.5, 50)["mcc"]
    assert (got.low, got.high) == (None, None)
    assert got.effective_groups < 5
    assert "rests on 1.9 effective groups (of 21), at least 4.5 are needed" in got.method


@pytest.mark.parametrize("name", PLAIN_ECE)
def test_a_plain_ece_has_no_interval(name):
    """A calibrated model shows as much as the noise of the bins: no interval around that holds 0."""
    y, p, groups = clustered(80, np.random.default_rng(0))
    for prior in (None, 0.5):
        got = group_intervals(y, p, groups, prior, 50, metrics=(name,))[name]
        assert (got.low, got.high, got.method) == (None, None, BIASED)
        assert got.value > 0
    paired = paired_group_interval(y, p, p**2, groups, name)
    assert (paired.low, paired.method) == (None, BIASED)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("n_groups", [40, 200])
def test_the_interval_of_the_debiased_ece_holds_the_models(world, n_groups):
    found, fails, _ = ece_coverage(world, 400, n_groups, 150)
    assert found.given == 1
    assert found.covered >= 0.9
    if world == "calibrated":
        assert fails == 0


def test_the_interval_of_the_debiased_ece_is_a_jackknife_of_its_square():
    y, p, groups = clustered(40, np.random.default_rng(6))
    p = 0.5 + 0.7 * (p - 0.5)
    table = GroupTable.build(y, p, groups, 0.5)
    roots = all_metrics_batch(table, np.vstack([np.ones(40), 1 - np.eye(40)]), 0.5)["ece_debiased"]
    squares = np.sign(roots) * roots**2
    sizes, effective = of_metric("ece_debiased", y, groups, 0.5)
    error = standard_errors(squares[1:], sizes).max()
    reach = scipy.stats.t.ppf(0.975, freedom(squares[1:], effective)) * error
    got = group_intervals(y, p, groups, 0.5)["ece_debiased"]
    assert got.value == pytest.approx(np.sqrt(squares[0]))
    ends = np.sqrt(np.maximum([squares[0] - reach, squares[0] + reach], 0))
    assert (got.low, got.high) == pytest.approx(tuple(ends))
    assert got.method == JACKKNIFE


def coverage(n_groups, n_simulations, seed, iid=False, prior=0.5):
    rng = np.random.default_rng(seed)
    y, p, _ = clustered(20_000, rng)
    truth = all_metrics(y, p, prior_weights(y, prior))["mcc"]
    hits = given = 0
    for simulation in range(n_simulations):
        y, p, groups = clustered(n_groups, rng)
        units = np.arange(len(y)) if iid else groups
        got = group_intervals(y, p, units, prior, 500, seed=simulation, metrics=("mcc",))["mcc"]
        if got.low is not None:  # fewer than 5 of its groups may hold both classes
            given += 1
            hits += got.low <= truth <= got.high
    assert given > 0.8 * n_simulations
    return hits / given


def test_bootstrap_covers_clustered_data():
    assert 0.90 <= coverage(80, 200, seed=0) <= 0.99


def test_jackknife_covers_with_few_groups():
    assert 0.91 <= coverage(15, 250, seed=1) <= 0.985
    assert 0.88 <= coverage(6, 250, seed=2) <= 0.99


def test_iid_bootstrap_undercovers_clustered_data():
    assert coverage(80, 100, seed=0, iid=True) < 0.85


@pytest.mark.parametrize(
    ("n_groups", "method"), [(60, BOOTSTRAP), (59, JACKKNIFE), (5, JACKKNIFE), (4, None)]
)
def test_number_of_groups_decides_the_method(n_groups, method):
    y, p, groups = equal(n_groups)
    for name, got in group_intervals(y, p, groups, 0.5, 50).items():
        if name in PLAIN_ECE:
            continue
        if method is None:
            assert (got.low, got.high) == (None, None), name
            assert "4.0 effective groups" in got.method
        elif name == "ece_debiased":
            assert (got.method, got.effective_groups) == (JACKKNIFE, pytest.approx(n_groups))
        else:
            assert got.method == method, name
            assert got.low < got.high, name


def equal(n_groups, size=20):
    """Groups of one size, half of whose images are positive."""
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(n_groups), size)
    y = np.arange(len(groups)) % 2
    logit = (2 * y - 1) * rng.normal(1.5, 1, n_groups)[groups] + rng.normal(0, 1, len(y))
    return y, 1 / (1 + np.exp(-logit)), groups


def test_groups_without_positives_do_not_count_for_recall():
    y, p, groups = clustered(90, np.random.default_rng(4))
    y[groups >= 10] = 0
    served = group_intervals(y, p, groups, 0.5, 50)
    assert served["recall"].method == served["mcc"].method == JACKKNIFE
    assert served["fpr"].method == BOOTSTRAP
    assert group_intervals(y, p, groups, None, 50)["accuracy"].method == BOOTSTRAP


def test_jackknife_of_a_mean_is_the_t_interval():
    """Brier loss of equal groups is a mean of group means; on the log scale to first order."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 40)
    y = rng.integers(0, 2, len(groups))
    p = np.clip(y + rng.normal(0, 0.02, 50)[groups] - 0.3 * (2 * y - 1), 0, 1)
    got = group_intervals(y, p, groups, metrics=("brier",))["brier"]
    means = ((p - y) ** 2).reshape(50, 40).mean(axis=1)
    reach = scipy.stats.t.ppf(0.975, freedom(means, 50)) * scipy.stats.sem(means)
    expected = means.mean() - reach, means.mean() + reach
    assert (got.low, got.high) == pytest.approx(expected, rel=2e-3)


def test_perfect_predictions_get_no_pretended_certainty():
    y = np.tile([0, 1], 80)
    for n_groups in (10, 80):
        got = group_intervals(y, y * 0.9 + 0.05, np.arange(160) // 2 % n_groups, 0.5, 50)["mcc"]
        assert got.value == 1
        assert got.low is None
        assert "no variation" in got.method


def test_intervals_depend_on_the_seed_alone():
    y, p, groups = clustered(90, np.random.default_rng(1))
    names = np.array([f"drive-{g}" for g in groups])
    first = group_intervals(y, p, names, 0.5, 200, seed=3)
    assert first == group_intervals(y, p, names, 0.5, 200, seed=3)
    assert first != group_intervals(y, p, names, 0.5, 200, seed=4)


@pytest.mark.parametrize("n_groups", [80, 20])
def test_paired_interval_is_narrower_than_unpaired_and_antisymmetric(n_groups):
    rng = np.random.default_rng(0)
    y, a, groups = clustered(n_groups, rng)
    logit = np.log(a / (1 - a))
    b = 1 / (1 + np.exp(-(logit + 1.0 * (2 * y - 1))))  # better on the same images
    got = paired_group_interval(y, a, b, groups, served_prior=0.5, seed=0)
    w = prior_weights(y, 0.5)
    assert got.value == pytest.approx(all_metrics(y, b, w)["mcc"] - all_metrics(y, a, w)["mcc"])
    assert 0 < got.low < got.value < got.high
    alone = [group_intervals(y, p, groups, 0.5, metrics=("mcc",))["mcc"] for p in (a, b)]
    unpaired = np.hypot(*(interval.high - interval.low for interval in alone))
    assert got.high - got.low < 0.7 * unpaired
    back = paired_group_interval(y, b, a, groups, served_prior=0.5, seed=0)
    assert (back.low, back.high) == pytest.approx((-got.high, -got.low))


def test_paired_interval_of_a_model_with_itself_is_none():
    y, p, groups = clustered(70, np.random.default_rng(1))
    got = paired_group_interval(y, p, p, groups)
    assert (got.value, got.low) == (0, None)


def slow_sign_flip(y, a, b, groups):
    """Swap whole groups in every possible way and recompute MCC from the images."""

    def mcc(p):
        h = p > 0.5
        return mcc_from_counts((h & (y == 1)).sum(), (h & (y == 0)).sum(),
                               (~h & (y == 0)).sum(), (~h & (y == 1)).sum())  # fmt: skip

    values = []
    for swap in itertools.product([False, True], repeat=len(np.unique(groups))):
        s = np.array(swap)[groups]
        values.append(abs(mcc(np.where(s, a, b)) - mcc(np.where(s, b, a))))
    return np.mean(np.array(values) >= values[0] - 1e-12)


def test_sign_flip_equals_exact_enumeration():
    for seed in range(5):
        y, a, groups = clustered(7, np.random.default_rng(seed))
        b = clustered(7, np.random.default_rng(seed))[1]
        b = np.where(np.random.default_rng(seed).random(len(y)) < 0.3, 1 - a, b)
        assert group_sign_flip_test(y, a, b, groups) == slow_sign_flip(y, a, b, groups)


@pytest.mark.parametrize("n_groups", [8, 12, 13, 40])
def test_no_permutation_gives_a_p_of_0(n_groups):
    """The observed swap is one of all, enumerated or drawn: the least p is 1 over their number."""
    y = np.tile([0, 0, 1, 1], n_groups)
    groups = np.repeat(np.arange(n_groups), 4)
    wrong, right = np.full(len(y), 0.4), np.where(y == 1, 0.9, 0.1)
    p = group_sign_flip_test(y, wrong, right, groups, 0.5, n_permutations=99)
    # Of an enumeration the swap of all groups is as extreme as that of none.
    assert p == (2 / 2**n_groups if n_groups <= 12 else 1 / 100)


def test_sign_flip_at_the_class_share_equals_no_prior():
    y, a, groups = clustered(9, np.random.default_rng(0))
    b = np.random.default_rng(1).permutation(a)
    assert group_sign_flip_test(y, a, b, groups, y.mean()) == group_sign_flip_test(y, a, b, groups)
    assert group_sign_flip_test(y, a, a, groups) == 1.0


@pytest.mark.parametrize("n_groups", [10, 40])
def test_sign_flip_keeps_its_level_and_finds_a_difference(n_groups):
    rng = np.random.default_rng(7)
    rejected = found = 0
    for simulation in range(200):
        y, base, groups = clustered(n_groups, rng)
        logit = np.log(base / (1 - base))
        shifts = rng.normal(0, 0.7, (2, n_groups))  # each model errs by group
        a, b = (1 / (1 + np.exp(-(logit + s[groups]))) for s in shifts)
        better = 1 / (1 + np.exp(-(logit + shifts[1][groups] + 2.0 * (2 * y - 1))))
        options = {"served_prior": 0.5, "n_permutations": 500, "seed": simulation}
        rejected += group_sign_flip_test(y, a, b, groups, **options) <= 0.05
        found += group_sign_flip_test(y, a, better, groups, **options) <= 0.05
    assert rejected / 200 <= 0.08
    assert found / 200 > (0.8 if n_groups == 40 else 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y, p: group_intervals(y, p, [1, 2]), "one entry per image"),
        (lambda y, p: group_intervals(y, p, y, level=1.0), "level must lie"),
        (lambda y, p: group_intervals(y * 0, p, y, 0.5), "both classes"),
        (lambda y, p: paired_group_interval(y * 0, p, p, y, "roc_auc"), "roc_auc is undefined"),
        (lambda y, p: group_sign_flip_test(y * 0, p, p, y, 0.5), "both classes"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call(np.array([0, 1, 1]), np.array([0.2, 0.6, 0.4]))
