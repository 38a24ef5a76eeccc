"""The split contract: groups whole, both classes everywhere, shares near target, clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streetvision.data.schema import SPLITS
from streetvision.data.split import SplitResult, split_groups
from streetvision.errors import UserError

FRACTIONS = {"train": 0.6, "val_select": 0.1, "val_calib": 0.15, "val_test": 0.15}


def make(counts: list[tuple[int, int]]) -> tuple[list[str], NDArray[np.int64]]:
    """Groups with so many positives and negatives."""
    groups, labels = [], []
    for number, (positives, negatives) in enumerate(counts):
        groups += [f"g{number:05d}"] * (positives + negatives)
        labels += [1] * positives + [0] * negatives
    return groups, np.array(labels)


def check(groups: list[str], labels: NDArray[np.int64], result: SplitResult) -> None:
    """What must hold for every split."""
    places = {}
    for group, split, fusion in zip(groups, result.split, result.fusion, strict=True):
        assert places.setdefault(group, (split, fusion)) == (split, fusion)
        assert split == "train" or not fusion
    for split in SPLITS:
        assert set(labels[result.split == split]) == {0, 1}
    if result.fusion.any():
        assert set(labels[result.fusion]) == {0, 1}
        assert set(labels[(result.split == "train") & ~result.fusion]) == {0, 1}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.15, 0.4]),
    st.integers(0, 10**6),
)
def test_every_split_keeps_the_contract_or_is_refused(
    counts: list[tuple[int, int]], fusion: float, seed: int
) -> None:
    groups, labels = make([pair for pair in counts if sum(pair)])
    refusal = ""
    try:
        result = split_groups(groups, labels, FRACTIONS, fusion, seed)
    except UserError as error:
        refusal = str(error)
    if not refusal:
        check(groups, labels, result)
        assert result.fusion.any() == (fusion > 0)
    elif sum(p > 0 and n > 0 for p, n in counts) >= 6:
        # Enough groups, but one is so large that TRAIN is full with it and one more.
        assert "TRAIN has 2 groups" in refusal


@pytest.mark.parametrize("n_groups", [40, 300])
@pytest.mark.parametrize("positive_share", [0.5, 0.8])
def test_shares_are_near_their_targets(n_groups: int, positive_share: float) -> None:
    rng = np.random.default_rng(n_groups)
    sizes = rng.geometric(1 / 40, n_groups) + 5
    positives = rng.binomial(sizes - 2, rng.beta(4 * positive_share, 4 - 4 * positive_share)) + 1
    groups, labels = make([(int(p), int(n - p)) for p, n in zip(positives, sizes, strict=True)])
    result = split_groups(groups, labels, FRACTIONS, 0.15, seed=7)
    check(groups, labels, result)
    for split, share in FRACTIONS.items():
        inside = result.split == split
        assert abs(inside.mean() - share) < 0.02
        assert abs(labels[inside].mean() - labels.mean()) < 0.03
    train = result.split == "train"
    assert abs(result.fusion[train].mean() - 0.15) < 0.03
    assert abs(labels[result.fusion].mean() - labels.mean()) < 0.05


# The shape of a small collection of dash-cam clips: ten mixed groups, four of one class.
CLIPS = [
    (27, 8), (43, 22), (31, 30), (80, 55), (39, 37), (33, 14), (45, 21), (26, 11), (36, 2),
    (24, 28), (29, 0), (20, 0), (0, 21), (0, 4),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
def test_groups_of_one_class_go_to_train(seed: int) -> None:
    groups, labels = make(CLIPS)
    result = split_groups(groups, labels, FRACTIONS, 0.15, seed)
    check(groups, labels, result)
    assert result.one_class_groups == "train"
    one_class = np.isin(groups, ["g00010", "g00011", "g00012", "g00013"])
    assert (result.split[one_class] == "train").all()
    assert not result.fusion[one_class].any()
    for split, share in FRACTIONS.items():
        assert abs((result.split == split).mean() - share) < 0.06


def test_images_without_groups_are_stratified_by_label() -> None:
    groups, labels = make([(1, 0)] * 700 + [(0, 1)] * 300)
    result = split_groups(groups, labels, FRACTIONS, 0.15, seed=7)
    check(groups, labels, result)
    assert result.one_class_groups == "anywhere"
    for split, share in FRACTIONS.items():
        inside = result.split == split
        assert abs(inside.sum() - 1000 * share) <= 2
        assert abs(labels[inside].mean() - 0.7) < 0.02


def test_too_many_one_class_images_for_train() -> None:
    groups, labels = make([(10, 10)] * 6 + [(100, 0)] * 8)
    result = split_groups(groups, labels, FRACTIONS, 0.15, seed=7)
    check(groups, labels, result)
    assert result.one_class_groups == "anywhere"


def test_the_order_of_images_is_irrelevant_and_the_seed_is_not() -> None:
    rng = np.random.default_rng(0)
    groups, labels = make([(int(p), int(n)) for p, n in rng.integers(1, 30, (60, 2))])
    result = split_groups(groups, labels, FRACTIONS, 0.15, seed=7)
    order = rng.permutation(len(groups))
    shuffled = split_groups([groups[k] for k in order], labels[order], FRACTIONS, 0.15, seed=7)
    assert (shuffled.split == result.split[order]).all()
    assert (shuffled.fusion == result.fusion[order]).all()
    other = split_groups(groups, labels, FRACTIONS, 0.15, seed=8)
    assert (other.split != result.split).any()


def test_six_equal_groups_are_enough_and_four_are_not() -> None:
    groups, labels = make([(5, 5)] * 6)
    check(groups, labels, split_groups(groups, labels, FRACTIONS, 0.15, seed=7))
    groups, labels = make([(5, 5)] * 5)
    check(groups, labels, split_groups(groups, labels, FRACTIONS, 0, seed=7))
    with pytest.raises(UserError, match="TRAIN has 2 groups"):
        split_groups(groups, labels, FRACTIONS, 0.15, seed=7)
    groups, labels = make([(5, 5)] * 4)
    with pytest.raises(UserError, match="form 4 groups and a split needs at least 5"):
        split_groups(groups, labels, FRACTIONS, 0, seed=7)


def test_refusals_name_what_is_missing() -> None:
    with pytest.raises(UserError, match="no usable image is labelled `no roadwork`"):
        split_groups(*make([(5, 0)] * 9), FRACTIONS, 0.15, seed=7)
    with pytest.raises(UserError, match="only 3 groups have images labelled `roadwork`"):
        split_groups(*make([(5, 5)] * 3 + [(0, 5)] * 20), FRACTIONS, 0, seed=7)
