from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from streetvision.errors import UserError
from streetvision.evaluation.bootstrap import BIASED, BOOTSTRAP, JACKKNIFE, group_intervals, spread
from streetvision.evaluation.compare import (
    METRICS,
    Comparison,
    compare_predictions,
    difference_intervals,
)
from streetvision.evaluation.evaluate import picture_hash
from streetvision.evaluation.metrics import all_metrics, prior_weights
from streetvision.evaluation.paired import groups_needed, resting_groups, same_mcc_p
from streetvision.evaluation.predictions import Predictions, joined_groups, parse_predictions
from streetvision.subnet.reward import reward_moments
from tests.benchmarks.comparison import BETTER, NULLS, rates, simulate, true_differences
from tests.benchmarks.comparison import METRICS as COVERED

PRIOR = 0.5


def tables(n_groups: int, seed: int = 0, world: str = BETTER) -> tuple[Predictions, Predictions]:
    y, a, b, groups = simulate(world, n_groups, np.random.default_rng(seed))
    ids = np.array([f"image-{i:05d}" for i in range(len(y))])
    names = np.array([f"city{g:03d}" for g in groups])
    return Predictions(ids, names, y, a), Predictions(ids, names, y, b)


def rows(table: Predictions, chosen: object) -> Predictions:
    return Predictions(
        table.ids[chosen], table.groups[chosen], table.labels[chosen], table.probabilities[chosen]
    )


def equal_groups(table: Predictions, n_groups: int) -> Predictions:
    """The same predictions, dealt to groups of one size and one share of both classes."""
    size = min((table.labels == label).sum() for label in (0, 1)) // n_groups
    chosen = np.concatenate([np.flatnonzero(table.labels == i)[: size * n_groups] for i in (0, 1)])
    names = np.tile(np.arange(n_groups).repeat(size), 2).astype(str)
    return replace(rows(table, chosen), groups=names)


def values(labels: np.ndarray, p: np.ndarray, prior: float) -> dict[str, float]:
    """The slow way to every metric."""
    found = all_metrics(labels, p, prior_weights(labels, prior))
    reward = float(reward_moments(1 - found["fnr"], found["fpr"], prior)[0][0])
    return {name: found[name] for name in METRICS if name != "reward"} | {"reward": reward}


@pytest.mark.parametrize("prior", [0.5, 0.2])
def test_values_differences_and_standard_errors_are_those_of_the_images(prior: float) -> None:
    base, head = tables(20)
    found = compare_predictions(base, head, prior, n_resamples=200)
    first, second = (values(t.labels, t.probabilities, prior) for t in (base, head))
    assert tuple(found.differences) == METRICS
    left_out = []
    for group in np.unique(base.groups):
        kept = base.groups != group
        one, two = (values(t.labels[kept], t.probabilities[kept], prior) for t in (base, head))
        left_out.append([two[m] - one[m] for m in METRICS])
    index = np.unique(base.groups, return_inverse=True)[1]
    resting = resting_groups(base.labels, index, prior)
    errors = [spread(np.array(each), resting)[0] for each in zip(*left_out, strict=True)]
    for metric, error in zip(METRICS, errors, strict=True):
        each = found.differences[metric]
        assert each.base.value == pytest.approx(first[metric])
        assert each.head.value == pytest.approx(second[metric])
        assert each.delta.value == pytest.approx(second[metric] - first[metric])
        if metric == "ece":
            assert (each.standard_error, each.groups_needed) == (None, None)
        # Without a group, equal-mass bins would be cut elsewhere; ours stay.
        elif metric != "ece_debiased":
            assert each.standard_error == pytest.approx(error)
            assert each.groups_needed == groups_needed(each.delta.value, each.standard_error, 20)


@pytest.mark.parametrize("n_groups", [30, 90])
def test_intervals_of_one_side_are_those_of_the_evaluation(n_groups: int) -> None:
    base, head = tables(n_groups)
    found = compare_predictions(base, head, PRIOR, n_resamples=400, seed=3)
    index = np.unique(head.groups, return_inverse=True)[1]
    alone = group_intervals(
        head.labels, head.probabilities, index, PRIOR, 400, seed=3,
        metrics=("mcc", "ece", "ece_debiased", "log_loss", "fnr"),
    )  # fmt: skip
    for metric, interval in alone.items():
        each = found.differences[metric].head
        assert each.method == interval.method
        # Percentiles are expanded, jackknife intervals are the same.
        slack = 0.006 if n_groups == 90 else 1e-12
        assert (each.low, each.high) == pytest.approx((interval.low, interval.high), abs=slack)


def test_difference_intervals_are_those_of_the_comparison() -> None:
    """So that what the simulations say of the one holds for the other."""
    for n_groups in (20, 70):
        base, head = tables(n_groups)
        index = np.unique(head.groups, return_inverse=True)[1]
        pair = (base.labels, base.probabilities, head.probabilities, index, PRIOR)
        deltas = difference_intervals(*pair, METRICS, 300, seed=5)
        found = compare_predictions(base, head, PRIOR, n_resamples=300, seed=5)
        assert found.same_mcc_p == same_mcc_p(*pair, 300, seed=5)
        for metric in METRICS:
            delta = found.differences[metric].delta
            assert (delta.low, delta.high) == (deltas[metric].low, deltas[metric].high)


@pytest.mark.parametrize(
    ("n_groups", "method"), [(60, BOOTSTRAP), (59, JACKKNIFE), (5, JACKKNIFE), (4, None)]
)
def test_number_of_groups_decides_the_method(n_groups: int, method: str | None) -> None:
    sides = [equal_groups(each, n_groups) for each in tables(2 * n_groups)]
    found = compare_predictions(*sides, PRIOR, n_resamples=200)
    assert found.effective_groups == pytest.approx(n_groups)
    for metric, each in found.differences.items():
        if method is None or metric == "ece":
            assert each.delta.low is None
            reason = BIASED if metric == "ece" else "none: rests on 4.0 effective groups (of 4)"
            assert each.delta.method.startswith(reason)
            assert each.verdict == "not told apart"
        else:
            assert each.delta.method == method
            assert each.delta.low < each.delta.value < each.delta.high
    small = compare_predictions(*tables(4), PRIOR, n_resamples=50).differences["mcc"]
    assert (small.standard_error, small.groups_needed) == (None, None)


def test_a_swap_of_the_sides_turns_every_sign() -> None:
    base, head = tables(30)
    there, back = (
        compare_predictions(*pair, PRIOR, n_resamples=500) for pair in ((base, head), (head, base))
    )
    for metric in METRICS:
        one, two = there.differences[metric].delta, back.differences[metric].delta
        if metric == "ece":
            assert (one.low, two.low) == (None, None)
            continue
        assert (one.low, one.high) == pytest.approx((-two.high, -two.low))
        verdicts = {there.differences[metric].verdict, back.differences[metric].verdict}
        assert verdicts in ({"better", "worse"}, {"not told apart"})
    assert there.same_mcc_p == back.same_mcc_p
    assert there.mcnemar_p == back.mcnemar_p
    assert {c.id for c in there.changes if c.right == "head"} == {
        c.id for c in back.changes if c.right == "base"
    }


def test_better_is_higher_for_mcc_and_lower_for_errors() -> None:
    base, head = tables(80)
    sign = 2 * base.labels - 1
    logit = np.log(base.probabilities / (1 - base.probabilities))
    far = replace(head, probabilities=1 / (1 + np.exp(-(logit + 1.5 * sign))))
    found = compare_predictions(base, far, PRIOR, n_resamples=500).differences
    for metric in ("mcc", "accuracy", "fnr", "fpr", "log_loss", "reward"):
        assert found[metric].verdict == "better", metric
        assert (found[metric].delta.value > 0) == (metric in {"mcc", "accuracy", "reward"})


def test_a_model_against_itself() -> None:
    base, _ = tables(70)
    found = compare_predictions(base, base, PRIOR, n_resamples=100)
    assert found.same_mcc_p == found.mcnemar_p == 1.0
    assert found.changes == ()
    for each in found.differences.values():
        assert (each.delta.value, each.delta.low, each.groups_needed) == (0, None, None)
        assert each.verdict == "not told apart"


def test_changes_name_who_is_right_largest_first() -> None:
    ids = np.array(["a", "b", "c", "d"])
    y = np.array([1, 1, 0, 0])
    base = Predictions(ids, ids, y, np.array([0.9, 0.4, 0.2, 0.5]))
    head = Predictions(ids, ids, y, np.array([0.1, 0.6, 0.3, 0.51]))
    found = compare_predictions(base, head, PRIOR, n_resamples=10)
    assert [(c.id, c.right, c.label) for c in found.changes] == [
        ("a", "base", 1), ("b", "head", 1), ("d", "base", 0)
    ]  # fmt: skip
    assert found.mcnemar_p == 1.0


def test_rows_are_matched_by_id_whatever_their_order() -> None:
    base, head = tables(20)
    shuffled = rows(head, np.random.default_rng(0).permutation(len(head.ids)))
    found = compare_predictions(base, shuffled, PRIOR, n_resamples=100)
    assert found == compare_predictions(base, head, PRIOR, n_resamples=100)
    assert found.matching.same


def test_other_test_sets_are_compared_on_what_they_share() -> None:
    base, head = tables(20)
    n = len(base.ids)
    found = compare_predictions(
        rows(base, slice(30, n)), rows(head, slice(0, n - 10)), PRIOR, n_resamples=50
    )
    both = slice(30, n - 10)
    same = compare_predictions(rows(base, both), rows(head, both), PRIOR, n_resamples=50)
    assert found.differences == same.differences
    matching = found.matching
    assert (matching.n_base, matching.n_head, matching.n_common) == (n - 30, n - 10, n - 40)
    assert not matching.same
    assert same.matching.same


def hashed(table: Predictions, salt: str = "") -> Predictions:
    """With the hashes of pictures that its ids stand for."""
    names = [picture_hash(f"{salt}{name}".encode()) for name in table.ids]
    return replace(table, pictures=np.array(names))


def test_one_id_with_two_pictures_is_no_image_of_both() -> None:
    """Whatever the order of the rows; their labels may be equal or not."""
    base, head = tables(20)
    n = len(base.ids)
    order = np.random.default_rng(0).permutation(n)
    pictures = hashed(head).pictures
    assert pictures is not None
    pictures[[3, 7]] = "0" * 16
    labels = head.labels.copy()
    labels[[7, 9]] = 1 - labels[[7, 9]]
    other = replace(head, labels=labels)
    given = replace(rows(other, order), pictures=pictures[order])
    found = compare_predictions(hashed(base), given, PRIOR, n_resamples=50)
    assert found.matching.others == ("image-00003", "image-00007")
    assert found.matching.conflicts == ("image-00009",)
    assert (found.matching.n_common, found.n, found.matching.same) == (n - 2, n - 3, False)
    kept = np.delete(np.arange(n), [3, 7, 9])
    wanted = compare_predictions(rows(base, kept), rows(head, kept), PRIOR, n_resamples=50)
    assert found.differences == wanted.differences
    assert compare_predictions(hashed(base), hashed(head), PRIOR, n_resamples=10).matching.same


def test_test_sets_that_share_less_than_half_are_refused() -> None:
    base, head = tables(20)
    n = len(base.ids)
    with pytest.raises(
        UserError,
        match=rf"the test sets differ: of {n} and {n} images they share 0, {n} more only an id",
    ):
        compare_predictions(hashed(base), hashed(head, "another seed"), PRIOR)
    # One side without hashes: by the ids, as far as they go.
    assert compare_predictions(base, hashed(head, "x"), PRIOR, n_resamples=10).matching.same
    half = n // 2
    small = rows(head, slice(0, 2 * half - 2))
    for first, allowed in ((half, False), (half - 1, True)):
        # `base` has n images, of which `small` shares its last ones.
        ids = np.concatenate([np.char.add("x", base.ids[:first]), base.ids[first:]])
        moved = replace(base, ids=ids)
        if allowed:
            matching = compare_predictions(moved, small, PRIOR, n_resamples=10).matching
            assert 2 * matching.n_common == len(small.ids)
        else:
            with pytest.raises(UserError, match="less than half"):
                compare_predictions(moved, small, PRIOR)


def test_images_with_two_labels_are_left_out_and_named() -> None:
    base, head = tables(20)
    labels = head.labels.copy()
    labels[[3, 7]] = 1 - labels[[3, 7]]
    found = compare_predictions(base, replace(head, labels=labels), PRIOR, n_resamples=50)
    assert found.matching.conflicts == ("image-00003", "image-00007")
    assert not found.matching.same
    kept = np.delete(np.arange(len(labels)), [3, 7])
    wanted = compare_predictions(rows(base, kept), rows(head, kept), PRIOR, n_resamples=50)
    assert found.differences == wanted.differences
    assert found.n == len(kept)


def test_nothing_in_common_or_one_class_is_refused() -> None:
    base, head = tables(20)
    other = replace(head, ids=np.char.add("x", head.ids))
    with pytest.raises(
        UserError, match=r"the test sets differ: of .* images they share 0, less than half"
    ):
        compare_predictions(base, other, PRIOR)
    with pytest.raises(
        UserError, match=r"nothing to compare: all .* are labelled otherwise in each"
    ):
        compare_predictions(base, replace(head, labels=1 - head.labels), PRIOR)
    one = base.labels == 1
    with pytest.raises(UserError, match="both classes"):
        compare_predictions(rows(base, one), rows(head, one), PRIOR)


@pytest.mark.parametrize("side", ["base", "head"])
def test_a_comparison_counts_the_groups_that_either_side_joins(side: str) -> None:
    """Ten cities of four drives each: whoever knows the cities, the interval is that of the cities."""
    base, head = tables(40)
    cities = np.array([f"city{int(name[4:]) // 4}" for name in base.groups])
    joined = replace(base, groups=cities), replace(head, groups=cities)
    given = (joined[0], head) if side == "base" else (base, joined[1])
    found = compare_predictions(*given, PRIOR, n_resamples=200)
    wanted = compare_predictions(*joined, PRIOR, n_resamples=200)
    assert found.n_groups == 10
    assert found.differences == wanted.differences
    assert found.same_mcc_p == wanted.same_mcc_p
    assert found.differences != compare_predictions(base, head, PRIOR, n_resamples=200).differences
    part = np.array(["x", ""])[np.arange(len(base.ids)) % 2]
    slices = [
        compare_predictions(one, replace(two, slices={"s": part}), PRIOR, n_resamples=200).slices
        for one, two in (given, joined)
    ]
    assert len(slices[0]) == 1
    assert slices[0] == slices[1]


def test_groups_of_either_side_stay_together() -> None:
    def same_parts(x: np.ndarray, y: list[int]) -> bool:
        return len(set(zip(x.tolist(), y, strict=True))) == len(set(x.tolist())) == len(set(y))

    a = np.array(["p", "p", "q", "r", "s"])
    assert same_parts(joined_groups(a, np.array(["1", "1", "2", "3", "4"])), [0, 0, 1, 2, 3])
    assert same_parts(joined_groups(a, np.array(["1", "2", "2", "3", "4"])), [0, 0, 0, 1, 2])
    assert same_parts(joined_groups(a, np.array(["1", "2", "3", "4", "4"])), [0, 0, 1, 2, 2])
    assert joined_groups(a, a).max() == 3


def sliced(n_groups: int) -> tuple[Comparison, Predictions, Predictions, np.ndarray]:
    base, head = tables(n_groups)
    number = np.unique(base.groups, return_inverse=True)[1]
    weather = np.array(["sun", "rain"])[number % 2].astype(object)
    weather[number == 3] = "hail"  # one group alone
    evidence = np.where(base.labels == 1, np.array(["near", "far"])[np.arange(len(number)) % 2], "")
    slices = {
        "weather": weather.astype(str), "evidence": evidence,
        "source": np.full(len(number), "all"), "label": base.labels.astype(str),
    }  # fmt: skip
    found = compare_predictions(
        base, replace(head, slices=slices), PRIOR, against_all_negatives=["evidence"],
        n_resamples=300,
    )  # fmt: skip
    return found, base, head, weather


def test_slices_are_comparisons_of_their_images() -> None:
    found, base, head, weather = sliced(20)
    by_name = {(each.name, each.value): each for each in found.slices}
    assert set(by_name) == {
        ("weather", "sun"), ("weather", "rain"), ("weather", "hail"), ("evidence", "near"),
        ("evidence", "far"), ("label", "0"), ("label", "1"),
    }  # fmt: skip
    own = weather == "rain"
    alone = compare_predictions(rows(base, own), rows(head, own), PRIOR, n_resamples=300)
    rain = by_name["weather", "rain"]
    assert (rain.n, rain.n_groups) == (own.sum(), alone.n_groups)
    assert rain.p_value == alone.same_mcc_p
    assert rain.delta.low == pytest.approx(alone.differences["mcc"].delta.low)
    assert rain.base == pytest.approx(alone.differences["mcc"].base.value)
    near = by_name["evidence", "near"]
    scored = (base.labels == 0) | (np.arange(len(own)) % 2 == 0)
    assert near.n == (scored & (base.labels == 1)).sum()
    weights = prior_weights(head.labels[scored], PRIOR)
    wanted = all_metrics(head.labels[scored], head.probabilities[scored], weights)["mcc"]
    assert near.head == pytest.approx(wanted)
    one_class = by_name["label", "1"]
    assert (one_class.base, one_class.delta, one_class.p_value) == (None, None, None)


def test_slices_are_corrected_for_how_many_are_tested() -> None:
    found, *_ = sliced(20)
    tested = [each for each in found.slices if each.p_value is not None]
    assert {each.value for each in tested} == {"sun", "rain", "near", "far"}
    smallest = min(tested, key=lambda each: each.p_value)
    assert smallest.p_holm == pytest.approx(min(1, 4 * smallest.p_value))
    assert all(each.p_value <= each.p_holm <= 1 for each in tested)
    assert all(each.p_holm is None for each in found.slices if each.p_value is None)


@pytest.mark.parametrize("world", NULLS)
@pytest.mark.parametrize("n_groups", [8, 20, 60])
def test_no_difference_is_found_rarely_where_there_is_none(world: str, n_groups: int) -> None:
    """Clustered images of unequal groups; McNemar's test, beside it, is wrong much more often."""
    repeats = 600
    found = rates(world, n_groups, repeats, seed=1, resamples=300)
    noise = np.sqrt(0.05 * 0.95 / repeats)
    assert found.same_mcc <= binom.ppf(0.99, repeats, 0.05) / repeats
    if n_groups == 60:
        assert found.mcnemar > 0.15
        assert found.covered["mcc"] == pytest.approx(0.95, abs=0.015 + 2.5 * noise)
    else:
        assert found.covered["mcc"] >= 0.95 - 0.015 - 2.5 * noise
    assert found.fisher_covered < 0.7


def test_intervals_cover_a_true_difference_and_are_wider_with_few_groups() -> None:
    noise = np.sqrt(0.05 * 0.95 / 500)
    many, few = (
        rates(BETTER, n_groups, 500, seed=2, resamples=300, metrics=COVERED)
        for n_groups in (80, 12)
    )
    for metric in COVERED[:4]:
        assert many.covered[metric] == pytest.approx(0.95, abs=0.015 + 2.5 * noise), metric
        assert few.covered[metric] >= 0.935 - 2.5 * noise, metric
    for found in (many, few):
        assert found.covered["ece_debiased"] >= 0.935 - 2.5 * noise
    assert few.halfwidth > many.halfwidth * np.sqrt(80 / 12)
    assert rates(BETTER, 4, 50, seed=2, resamples=100).given == 0


def test_the_size_that_would_tell_has_the_power() -> None:
    delta, n_groups = true_differences(BETTER)["mcc"], 100
    errors = []
    for seed in range(20):
        found = compare_predictions(*tables(n_groups, seed), PRIOR, n_resamples=10)
        errors.append(found.differences["mcc"].standard_error)
    needed = groups_needed(delta, float(np.sqrt(np.mean(np.square(errors)))), n_groups)
    found = rates(BETTER, needed, 300, seed=3, resamples=300)
    assert found.excluded == pytest.approx(0.8, abs=0.06)


GOOD = "id,group,label,probability\na,g,1,0.9\nb,g,0,0.2\n"


def test_predictions_are_read_whatever_their_columns_order() -> None:
    found = parse_predictions("label,extra,id,probability,group\n1,x,a,0.25,g\n", "here")
    assert (found.ids[0], found.groups[0], found.labels[0], found.probabilities[0]) == (
        "a",
        "g",
        1,
        0.25,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "here has no column id, group, label, probability"),
        ("id,group,label\na,g,1\n", "here has no column probability"),
        (GOOD + "a,g,1,0.5\n", "here: id a is there more than once"),
        (GOOD + "c,g,1,x\n", "not a table of predictions"),
        (GOOD + "c,g\n", "here line 4: 2 cells, but the header names 4 columns"),
        (GOOD + "c,g,2,0.5\n", "here: labels must be 0 or 1"),
        (GOOD + "c,g,1,nan\n", r"here: probabilities must lie in \[0, 1\]"),
        (
            "id,group,label,probability,image_sha256\na,g,1,0.9,0123456789abcdeg\n",
            "here: image_sha256 must be 16 hexadecimal digits",
        ),
        ("id,group,label,probability\n", "here: labels and probabilities must be two non-empty"),
    ],
)
def test_a_broken_table_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_predictions(text, "here")


def test_groups_of_a_table_are_read_as_those_of_a_source() -> None:
    text = "id,group,label,probability\na,1.0,1.0,0.9\nb,1,True,0.2\nc,nan,0,0.5\nd,,0,0.5\n"
    found = parse_predictions(text, "here")
    assert found.groups.tolist() == ["1", "1", "image:c", "image:d"]
    assert found.labels.tolist() == [1, 1, 0, 0]
