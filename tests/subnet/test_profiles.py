"""The validators' data: complete, consistent, in order of time; a further one is one value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import numpy as np
import pytest

from streetvision.errors import UserError
from streetvision.subnet.payment import REWARDS
from streetvision.subnet.profiles import (
    CROP,
    HALT,
    HALTED,
    LETTERBOX,
    PROFILES,
    RAW,
    ValidatorProfile,
    profile,
)
from streetvision.subnet.served import Task, served_jpegs
from tests.subnet.pictures import encoded, picture


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_found_by_its_name_and_frozen(name: str) -> None:
    found = profile(name)
    assert found.name == name
    with pytest.raises(FrozenInstanceError):
        found.side = 3  # type: ignore[misc]
    assert sum(found.level_shares) == pytest.approx(1)
    assert sum(share for _, share in found.sources) == pytest.approx(1)
    assert found.drawn_levels <= set(found.levels)
    assert found.reward in REWARDS
    assert (found.jpeg_quality, found.jpeg_subsampling) == (75, "4:2:0")
    assert found.deadline == 9
    assert found.positive_share == 0.5


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        UserError, match='no validator is called "rwa"; there are raw, letterbox, crop'
    ):
        profile("rwa")


def test_each_era_ends_where_the_next_begins_and_the_last_with_the_halt() -> None:
    for newer, older in pairwise(PROFILES.values()):
        assert older.since < older.until == newer.since
        assert older.status == "replaced"
    assert RAW.until == HALTED
    assert RAW.status == "halted"
    assert "2026-05-06" in HALT
    assert "05b830e" in HALT


def test_what_the_eras_send() -> None:
    assert (RAW.levels, RAW.side, RAW.drawn_levels) == ((0,), None, frozenset())
    for each in (LETTERBOX, CROP):
        assert (each.level_shares, each.side) == ((0.25,) * 4, 224)
    assert dict(RAW.sources)["api"] == pytest.approx(1 / 3)
    assert "api" not in dict(CROP.sources)


def test_a_further_era_is_one_value() -> None:
    """Everything that serves asks the profile alone."""

    def mirrored(image, level, rng, options):  # type: ignore[no-untyped-def]
        return image.transpose(0) if rng.random() < 0.5 else image

    fourth: ValidatorProfile = replace(
        RAW, name="fourth", send=mirrored, level_shares=(0.5, 0.5), drawn_levels=frozenset({0, 1})
    )
    task = Task("a", encoded(picture(), "PNG"))
    found = set(served_jpegs(fourth, [task], fourth.levels, 20, 0))
    assert found == {encoded(picture()), encoded(picture().transpose(0))}
    assert len(np.unique([len(each) for each in found])) <= 2
