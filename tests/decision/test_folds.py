"""Folds of whole groups: each group is held out once, and the seed decides with which others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streetvision.core.params import Decision
from streetvision.decision import choice, conditions, folds, policy
from streetvision.decision.fitting import Passes, fit_decision
from streetvision.decision.folds import group_folds, out_of_fold
from streetvision.fusion import fitting as fusion_training
from streetvision.fusion.fitting import LabelledViews

GROUPS, IMAGES = 20, 6


def sample(seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.str_]]:
    """Logits that tell something, truth with both classes in each group, names of groups; [N] each."""
    rng = np.random.default_rng(seed)
    truth = np.arange(GROUPS * IMAGES) % 2 == 0
    names = np.repeat([f"g{number}" for number in range(GROUPS)], IMAGES)
    return 2 * truth - 1 + rng.normal(0, 1.5, truth.size), truth, names


def parts(found: list[NDArray[np.bool_]], names: NDArray[np.str_]) -> list[frozenset[str]]:
    return [frozenset(names[fold].tolist()) for fold in found]


def test_each_group_is_held_out_once_and_whole() -> None:
    _, truth, names = sample()
    found = group_folds(truth, names, 0)
    assert len(found) == folds.MAX_FOLDS
    np.testing.assert_array_equal(np.sum(found, axis=0), 1)
    held = parts(found, names)
    assert sum(map(len, held)) == GROUPS
    assert frozenset.union(*held) == set(names.tolist())


def test_the_seed_decides_the_folds() -> None:
    _, truth, names = sample()
    first, again = (parts(group_folds(truth, names, 0), names) for _ in range(2))
    assert first == again
    others = {frozenset(parts(group_folds(truth, names, seed), names)) for seed in range(5)}
    assert len(others) == 5


def test_a_map_sees_nothing_of_what_it_is_asked_about() -> None:
    logits, truth, names = sample()
    found = group_folds(truth, names, 0)
    seen: list[set[str]] = []

    def fit(_: Any, labels: NDArray[np.bool_], groups: NDArray[Any]) -> Any:
        seen.append(set(groups.tolist()))
        assert len(labels) == len(groups)
        return lambda values: values

    assert out_of_fold(fit, logits, truth, names, found) is not None
    for fold, groups in zip(found, seen, strict=True):
        assert groups == set(names.tolist()) - set(names[fold].tolist())


@pytest.mark.parametrize("seed", [3, 4])
def test_whoever_divides_does_so_by_the_seed_it_was_given(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, truth, names = sample()
    given: dict[str, list[int]] = {}
    # The inner folds of ensembles are fixed: `Ensemble.seed`.
    for module in (choice, conditions, policy, fusion_training):
        seeds = given.setdefault(module.__name__, [])

        def recorded(*arguments: Any, at: list[int] = seeds) -> Any:
            at.append(arguments[2])
            return group_folds(*arguments)

        monkeypatch.setattr(module, "group_folds", recorded)
    clean = Passes(logits, logits, truth.astype(np.int64), names)
    passes = {"clean": clean, "served": clean._replace(fused=logits * 0.5)}
    for calibrator in ("auto", "tier_1"):
        settings = Decision.model_validate({"calibrator": calibrator, "n_resamples": 100})
        fit_decision(passes, settings, seed, several_views=True)
    views: Any = LabelledViews(None, truth.astype(np.int64), names)
    kept = fusion_training._kept_images(views, 5, seed)
    assert [set(names[rows]) for rows in kept] == [
        set(names[~fold]) for fold in group_folds(truth, names, seed)
    ]
    for name, seeds in given.items():
        assert seeds, f"{name} divides nothing here"
        assert set(seeds) == {seed}, name
