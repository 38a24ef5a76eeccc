"""The files below a folder, and what is in them: the one walker and the one reader of what users hand in.

Folders of users hold more than their data: copies that tools leave, links in a circle, pipes, files of
terabytes, links to any file at all. What is walked is each real folder once; what is read is a regular file
of bounded size; what is kept of it as an image are the bytes of an image.
"""

# Paths are strings here: a large folder is walked in a fifth of the time that path objects take.
# ruff: noqa: PTH113, PTH114, PTH116, PTH118, PTH122, PTH208

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped
from streetvision.data.pixels import MAX_FILE_BYTES, is_image

TOO_LARGE = f"the {MAX_FILE_BYTES >> 20} MiB that an image file may be"
# What stands for the content of a file that is no image: nobody's other files come into the data.
NOT_AN_IMAGE = b"not an image"
READ_FORMATS = "JPEG, PNG, WebP, BMP and TIFF"
# Files that are called so are images until they are read; others are looked into.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".jpe", ".jfif", ".pjpeg", ".pjp", ".jif",
)  # fmt: skip
# What tools leave beside people's files, in lower case. Names that begin with a dot are left out, too:
# .ipynb_checkpoints, .thumbnails, .DS_Store, ._x.jpg (what macOS leaves beside x.jpg), .git, .cache.
_LEFT_BY_TOOLS = frozenset(
    {
        "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot",  # network storage
        "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini",  # Windows
        "__macosx", "lost+found", "__pycache__",
    }
)  # fmt: skip
_HEAD_BYTES = 32
_SHOWN_SUFFIX = 12


# --------------------------------------------------------------------------- which files there are


@dataclass(frozen=True)
class Walk:
    """What lies below a folder.

    Attributes
    ----------
    files : paths of regular files relative to the folder, as they are reached, `/` between names; sorted
    left_out : what is no file that can be read → how many
    """

    files: list[str]
    left_out: Counter[str]


def is_left_by_tools(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or nothing that a person put there."""
    return name.startswith(".") or name.lower() in _LEFT_BY_TOOLS


def sub_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, links to folders among them; sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not is_left_by_tools(e.name) and e.is_dir())
    except OSError as error:
        raise _unreadable(escaped(folder), error) from error


def walk_files(root: Path, below: Sequence[str] = ("",)) -> Walk:
    """Find all regular files below a folder, or below some of its sub-folders.

    Links are followed. Each real folder is walked once: where it really is, if that is below `root`, else
    where the first link in order of depth and name leads to it. Below each of `below` it is once: a folder
    elsewhere that is linked under two of them is found under both. Links to `root` or to a folder above it
    are not followed. So circles end, and what is in one of `below` cannot appear in another by a link.

    Parameters
    ----------
    root
        The folder.
    below
        Names of its sub-folders.

    Raises
    ------
    UserError
        `root` cannot be read.
    """
    try:
        real = root.resolve(strict=True)
        os.scandir(real).close()
        above = {_identity(os.stat(folder)) for folder in real.parents}
        if tuple(below) != ("",):
            above.add(_identity(os.stat(real)))
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle; a NUL
        raise _unreadable(escaped(root), error) from error
    walker = _Walker(str(root))
    found: list[list[_Link]] = []
    for start in below:
        if start and os.path.islink(walker.full(start)):
            found.append([_Link(start, _identity(os.stat(walker.full(start))))])
        else:
            found.append(walker.walk(start, above))
    above |= walker.seen  # only now are all real places known
    for links in found:
        walker.seen = set()
        following = links
        while following:
            at_hand = sorted(following, key=lambda each: (each.path.count("/"), each.path))
            following = []
            for link in at_hand:
                if link.target in above or link.target in walker.seen:
                    walker.left_out["links to folders that are read elsewhere or lie above"] += 1
                else:
                    following += walker.walk(link.path, above)
    walker.files.sort()
    return Walk(walker.files, walker.left_out)


class _Link(NamedTuple):
    """A link to a folder: where it stands, and the folder that it leads to."""

    path: str
    target: tuple[int, int]


class _Walker:
    """Walks trees of real folders, those that are not seen yet."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.seen: set[tuple[int, int]] = set()
        self.files: list[str] = []
        self.left_out: Counter[str] = Counter()

    def full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def walk(self, start: str, not_again: AbstractSet[tuple[int, int]]) -> list[_Link]:
        """Collect the files from `start` on; returns the links to folders, which are not followed."""
        links: list[_Link] = []
        todo = [start]
        while todo:
            inside = todo.pop()
            try:
                own = _identity(os.stat(self.full(inside)))
                if own in self.seen or own in not_again:
                    continue
                self.seen.add(own)
                with os.scandir(self.full(inside)) as entries:
                    self._sort_out(inside, entries, todo, links)
            except OSError:
                self.left_out["folders that cannot be read"] += 1
        return links

    def _sort_out(
        self, inside: str, entries: Iterable[os.DirEntry[str]], todo: list[str], links: list[_Link]
    ) -> None:
        for entry in entries:
            name = entry.name
            if is_left_by_tools(name):
                continue
            path = f"{inside}/{name}" if inside else name
            # What the folder itself tells takes no look at the file.
            if entry.is_file(follow_symlinks=False):
                self.files.append(path)
            elif entry.is_dir(follow_symlinks=False):
                todo.append(path)
            elif not entry.is_symlink():
                self.left_out["pipes, sockets or devices"] += 1
            else:
                self._follow(path, links)

    def _follow(self, path: str, links: list[_Link]) -> None:
        try:
            target = os.stat(self.full(path))
        except OSError:
            self.left_out["links that lead nowhere"] += 1
            return
        if stat.S_ISDIR(target.st_mode):
            links.append(_Link(path, _identity(target)))
        elif stat.S_ISREG(target.st_mode):
            self.files.append(path)
        else:
            self.left_out["pipes, sockets or devices"] += 1


def _identity(found: os.stat_result) -> tuple[int, int]:
    """Device and number: the same for all names of one file or folder."""
    return found.st_dev, found.st_ino


# --------------------------------------------------------------------------- which of them are images


def image_files(root: Path, below: Sequence[str] = ("",)) -> Walk:
    """The same, of images alone: files that are called so, and those whose content is one.

    Others are counted by what they are: by the format of an image that is not read, else by suffix.
    """
    walk = walk_files(root, below)
    images: list[str] = []
    left_out = walk.left_out.copy()
    for path in walk.files:
        if path.lower().endswith(IMAGE_SUFFIXES):
            images.append(path)
            continue
        try:
            with _opened(root / path) as (file, _):
                head = file.read(_HEAD_BYTES)
        except OSError:
            left_out["files that cannot be read"] += 1
            continue
        if is_image(head):
            images.append(path)
        else:
            left_out[unread_format(head) or _suffix(path)] += 1
    return Walk(images, left_out)


def names_at_top(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Names in a folder itself that end in one of these, in lower case; sorted."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise _unreadable(escaped(folder), error) from error
    return [
        name for name in names if name.lower().endswith(suffixes) and not is_left_by_tools(name)
    ]


def unread_format(head: bytes) -> str | None:
    """Name of an image format that is not read, by a file's first bytes; None if it is no such file."""
    return next((name for name, start, mark in _MARKS if head.startswith(mark, start)), None)


# Name, where, and what is there.
_MARKS = (
    ("GIF", 0, b"GIF8"),
    ("AVIF", 4, b"ftypavi"),
    ("HEIC", 4, b"ftyphe"),
    ("HEIC", 4, b"ftypmif1"),
    ("HEIC", 4, b"ftypmsf1"),
    ("JPEG 2000", 4, b"jP  \r\n"),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 4, b"JXL \r\n"),
)


def left_out_line(place: str, left_out: Counter[str]) -> str:
    """One line that says what is not read, and how many of each."""
    listed = ", ".join(f"{number} {what}" for what, number in sorted(left_out.items()))
    return f"{place}: left out: {listed}; {READ_FORMATS} are read"


def _suffix(path: str) -> str:
    """What a file that is no image is called in a count."""
    suffix = os.path.splitext(path)[1].lower()
    return escaped(suffix) if 1 < len(suffix) <= _SHOWN_SUFFIX else "other files"


# --------------------------------------------------------------------------- what is in a file


def read_file(path: Path, limit: int, what: str, name: str = "") -> bytes:
    """Read a regular file of at most `limit` bytes; what is neither is not read at all.

    Parameters
    ----------
    path
        The file; links are followed.
    limit
        Bytes.
    what
        What a larger file is larger than, for the error: "a table may be".
    name
        What errors call the file; its path by default.

    Raises
    ------
    UserError
        There is no such file, it is no regular one, it cannot be read, or it is larger.
    """
    return _read(path, limit, what, name or escaped(path), only_images=False)


def read_image(path: Path, limit: int, what: str, name: str = "") -> bytes:
    """The same of an image; of a file that is none the first bytes are read, and `NOT_AN_IMAGE` returned."""
    return _read(path, limit, what, name or escaped(path), only_images=True)


def _read(path: Path, limit: int, what: str, name: str, *, only_images: bool) -> bytes:
    try:
        with _opened(path) as (file, size):
            if size > limit:
                raise UserError(f"{name} is larger than {what}")
            head = file.read(_HEAD_BYTES)
            if only_images and head and not is_image(head):
                return NOT_AN_IMAGE
            data = head + file.read(limit + 1 - len(head))
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error
    if len(data) > limit:  # it has grown, or is one of those that have no size
        raise UserError(f"{name} is larger than {what}")
    return data


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file; yields it and its size. A pipe is not waited for, a device not touched."""
    _check_regular(os.stat(path))
    # Between the two it may have become a pipe: to open one for reading without waiting always succeeds.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(handle, "rb", buffering=0) as file:  # noqa: PTH123
        found = os.fstat(handle)
        _check_regular(found)
        yield file, found.st_size


class _NotRegularError(OSError):
    """What is there is a folder, a pipe, a socket or a device."""


def _check_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise _NotRegularError(errno.EISDIR, "is a folder, not a file")
    if not stat.S_ISREG(found.st_mode):
        raise _NotRegularError(errno.EINVAL, "is not a regular file")


def _unreadable(name: str, error: Exception) -> UserError:
    if isinstance(error, _NotRegularError):
        return UserError(f"{name} {error.strerror}")
    if isinstance(error, FileNotFoundError):
        return UserError(f"{name} does not exist")
    if isinstance(error, OSError):
        return UserError(f"{name} cannot be read: {error.strerror or error}")
    return UserError(f"{name} is not a path: {error}")  # a NUL in it; links in a circle


# --------------------------------------------------------------------------- files that a table names


class Finder:
    r"""Finds files by the names that a table has for them, below the first of several folders that has one.

    A name is taken as it is; else without blanks around it, and with `/` for the `\` of Windows; else in
    another spelling, if one file alone has it: composed or decomposed letters (é of a Mac is two signs),
    small or capital ones.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [str(folder) for folder in dict.fromkeys(folders)]
        self._listings: dict[str, dict[str, list[str]]] = {}

    def find(self, name: str) -> Path | None:
        """The regular file of this name, or None."""
        if "\0" in name:
            return None
        names = dict.fromkeys((name, name.strip(), name.strip().replace("\\", "/")))
        for folder in self.folders:
            for spelling in names:
                path = os.path.join(folder, spelling)  # an absolute one stays as it is
                if os.path.isfile(path):
                    return Path(path)
        for folder in self.folders:
            found = self._spelled_otherwise(folder, name.strip().replace("\\", "/"))
            if found is not None:
                return Path(found)
        return None

    def _spelled_otherwise(self, folder: str, name: str) -> str | None:
        path = "" if name.startswith("/") else folder
        for part in name.split("/"):
            if part in {"", "."}:
                continue
            if not os.path.lexists(f"{path}/{part}"):
                alike = self._listing(path).get(_folded(part), [])
                if len(alike) != 1:
                    return None
                path = f"{path}/{alike[0]}"
            else:
                path = f"{path}/{part}"
        return path if os.path.isfile(path) else None

    def _listing(self, folder: str) -> dict[str, list[str]]:
        """Names in a folder by their folded spelling."""
        if folder not in self._listings:
            found: dict[str, list[str]] = {}
            try:
                for name in os.listdir(folder):
                    found.setdefault(_folded(name), []).append(name)
            except OSError:
                pass  # nothing is found there
            self._listings[folder] = found
        return self._listings[folder]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).lower()).strip()
