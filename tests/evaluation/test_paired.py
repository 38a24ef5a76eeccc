from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, t

from streetvision.errors import UserError
from streetvision.evaluation.bootstrap import (
    JACKKNIFE,
    MIN_GROUPS,
    Resting,
    group_sign_flip_test,
    paired_group_interval,
    spread,
)
from streetvision.evaluation.metrics import all_metrics, mcc_from_counts, prior_weights
from streetvision.evaluation.paired import (
    correlation_difference_bounds,
    expected_reward,
    fisher_z_interval,
    groups_needed,
    groups_needed_for_ece,
    holm,
    mcnemar_exact,
    resting_groups,
    same_mcc_p,
)
from streetvision.subnet.reward import reward_moments


def holm_rejects(p: list[float], level: float) -> list[bool]:
    """Holm's procedure as he wrote it: go up from the smallest p until one is too large."""
    rejected = [False] * len(p)
    for step, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        if p[place] > level / (len(p) - step):
            break
        rejected[place] = True
    return rejected


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 0.999))
def test_holm_is_the_step_down_procedure(p: list[float], level: float) -> None:
    adjusted = holm(p)
    assert adjusted.shape == (len(p),)
    near = np.abs(adjusted - level) < 1e-9  # where rounding decides
    wanted = np.array(holm_rejects(p, level), dtype=bool)
    np.testing.assert_array_equal((adjusted <= level)[~near], wanted[~near])


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.9]), [0.09, 0.04, 0.09, 0.9])


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_sums_the_binomial_tail(gained: int, lost: int) -> None:
    n = gained + lost
    wanted = min(1.0, 2 * binom.cdf(min(gained, lost), n, 0.5)) if n else 1.0
    assert mcnemar_exact(gained, lost) == pytest.approx(wanted)
    assert mcnemar_exact(gained, lost) == mcnemar_exact(lost, gained)


def test_correlation_difference_covers_for_normal_variables() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([[1, 0.8, 0.6], [0.8, 1, 0.7], [0.6, 0.7, 1]])
    hits, repeats, n = 0, 3000, 60
    draws = rng.multivariate_normal(np.zeros(3), truth, (repeats, n))
    for draw in draws:
        r = np.corrcoef(draw.T)
        low, high = correlation_difference_bounds(r[0, 1], r[0, 2], r[1, 2], n)
        assert low < r[0, 2] - r[0, 1] < high
        hits += low <= 0.6 - 0.8 <= high
    assert hits / repeats == pytest.approx(0.95, abs=0.013)


def test_fisher_z_is_of_the_correlation_of_decisions_and_too_narrow_for_them() -> None:
    """Independent images, MCC about 0.9: the reason that it is shown with a warning."""
    rng = np.random.default_rng(0)
    hits, repeats, n = 0, 400, 500
    for _ in range(repeats):
        y = rng.integers(0, 2, n)
        a, b = (np.where(rng.random(n) < 0.05, 1 - y, y) for _ in range(2))
        found = fisher_z_interval(y, a == 1, b == 1)
        assert found is not None
        wanted = np.corrcoef(y, b)[0, 1] - np.corrcoef(y, a)[0, 1]
        assert found.value == pytest.approx(wanted)
        hits += found.low <= 0 <= found.high
    assert hits / repeats < 0.8


def test_fisher_z_does_not_exist_without_two_correlations() -> None:
    y = np.array([0, 1, 0, 1, 1])
    some = np.array([0, 1, 1, 1, 1])
    assert fisher_z_interval(y, some, some) is not None
    assert fisher_z_interval(y, y, some) is None
    assert fisher_z_interval(y, some, np.ones(5)) is None
    assert fisher_z_interval(y[:3], some[:3], some[:3]) is None


@pytest.mark.parametrize("share", [0.05, 0.4, 0.5])
def test_many_rewards_are_interpolated_exactly(share: float) -> None:
    rng = np.random.default_rng(0)
    tpr, fpr = rng.uniform(0, 1, (2, 1000))
    tpr[:4], fpr[:4] = [0, 1, 0, 1], [0, 0, 1, 1]
    tpr[4] = np.nan
    found = expected_reward(tpr, fpr, share)
    assert np.isnan(found[4])
    wanted = reward_moments(np.delete(tpr, 4), np.delete(fpr, 4), share)[0]
    np.testing.assert_allclose(np.delete(found, 4), wanted, rtol=0, atol=1e-8)


def noisy(n_groups: int, seed: int, gain: float) -> tuple[np.ndarray, ...]:
    """Labels, two models' probabilities and groups; the second model is better by `gain`."""
    rng = np.random.default_rng(seed)
    groups = np.arange(n_groups).repeat(rng.integers(2, 12, n_groups))
    labels = rng.integers(0, 2, len(groups))
    labels[np.unique(groups, return_index=True)[1]] = np.arange(n_groups) % 2
    sign = 2 * labels - 1
    logits = sign * [[1], [1 + gain]] + rng.normal(0, 1, (2, n_groups))[:, groups]
    return labels, *(1 / (1 + np.exp(-logits - rng.normal(0, 1, logits.shape)))), groups


def mcc_of(labels: np.ndarray, p: np.ndarray, prior: float) -> float:
    return float(all_metrics(labels, p, prior_weights(labels, prior))["mcc"])


@pytest.mark.parametrize(("gain", "prior"), [(0.0, 0.5), (0.7, 0.5), (2.0, 0.2)])
def test_same_mcc_has_to_convince_the_swaps_and_the_jackknife(gain: float, prior: float) -> None:
    """The jackknife leaves out each group and counts anew, the slow way."""
    larger = []
    for seed in range(8):
        labels, a, b, groups = noisy(16, seed, gain)
        left_out = []
        for group in range(16):
            kept = groups != group
            left_out.append(
                mcc_of(labels[kept], b[kept], prior) - mcc_of(labels[kept], a[kept], prior)
            )
        delta = mcc_of(labels, b, prior) - mcc_of(labels, a, prior)
        error, df = spread(np.array(left_out), resting_groups(labels, groups, prior))
        jackknife = 2 * t.sf(abs(delta) / error, df)
        swaps = group_sign_flip_test(labels, a, b, groups, prior, 500, seed)
        found = same_mcc_p(labels, a, b, groups, prior, 500, seed)
        assert found == pytest.approx(max(swaps, jackknife))
        # At 5 % the jackknife test says what the jackknife interval says.
        interval = paired_group_interval(labels, a, b, groups, "mcc", prior)
        assert interval.method == JACKKNIFE
        assert (jackknife <= 0.05) == (not interval.low <= 0 <= interval.high)
        larger.append(bool(swaps > jackknife))
    # Each of the two decides somewhere: neither could be left out.
    assert set(larger) == {True, False}


def test_same_mcc_is_not_denied_without_a_spread() -> None:
    labels, groups = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 1, 2, 3, 3, 3])
    a, b = np.array([0.9, 0.9, 0.1, 0.9, 0.1, 0.1]), np.array([0.1, 0.1, 0.1, 0.9, 0.9, 0.9])
    assert same_mcc_p(labels, a, b, groups, 0.5) == 1.0  # all positives are in one group
    assert same_mcc_p(labels, a, a, np.arange(6), 0.5) == 1.0
    with pytest.raises(UserError, match="both classes"):
        same_mcc_p(labels * 0, a, b, groups, 0.5)


def test_resting_groups_are_those_of_both_classes() -> None:
    labels, index = np.array([0, 0, 1, 1, 1]), np.array([0, 0, 1, 2, 2])
    found = resting_groups(labels, index, 0.25)
    assert found.effective == pytest.approx(1)  # all negatives are of one group
    np.testing.assert_allclose(found.share, [0.75, 0.25 / 3, 0.5 / 3])
    wanted = Resting.of(np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), 0.25)
    np.testing.assert_array_equal(found.share, wanted.share)


def test_groups_needed_gives_the_power() -> None:
    from scipy.stats import norm

    needed = groups_needed(0.01, 0.02, 50)
    assert needed is not None
    error = 0.02 * math.sqrt(50 / needed)
    assert norm.sf(1.959964 - 0.01 / error) == pytest.approx(0.8, abs=0.002)
    assert groups_needed(-0.01, 0.02, 50) == needed
    assert groups_needed(10.0, 0.02, 50) == MIN_GROUPS
    assert groups_needed(0.0, 0.02, 50) is None
    assert groups_needed(0.01, None, 50) is None


def test_groups_needed_for_an_ece_give_the_power() -> None:
    """Its square is normal with the variance that the formula says; V is the variance of a bin's share."""
    from scipy.stats import norm

    bins, limit, reach = 15, 0.05, 1.959964

    def error(ece: float, noise: float) -> float:
        return math.sqrt((2 * noise**2 + 4 * noise * ece**2) / bins)

    for ece, noise in ((0.0, 0.016), (0.02, 0.016), (0.09, 0.004), (0.045, 0.002)):
        high = math.sqrt(ece**2 + reach * error(ece, noise))
        needed = groups_needed_for_ece(limit, ece, high, 1000)
        assert needed is not None
        found = error(ece, noise * 1000 / needed)
        assert norm.sf(reach - abs(ece**2 - limit**2) / found) == pytest.approx(0.8, abs=0.002)
    assert groups_needed_for_ece(0.05, 0.05, 0.1, 50) is None
    assert groups_needed_for_ece(0.5, 0.0, 0.01, 50) == MIN_GROUPS


def test_correlation_of_decisions_is_the_mcc() -> None:
    y, a = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 1, 1, 1, 0, 0])
    assert np.corrcoef(y, a)[0, 1] == pytest.approx(float(mcc_from_counts(2, 1, 2, 1)))
