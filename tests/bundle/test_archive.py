"""`bundle.tar.gz`: the bundle, or a refusal that leaves nothing behind."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from streetvision.bundle import archive
from streetvision.bundle.archive import unpack
from streetvision.bundle.limits import MAX_FILE_BYTES, MAX_JSON_BYTES
from streetvision.bundle.predictor import Predictor
from streetvision.bundle.validate import BUNDLE_JSON, BundleValidator
from streetvision.core.errors import UserError

if TYPE_CHECKING:
    from tests.conftest import Trained

Member = tuple[tarfile.TarInfo, bytes]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own for temporary files, which must be empty at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def plain_tar(trained: Trained) -> bytes:
    return gzip.decompress((trained.bundle / "bundle.tar.gz").read_bytes())


def members(trained: Trained) -> list[Member]:
    with tarfile.open(trained.bundle / "bundle.tar.gz") as tar:
        return [(info, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]


def write(path: Path, contents: list[Member], *, tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w:gz", format=tar_format) as tar:
        for info, data in contents:
            tar.addfile(info, io.BytesIO(data))
    return path


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def refusal(path: Path) -> str:
    """The error, after which nothing lies where it could have been written."""
    before = sorted(each.name for each in path.parent.iterdir())
    with pytest.raises(UserError) as caught:
        Predictor.load(path, "cpu")
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert sorted(each.name for each in path.parent.iterdir()) == before
    return text


def test_an_archive_is_its_folder(trained: Trained, temporary: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    path = trained.bundle / "bundle.tar.gz"
    BundleValidator().validate(path)
    assert Predictor.load(str(path), "cpu")(image) == Predictor.load(trained.bundle, "cpu")(image)
    assert not list(temporary.iterdir())


@pytest.mark.usefixtures("temporary")
@pytest.mark.parametrize(
    ("name", "kind", "link", "message"),
    [
        ("../outside", tarfile.REGTYPE, "", 'names no file "../outside"'),
        ("/tmp/outside", tarfile.REGTYPE, "", 'names no file "/tmp/outside"'),
        ("sub/../../outside", tarfile.REGTYPE, "", "names no file"),
        ("./model.pth", tarfile.REGTYPE, "", "names no file"),
        ("unasked.txt", tarfile.REGTYPE, "", 'names no file "unasked.txt"'),
        (BUNDLE_JSON, tarfile.REGTYPE, "", "or it is there twice"),
        ("model.pth", tarfile.SYMTYPE, "/etc/passwd", '"model.pth" is not a plain file'),
        ("model.pth", tarfile.LNKTYPE, "../outside", '"model.pth" is not a plain file'),
        ("model.pth", tarfile.CHRTYPE, "", "is not a plain file"),
        ("model.pth", tarfile.BLKTYPE, "", "is not a plain file"),
        ("model.pth", tarfile.FIFOTYPE, "", "is not a plain file"),
        ("model.pth", tarfile.DIRTYPE, "", "is not a plain file"),
        ("model.pth", tarfile.CONTTYPE, "", "is not a plain file"),
        ("model.pth", tarfile.GNUTYPE_SPARSE, "", "is not a plain file"),
        ("model.pth", tarfile.GNUTYPE_LONGNAME, "", "is not a plain file"),
        ("model.pth", tarfile.XHDTYPE, "", "is not a plain file"),
        ("model.pth", b"Z", "", "is not a plain file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", [1, -1])
def test_what_is_no_plain_file_of_the_bundle_is_refused(
    name: str, kind: bytes, link: str, message: str, where: int, trained: Trained, tmp_path: Path
) -> None:
    contents = members(trained)
    contents.insert(where % (len(contents) + 1), member(name, b"", kind, link))
    assert message in refusal(write(tmp_path / "b.tar.gz", contents))


@pytest.mark.usefixtures("temporary")
def test_extended_headers_are_refused(trained: Trained, tmp_path: Path) -> None:
    contents = members(trained)
    contents[1][0].pax_headers = {"path": "../outside"}
    path = write(tmp_path / "b.tar.gz", contents, tar_format=tarfile.PAX_FORMAT)
    assert "is not a plain file" in refusal(path)


@pytest.mark.usefixtures("temporary")
def test_an_archive_by_hand(trained: Trained, tmp_path: Path) -> None:
    contents = members(trained)
    shuffled = write(tmp_path / "shuffled.tar.gz", contents[::-1])
    assert "the first file must be bundle.json, as `export` writes it" in refusal(shuffled)
    folder = write(tmp_path / "folder.tar.gz", [(member("bundle", b"", tarfile.DIRTYPE))])
    assert "is not a plain file" in refusal(folder)
    assert "the first file must be bundle.json" in refusal(write(tmp_path / "no.tar.gz", []))
    assert "file scrc_params.json is missing" in refusal(
        write(tmp_path / "part.tar.gz", [m for m in contents if m[0].name != "scrc_params.json"])
    )
    contents[2] = member("model.safetensors", contents[2][1][:-1] + b"x")
    assert "model.safetensors was changed after export" in refusal(
        write(tmp_path / "changed.tar.gz", contents)
    )


@pytest.mark.usefixtures("temporary")
def test_other_files_are_refused(trained: Trained, tmp_path: Path) -> None:
    for name, data in {
        "bundle.zip": b"PK\x03\x04",
        "bundle.tar": gzip.decompress((trained.bundle / "bundle.tar.gz").read_bytes()),
        "empty.tar.gz": b"",
        "text.tar.gz": gzip.compress(b"nothing"),
        "zeros.tar.gz": gzip.compress(bytes(10**6)),
    }.items():
        (tmp_path / name).write_bytes(data)
        refusal(tmp_path / name)
    assert "is missing; the stage `export` makes it" in refusal_of_a_path(
        tmp_path / "nowhere.tar.gz"
    )


def refusal_of_a_path(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        Predictor.load(path, "cpu")
    return str(caught.value)


@pytest.mark.usefixtures("temporary")
def test_bombs_are_stopped(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MAX_RATIO_EXTRA_BYTES", 2**20)
    contents = members(trained)
    contents[1] = member("model.pth", bytes(200 * 2**20))
    path = write(tmp_path / "zeros.tar.gz", contents)
    assert path.stat().st_size < 2**20
    written: list[int] = []
    monkeypatch.setattr(archive._Reader, "read", counted(archive._Reader.read, written))
    assert "unpacks to far more than weights do" in refusal(path)
    assert sum(written) < 20 * path.stat().st_size + 2**20
    # A size that is only said.
    info, _ = member("model.pth")
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(contents[0][0], io.BytesIO(contents[0][1]))
    whole = raw.getvalue()[: 512 + (len(contents[0][1]) + 511) // 512 * 512]
    for size, said in (
        (MAX_FILE_BYTES, "is cut off"),
        (MAX_FILE_BYTES + 1, '"model.pth" is larger'),
    ):
        info.size = size
        (tmp_path / "said.tar.gz").write_bytes(gzip.compress(whole + info.tobuf()))
        assert said in refusal(tmp_path / "said.tar.gz")


@pytest.mark.usefixtures("temporary")
def test_a_bundle_json_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "large.tar.gz", [member(BUNDLE_JSON, b" " * (MAX_JSON_BYTES + 1))])
    read: list[int] = []
    monkeypatch.setattr(archive._Reader, "read", counted(archive._Reader.read, read))
    assert f"bundle.json is larger than {MAX_JSON_BYTES:,} bytes" in refusal(path)
    assert sum(read) == 512, "no more than its header"
    just = write(tmp_path / "just.tar.gz", [member(BUNDLE_JSON, b" " * MAX_JSON_BYTES)])
    assert "is not valid JSON" in refusal(just)


def counted(read, written: list[int]):  # type: ignore[no-untyped-def]
    def counting(self: archive._Reader, size: int) -> bytes:
        data: bytes = read(self, size)
        written.append(len(data))
        return data

    return counting


@pytest.mark.usefixtures("temporary")
def test_a_truncated_archive_is_refused_wherever_it_ends(trained: Trained, tmp_path: Path) -> None:
    data = (trained.bundle / "bundle.tar.gz").read_bytes()
    for length in [*range(0, 40, 3), *range(100, len(data) - 10, len(data) // 25)]:
        (tmp_path / "b.tar.gz").write_bytes(data[:length])
        refusal(tmp_path / "b.tar.gz")


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 10**9), st.integers(0, 511), st.integers(0, 255)),
        min_size=1, max_size=6,
    ),
    mend=st.booleans(),
)  # fmt: skip
def test_a_damaged_archive_writes_nothing_but_named_files(
    changes: list[tuple[int, int, int]], mend: bool, plain_tar: bytes, tmp_path: Path
) -> None:
    data = bytearray(plain_tar)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = {info.offset: info.name for info in tar.getmembers()}
    starts = list(headers)
    for which, place, value in changes:
        data[starts[which % len(starts)] + place] = value
    if mend:  # with checksums that are right, the content of the headers is what is refused
        for start in starts:
            data[start + 148 : start + 156] = b" " * 8
            total = sum(data[start : start + 512])
            data[start + 148 : start + 156] = b"%06o\0 " % total
    path = tmp_path / "b.tar.gz"
    path.write_bytes(gzip.compress(bytes(data), 0))
    with tempfile.TemporaryDirectory(dir=tmp_path) as home:
        target = Path(home) / "deep" / "target"
        target.mkdir(parents=True)
        said = ""
        try:
            unpack(path, target)
        except UserError as error:
            said = str(error)
        assert "\n" not in said
        names = {each.relative_to(home).as_posix() for each in Path(home).rglob("*")}
        assert names <= {
            "deep", "deep/target", *(f"deep/target/{name}" for name in headers.values())
        }  # fmt: skip
        assert not any(each.is_symlink() for each in target.iterdir())
