"""What lies below a folder and what is read of it: tools' copies, links in circles, pipes, huge files."""

from __future__ import annotations

import os
import socket
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from streetvision.core.errors import UserError
from streetvision.data import walk
from streetvision.data.pixels import MAX_FILE_BYTES
from streetvision.data.walk import (
    NOT_AN_IMAGE,
    READ_FORMATS,
    Finder,
    image_files,
    left_out_line,
    read_file,
    read_image,
    sub_folders,
    unread_format,
    walk_files,
)

JPEG = b"\xff\xd8\xff and more"


def put(path: Path, data: bytes = JPEG) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def link(path: Path, target: str | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def refusal(call: object, *arguments: object) -> str:
    assert callable(call)
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------- which files


def test_what_tools_leave_is_no_file(tmp_path: Path) -> None:
    put(tmp_path / "g/a.jpg")
    for left in (
        ".hidden.jpg", "._a.jpg", ".ipynb_checkpoints/a.jpg", ".thumbnails/a.jpg", "@eaDir/a.jpg/thumb.jpg",
        "__MACOSX/a.jpg", "#recycle/a.jpg", "@Recycle/a.jpg", "$RECYCLE.BIN/a.jpg", "lost+found/a.jpg",
        "System Volume Information/a.jpg", "Thumbs.db", "desktop.ini",
    ):  # fmt: skip
        put(tmp_path / left)
        put(tmp_path / "g" / left)
    assert walk_files(tmp_path).files == ["g/a.jpg"]
    assert sub_folders(tmp_path) == ["g"]
    # What is asked for by name is a person's, whatever it is called.
    assert walk_files(tmp_path / ".thumbnails").files == ["a.jpg"]


def test_order_is_that_of_the_names(tmp_path: Path) -> None:
    names = ["b/c.jpg", "b.jpg", "a/z/y.jpg", "a/b.jpg", "B.jpg"]
    for name in names:
        put(tmp_path / name)
    assert walk_files(tmp_path).files == sorted(names)


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    put(tmp_path / "pool/x.jpg")
    put(tmp_path / "pool/deep/y.jpg")
    link(tmp_path / "set/g0/x.jpg", tmp_path / "pool/x.jpg")
    link(tmp_path / "set/g1", tmp_path / "pool")
    found = walk_files(tmp_path / "set")
    # A linked file is where its link stands, and may be there as often as copies of it.
    assert found.files == ["g0/x.jpg", "g1/deep/y.jpg", "g1/x.jpg"]
    assert not found.left_out


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "/"])
def test_links_upwards_end(tmp_path: Path, target: str) -> None:
    root = tmp_path / "set"
    put(root / "a/b/x.jpg")
    put(root / "y.jpg")
    put(tmp_path / "beside.jpg")
    for number in range(2):  # two such links made 2^40 paths
        link(root / f"a/b/up{number}", target)
    found = walk_files(root)
    assert found.files == ["a/b/x.jpg", "y.jpg"]
    assert found.left_out.total() == 2


def test_the_real_place_wins_over_links(tmp_path: Path) -> None:
    put(tmp_path / "z/real/x.jpg")
    link(tmp_path / "a", "z/real")
    link(tmp_path / "b", "a")
    assert walk_files(tmp_path).files == ["z/real/x.jpg"]


def test_of_links_the_shallower_wins_then_the_name(tmp_path: Path) -> None:
    put(tmp_path / "pool/x.jpg")
    for name in ("a/deep/one", "c", "b"):
        link(tmp_path / "set" / name, tmp_path / "pool")
    assert walk_files(tmp_path / "set").files == ["b/x.jpg"]


def test_a_link_brings_no_class_into_the_other(tmp_path: Path) -> None:
    put(tmp_path / "roadwork/g0/x.jpg")
    put(tmp_path / "none/g0/y.jpg")
    put(tmp_path / "unsure/z.jpg")
    for name, target in (("top", "../.."), ("other", "../../none"), ("same", "..")):
        link(tmp_path / "roadwork/g0" / name, target)
    found = walk_files(tmp_path, ("roadwork", "none"))
    assert found.files == ["none/g0/y.jpg", "roadwork/g0/x.jpg"]
    assert found.left_out.total() == 3


def test_a_folder_elsewhere_is_once_in_each_class(tmp_path: Path) -> None:
    put(tmp_path / "pool/x.jpg")
    root = tmp_path / "set"
    for name in ("roadwork/a", "roadwork/b", "none/a"):
        link(root / name, tmp_path / "pool")
    assert walk_files(root, ("roadwork", "none")).files == ["none/a/x.jpg", "roadwork/a/x.jpg"]


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    put(tmp_path / "pool/g0/x.jpg")
    put(tmp_path / "set/none/y.jpg")
    link(tmp_path / "set/roadwork", tmp_path / "pool")
    assert walk_files(tmp_path / "set", ("roadwork", "none")).files == [
        "none/y.jpg", "roadwork/g0/x.jpg",
    ]  # fmt: skip


def test_what_is_no_file_is_counted_and_not_opened(tmp_path: Path) -> None:
    put(tmp_path / "x.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    link(tmp_path / "linked pipe.jpg", "pipe.jpg")
    link(tmp_path / "zero.jpg", "/dev/zero")
    link(tmp_path / "nowhere.jpg", "nothing")
    link(tmp_path / "itself.jpg", "itself.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path is short
        server.bind("s.jpg")
        os.chdir(here)
        found = image_files(tmp_path)
    assert found.files == ["x.jpg"]
    assert found.left_out == {"pipes, sockets or devices": 4, "links that lead nowhere": 2}


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    assert refusal(walk_files, tmp_path / "no").endswith("no does not exist")
    put(tmp_path / "file")
    assert "cannot be read: Not a directory" in refusal(walk_files, tmp_path / "file")
    link(tmp_path / "circle", "circle")
    assert "circle" in refusal(walk_files, tmp_path / "circle")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tree_of_links_ends_and_holds_each_real_folder_once(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "root"
        folders = [root, Path(name) / "pool"]
        for folder in folders:
            put(folder / "x.jpg")
        for number in range(data.draw(st.integers(0, 6))):
            folder = data.draw(st.sampled_from(folders)) / f"d{number}"
            folders.append(folder)
            put(folder / "x.jpg")
        for number in range(data.draw(st.integers(0, 8))):
            places = st.sampled_from(folders)
            (data.draw(places) / f"l{number}").symlink_to(data.draw(places))
        found = walk_files(root)
        reached = [(root / file).resolve() for file in found.files]
        assert len(set(reached)) == len(reached)
        assert {folder / "x.jpg" for folder in folders if root in (folder, *folder.parents)} <= set(
            map(Path, reached)
        )
        for file in found.files:  # what is really there is found there
            if root in (root / file).resolve().parents:
                assert (root / file).resolve() == (root / file)
        assert walk_files(root) == found


# --------------------------------------------------------------------------- images


def test_images_are_told_by_content_where_the_name_does_not(tmp_path: Path) -> None:
    named = ["a.jpg", "b.JPEG", "c.jfif", "d.jpe", "e.pjpeg", "f.PNG", "g.webp"]
    for name in named:
        put(tmp_path / name, b"not looked into")
    for name in ("no suffix", "odd.img", "x.txt"):
        put(tmp_path / name)
    others = {
        "a.heic": b"\0\0\0\x18ftypheic", "b.heif": b"\0\0\0\x18ftypmif1", "c.avif": b"\0\0\0\x18ftypavif",
        "d.gif": b"GIF89a", "e.jxl": b"\xff\x0a", "notes.txt": b"x", "more.TXT": b"",
        "odd.a very long suffix": b"", "none": b"", "sound.wav": b"RIFF....WAVE",
    }  # fmt: skip
    for name, content in others.items():
        put(tmp_path / name, content)
    found = image_files(tmp_path)
    assert found.files == sorted([*named, "no suffix", "odd.img", "x.txt"])
    assert found.left_out == {
        "HEIC": 2, "AVIF": 1, "GIF": 1, "JPEG XL": 1, ".txt": 2, ".wav": 1, "other files": 2,
    }  # fmt: skip
    assert left_out_line("here", found.left_out).startswith(
        "here: left out: 2 .txt, 1 .wav, 1 AVIF, 1 GIF, 2 HEIC, 1 JPEG XL, 2 other files; JPEG, "
    )


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"GIF89a", "GIF"), (b"\0\0\0\x1cftypavif", "AVIF"), (b"\0\0\0\x18ftypheix", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"), (b"\0\0\0\x0cJXL \r\n", "JPEG XL"), (b"ftypisom", None),
        (b"", None), (b"root:x:0:0:", None), (b"%!PS-Adobe", None),
    ],
)  # fmt: skip
def test_formats_that_are_not_read_have_a_name(head: bytes, kind: str | None) -> None:
    assert unread_format(head) == kind


def test_the_formats_that_are_said_to_be_read_are(tmp_path: Path) -> None:
    for kind in READ_FORMATS.replace(" and", ",").split(", "):
        Image.new("RGB", (20, 20)).save(tmp_path / kind, kind)
        assert read_image(tmp_path / kind, 10**6, "that") != NOT_AN_IMAGE


def test_only_the_bytes_of_images_are_kept(tmp_path: Path) -> None:
    secret = put(tmp_path / "shadow", b"root:secret")
    link(tmp_path / "x.jpg", secret)
    assert read_image(tmp_path / "x.jpg", 1000, "that") == NOT_AN_IMAGE
    put(tmp_path / "y.jpg")
    assert read_image(tmp_path / "y.jpg", 1000, "that") == JPEG
    assert read_image(put(tmp_path / "z.jpg", b""), 1000, "that") == b""
    assert read_file(tmp_path / "x.jpg", 1000, "that") == b"root:secret"


def test_a_sparse_file_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "sparse.jpg")
    os.truncate(path, 3 * 2**30)
    monkeypatch.setattr(walk, "is_image", lambda _: pytest.fail("its first bytes were read"))
    with pytest.raises(UserError, match=r"sparse\.jpg is larger than the bound"):
        walk.read_image(path, MAX_FILE_BYTES, "the bound")


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(read_file, tmp_path / "pipe", 9, "").endswith("pipe is not a regular file")
    assert refusal(read_file, tmp_path, 9, "").endswith("is a folder, not a file")
    assert refusal(read_file, tmp_path / "no", 9, "").endswith("no does not exist")
    assert refusal(read_file, Path("a\0b"), 9, "").startswith(r"a\x00b is not a path")
    assert refusal(read_file, Path("a\udcff\x1b[31m"), 9, "") == r"a\udcff\x1b[31m does not exist"
    # A file of /proc has no size, and an end all the same.
    assert "larger than 3 bytes" in refusal(read_file, Path("/proc/self/maps"), 3, "3 bytes")


# --------------------------------------------------------------------------- names in tables


def test_a_file_is_found_in_the_first_folder_that_has_it(tmp_path: Path) -> None:
    for name in ("a/x.jpg", "b/x.jpg", "b/y.jpg", "b/sub/z.jpg"):
        put(tmp_path / name)
    finder = Finder((tmp_path / "a", tmp_path / "b"))
    assert finder.find("x.jpg") == tmp_path / "a/x.jpg"
    assert finder.find(" y.jpg ") == tmp_path / "b/y.jpg"
    assert finder.find("sub\\z.jpg") == tmp_path / "b/sub/z.jpg"
    assert finder.find("sub") is None
    assert finder.find("\0") is None
    assert finder.find(str(tmp_path / "b/y.jpg")) == tmp_path / "b/y.jpg"


def test_other_spellings_are_found_if_one_file_alone_has_them(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Zürich") for form in ("NFC", "NFD"))
    put(tmp_path / decomposed / f"{decomposed}.JPG")
    put(tmp_path / " blank.jpg")
    finder = Finder((tmp_path,))
    assert finder.find(f"{composed}/{composed}.jpg") == tmp_path / decomposed / f"{decomposed}.JPG"
    assert finder.find("blank.jpg") == tmp_path / " blank.jpg"
    put(tmp_path / "A.jpg", b"A")
    put(tmp_path / "a.JPG", b"a")
    finder = Finder((tmp_path,))
    assert finder.find("A.jpg") == tmp_path / "A.jpg"
    assert finder.find("a.jpg") is None  # either might be meant
