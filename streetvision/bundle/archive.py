"""`bundle.tar.gz` unpacked without trusting it.

The 512-byte headers are read one by one: a member is a plain file that `bundle.json`, the first of them,
names, or the archive is refused. Links, devices, folders, sparse files and extended headers have no way in.
"""

from __future__ import annotations

import gzip
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streetvision.bundle.limits import (
    MAX_FILE_BYTES,
    MAX_JSON_BYTES,
    MAX_RATIO,
    MAX_RATIO_EXTRA_BYTES,
)
from streetvision.bundle.validate import BUNDLE_JSON, parse_manifest
from streetvision.core.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2**20


@contextmanager
def bundle_folder(bundle: Path) -> Iterator[Path]:
    """Yield a bundle's folder; that of an archive is a temporary one, deleted afterwards.

    Raises
    ------
    UserError
        Not a safe archive; errors raised meanwhile name the archive instead of the temporary folder.
    """
    if not bundle.is_file():
        yield bundle
        return
    with tempfile.TemporaryDirectory(prefix="streetvision-") as name:
        try:
            unpack(bundle, Path(name))
            yield Path(name)
        except UserError as error:
            raise UserError(str(error).replace(name, str(bundle))) from error


def unpack(archive: Path, target: Path) -> None:
    """Unpack a `bundle.tar.gz` into the empty folder `target`.

    Raises
    ------
    UserError
        Not a tar.gz, cut off, holds anything but the files that its `bundle.json` names, or unpacks to
        more than 20 times its size and 64 MiB.
    """
    limit = MAX_RATIO * archive.stat().st_size + MAX_RATIO_EXTRA_BYTES
    try:
        with gzip.open(archive) as stream:
            _unpack(_Reader(stream, limit, archive), archive, target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is not a whole tar.gz: {error}") from error


def _unpack(reader: _Reader, archive: Path, target: Path) -> None:
    name, size = _header(reader, archive) or ("", 0)
    if name != BUNDLE_JSON:
        raise UserError(f"{archive}: the first file must be {BUNDLE_JSON}, as `export` writes it")
    if size > MAX_JSON_BYTES:
        raise UserError(f"{archive}: {BUNDLE_JSON} is larger than {MAX_JSON_BYTES:,} bytes")
    data = reader.read(size)
    wanted = set(parse_manifest(data, archive)["files"])
    (target / name).write_bytes(data)
    reader.read(-size % _BLOCK)
    while (header := _header(reader, archive)) is not None:
        name, size = header
        if name not in wanted:
            raise UserError(
                f'{archive}: {BUNDLE_JSON} names no file "{name}", or it is there twice'
            )
        if size > MAX_FILE_BYTES:
            raise UserError(f'{archive}: "{name}" is larger than {MAX_FILE_BYTES:,} bytes')
        wanted.remove(name)
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for start in range(0, size, _CHUNK):
                file.write(reader.read(min(_CHUNK, size - start)))
        reader.read(-size % _BLOCK)


def _header(reader: _Reader, archive: Path) -> tuple[str, int] | None:
    """Name and size of the next member, which is a plain file; None at the end."""
    block = reader.read(_BLOCK)
    if not any(block):
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise UserError(f"{archive} is damaged: {error}") from error
    if info.type not in {tarfile.REGTYPE, tarfile.AREGTYPE} or info.size < 0:
        raise UserError(f'{archive}: "{info.name}" is not a plain file')
    return info.name, info.size


class _Reader:
    """Reads exactly so many bytes, and no more than `limit` in all."""

    def __init__(self, stream: gzip.GzipFile, limit: int, archive: Path) -> None:
        self.stream = stream
        self.left = limit
        self.archive = archive

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise UserError(f"{self.archive} unpacks to far more than weights do")
        data = self.stream.read(size)
        if len(data) < size:
            raise UserError(f"{self.archive} is cut off")
        return data
