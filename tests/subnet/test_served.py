"""Streams of served pictures: bytes against Pillow and each other, memory, draws, bad input."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from streetvision.errors import UserError
from streetvision.subnet.distortions import SIDE
from streetvision.subnet.profiles import CROP, LETTERBOX, PROFILES, RAW, ValidatorProfile
from streetvision.subnet.served import (
    Task,
    mixed_levels,
    mixed_served_jpegs,
    open_jpeg,
    served_image,
    served_jpeg,
    served_jpegs,
)
from tests.subnet.pictures import encoded, picture

N = 3000
RNG = np.random.default_rng


# --------------------------------------------------------------------------- challenges


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(CROP.levels), st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_any_image_becomes_224_rgb(level: int, width: int, height: int, seed: int) -> None:
    image = Image.new("L", (width, height), 99)
    data = served_jpeg(CROP, image, level, np.random.default_rng(seed), 0.5)
    with Image.open(io.BytesIO(data)) as found:
        assert (found.format, found.mode, found.size) == ("JPEG", "RGB", (SIDE, SIDE))


def test_the_jpeg_is_of_pillows_default_quality() -> None:
    image = picture()
    plain = io.BytesIO()
    served_image(CROP, image, 0, np.random.default_rng(0)).save(plain, "JPEG")
    assert served_jpeg(CROP, image, 0, np.random.default_rng(0)) == plain.getvalue()


def test_a_challenge_depends_on_no_order_and_no_workers() -> None:
    tasks = []
    for number in range(40):
        data = io.BytesIO()
        picture(48, 36, number).save(data, "JPEG")
        tasks.append(Task(f"image-{number}", data.getvalue()))
    found = list(served_jpegs(CROP, tasks, CROP.levels, 2, 7))
    assert len(set(found)) == len(found) - 40  # level 0 alone repeats itself
    assert list(served_jpegs(CROP, tasks, CROP.levels, 2, 7, workers=2)) == found
    backwards = list(served_jpegs(CROP, tasks[::-1], CROP.levels, 2, 7))
    assert [backwards[8 * n : 8 * n + 8] for n in range(39, -1, -1)] == [
        found[8 * n : 8 * n + 8] for n in range(40)
    ]
    # One level alone is what it is among all; another seed is another challenge.
    assert list(served_jpegs(CROP, tasks, [2], 2, 7)) == [
        data for n in range(40) for data in found[8 * n + 4 : 8 * n + 6]
    ]
    assert list(served_jpegs(CROP, tasks[:1], [3], 1, 8)) != [found[6]]


@pytest.mark.parametrize(
    ("shares", "repeats"),
    [((0.25,) * 4, 1), ((0.25,) * 4, 4), ((0.1, 0.6, 0, 0.3), 3), ((0, 0, 0, 1), 2)],
)
def test_levels_are_mixed_by_their_shares(shares: tuple[float, ...], repeats: int) -> None:
    drawn = np.array([mixed_levels(str(i), shares, repeats, 3) for i in range(N)])
    assert drawn.shape == (N, repeats)
    for level, share in enumerate(shares):
        counts = (drawn == level).sum(axis=1)
        # No image has one more or less than its share of the repeats.
        assert (np.abs(counts - share * repeats) < 1).all()
        deviation = np.sqrt(share * (1 - share) / (N * repeats))
        assert abs((drawn == level).mean() - share) <= 4 * deviation
    assert mixed_levels("7", shares, repeats, 3) == tuple(drawn[7])


def test_a_mixture_draws_from_the_challenges_of_its_levels() -> None:
    data = io.BytesIO()
    picture(48, 36).save(data, "JPEG")
    tasks = [Task(f"image-{number}", data.getvalue()) for number in range(40)]
    shares = (0.1, 0.2, 0.3, 0.4)
    found = list(mixed_served_jpegs(CROP, tasks, shares, 2, 7))
    assert list(mixed_served_jpegs(CROP, tasks, shares, 2, 7, workers=2)) == found
    every = list(served_jpegs(CROP, tasks, CROP.levels, 2, 7))
    for number, task in enumerate(tasks):
        for repeat, level in enumerate(mixed_levels(task.id, shares, 2, 7)):
            assert found[2 * number + repeat] == every[8 * number + 2 * level + repeat]


# --------------------------------------------------------------------------- eras


def sideways(kind: str = "JPEG") -> bytes:
    """A file whose EXIF block asks for a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(80, 48), kind, exif=exif.tobytes(), quality=95)


def only(profile: ValidatorProfile, data: bytes, level: int = 0) -> bytes:
    (found,) = served_jpegs(profile, [Task("a", data)], [level], 1, 0)
    return found


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("RGB", "WEBP"),
     ("RGB", "BMP"), ("RGB", "TIFF")],
)  # fmt: skip
def test_raw_is_what_pillow_saves_of_the_file(mode: str, kind: str) -> None:
    data = encoded(picture().convert(mode), kind)
    with Image.open(io.BytesIO(data)) as image:
        assert only(RAW, data) == encoded(image)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "I;16"])
def test_raw_of_what_jpeg_cannot_hold_is_rgb(mode: str) -> None:
    image = picture().convert("L").convert("I;16") if mode == "I;16" else picture().convert(mode)
    with Image.open(io.BytesIO(only(RAW, encoded(image, "PNG")))) as found:
        assert (found.mode, found.size) == ("RGB", image.size)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_exif_is_dropped_without_turning_the_picture(profile: ValidatorProfile, kind: str) -> None:
    data = sideways(kind)
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif()[0x0112] == 6
        plain = encoded(Image.fromarray(np.asarray(image)), "PNG")
    found = only(profile, data)
    assert found == only(profile, plain)
    with Image.open(io.BytesIO(found)) as served:
        assert not served.getexif()
        assert served.size == ((80, 48) if profile is RAW else (SIDE, SIDE))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_every_era_sends_quality_75_with_halved_chroma(profile: ValidatorProfile) -> None:
    image = picture(320, 180)
    for level in profile.levels:
        sent = served_image(profile, image, level, RNG(1))
        data = served_jpeg(profile, image, level, RNG(1))
        assert data == encoded(sent)
        with Image.open(io.BytesIO(data)) as found:
            assert found.size == (image.size if profile.side is None else (profile.side,) * 2)
            assert [layer[1:3] for layer in found.layer] == [(2, 2), (1, 1), (1, 1)]


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_levels_that_draw_nothing_repeat_themselves(profile: ValidatorProfile) -> None:
    task = Task("a", encoded(picture(320, 180)))
    for level in profile.levels:
        found = list(served_jpegs(profile, [task], [level], 3, 0))
        assert len(set(found)) == (3 if level in profile.drawn_levels else 1)


def test_a_letterbox_holds_the_whole_frame_and_a_crop_begins_with_it() -> None:
    """On 16:9 a crop may be narrower than any of the central square; a letterbox shows both ends."""
    wide = np.zeros((180, 320, 3), dtype=np.uint8)
    wide[:, :40], wide[:, -40:] = (250, 0, 0), (0, 250, 0)
    image = Image.fromarray(wide)
    boxed = np.asarray(served_image(LETTERBOX, image, 0, RNG(0))).astype(int)
    assert (boxed[..., 0] > 200).any()
    assert (boxed[..., 1] > 200).any()
    seen = np.array(
        [np.asarray(served_image(CROP, image, 1, RNG(n))).max(axis=(0, 1)) for n in range(60)]
    )
    assert 10 < (seen[:, 0] > 200).sum() < 50
    assert 10 < (seen[:, 1] > 200).sum() < 50


def test_a_task_may_name_the_point_that_was_painted_over() -> None:
    data = encoded(picture(200, 200))
    for profile in PROFILES.values():
        found = [
            list(served_jpegs(profile, [Task("a", data, mask)], [profile.levels[-1]], 5, 0))
            for mask in (None, (3, 3))
        ]
        assert (found[0] == found[1]) == (profile is not CROP)


def test_an_unknown_level_and_what_is_no_picture_are_refused() -> None:
    with pytest.raises(UserError, match=r'"raw" has the levels 0, got 1'):
        list(served_jpegs(RAW, [Task("a", encoded(picture()))], [1], 1, 0))
    with pytest.raises(UserError, match=r"levels 0, 1, 2, 3, got -1"):
        served_image(CROP, picture(), -1, RNG(0))
    for data in (b"", b"no picture", encoded(picture())[:300]):
        with pytest.raises(UserError, match="picture a7 cannot be decoded"):
            list(served_jpegs(RAW, [Task("a7", data)], [0], 1, 0))


def test_tasks_of_a_generator_are_taken_a_few_at_a_time() -> None:
    data, taken = encoded(picture()), []

    def tasks() -> Iterator[Task]:
        for number in range(1000):
            taken.append(number)
            yield Task(str(number), data)

    stream = served_jpegs(RAW, tasks(), [0], 1, 0, workers=2)
    for _ in range(10):
        next(stream)
    assert len(taken) < 60


def test_raw_needs_little_more_than_the_decoded_picture() -> None:
    """What Python allocates; Pillow's one copy of the pixels is outside of that."""
    tasks = [Task(str(n), encoded(picture(1600, 1200, n), quality=90)) for n in range(3)]
    list(served_jpegs(RAW, tasks, [0], 1, 0))
    tracemalloc.start()
    try:
        for _ in served_jpegs(RAW, tasks, [0], 1, 0):
            pass
        assert tracemalloc.get_traced_memory()[1] < 1600 * 1200
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_a_mixture_follows_the_profiles_shares(profile: ValidatorProfile) -> None:
    tasks = [Task(str(n), encoded(picture(48, 36, n))) for n in range(12)]
    found = list(mixed_served_jpegs(profile, tasks, profile.level_shares, 2, 3, workers=2))
    every = list(served_jpegs(profile, tasks, profile.levels, 2, 3))
    for n, task in enumerate(tasks):
        for k, level in enumerate(mixed_levels(task.id, profile.level_shares, 2, 3)):
            assert found[2 * n + k] == every[(n * len(profile.levels) + level) * 2 + k]
        assert open_jpeg(found[2 * n]).mode == "RGB"
