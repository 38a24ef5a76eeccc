"""Data sets of the Hugging Face hub at a pinned revision.

A revision is a commit hash and never changes, so a complete copy in the cache is used without any
request. What was downloaded is kept: a broken connection goes on where it broke, a new run with the
next file. The hub (or whatever HF_ENDPOINT names) is held to what it says: it must answer for the pinned
commit, and each file, from the cache, too, must have the hash that the commit lists.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from streetvision.core.artifacts import sha256_file
from streetvision.core.errors import UserError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
UNPINNED = "unpinned"
MISSING_EXTRA = "hub sources need huggingface_hub: pip install streetvision[hub]"


def download_dataset(
    repo_id: str, revision: str, patterns: Sequence[str], cache_dir: Path | None = None
) -> list[Path]:
    """Return the local files of a data set that match `patterns`, in order of their names.

    Parameters
    ----------
    repo_id : owner/name
    revision : commit hash, 40 hexadecimal digits
    patterns : shell patterns of file names, `data/*.parquet`
    cache_dir : the hub's cache by default (`HF_HOME`)

    Raises
    ------
    UserError
        `huggingface_hub` is not installed; data set, revision or files do not exist; no access; no
        connection (or `HF_HUB_OFFLINE`) while the cache is incomplete.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise UserError(MISSING_EXTRA) from error
    if revision == UNPINNED:
        raise UserError(
            f"params.yaml: data.sources: the revision of {repo_id} is not pinned; "
            f"`python -m streetvision pin {repo_id}` prints the newest commit"
        )
    files = _cached_files(repo_id, revision, patterns, cache_dir)
    if files is not None:
        return files
    place = f"hub data set {repo_id} at {revision[:12]}"
    snapshot = _snapshot(repo_id, revision, patterns, cache_dir, place)
    files = _cached_files(repo_id, revision, patterns, cache_dir)
    if files is None:
        # The library takes any file it finds in its cache for whole.
        folder = Path(snapshot).parents[1]
        raise UserError(
            f"{place} is not what its commit lists, or damaged in the local cache: delete {folder} and rerun"
        )
    return files


def _snapshot(
    repo_id: str, revision: str, patterns: Sequence[str], cache_dir: Path | None, place: str
) -> str:
    """Download what is missing of a commit; return its folder in the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # Fails at once where there is no connection; the download itself would retry for minutes.
        answered = HfApi().dataset_info(repo_id, revision=revision, timeout=CONNECT_SECONDS).sha
        if answered != revision:
            raise UserError(
                f"{place}: the hub answers for another commit ({str(answered)[:40]!r}); nothing was downloaded"
            )
        logger.info("downloading %s", place)
        return snapshot_download(
            repo_id,
            repo_type="dataset",
            revision=revision,
            allow_patterns=list(patterns),
            cache_dir=cache_dir,
        )
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(
            f"{place} is gated: accept its terms on the hub, then set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{place} does not exist or is private: check repo_id, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{place}: there is no such revision (a commit hash)") from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{place} is not complete in the local cache and HF_HUB_OFFLINE is set: unset it and "
            "rerun, or copy the cache from a machine that has it (HF_HOME)"
        ) from error
    # Its transport errors share no public base class across the library's versions.
    except Exception as error:
        raise UserError(
            f"{place} is not complete in the local cache and could not be downloaded "
            f"({_first_line(error)}): "
            "check the connection and rerun, what has arrived is kept; or copy the cache from a "
            "machine that has it (HF_HOME)"
        ) from error


def _cached_files(
    repo_id: str, revision: str, patterns: Sequence[str], cache_dir: Path | None
) -> list[Path] | None:
    """Return the matching files if the cache has all of them, with their hashes, without any request."""
    from huggingface_hub import get_cached_repo_tree, try_to_load_from_cache
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(
            repo_id, repo_type="dataset", revision=revision, cache_dir=cache_dir
        )
    except CachedRepoTreeNotFoundError:
        return None
    entries = {entry.path: entry for entry in tree}
    wanted = sorted(name for name in entries if any(fnmatch(name, like) for like in patterns))
    if not wanted:
        raise UserError(
            f"hub data set {repo_id} has no files like {' or '.join(patterns)}; "
            f"it has {', '.join(sorted(entries)[:10]) or 'none'}"
        )
    files = []
    for name in wanted:
        path = try_to_load_from_cache(
            repo_id, name, cache_dir=cache_dir, revision=revision, repo_type="dataset"
        )
        if not isinstance(path, str) or not _is_listed(
            Path(path), entries[name].size, entries[name].blob_id
        ):
            return None
        files.append(Path(path))
    return files


def _is_listed(path: Path, size: int, blob: str) -> bool:
    """Whether a file has a size and is a Git blob: the file itself or, of a large one, its LFS pointer.

    The pointer is the file's SHA-256 and size in a fixed form, so that its hash is one of the file:
    https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    """
    if path.stat().st_size != size:
        return False
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256_file(path)}\nsize {size}\n"
    )
    return blob == _git_blob([pointer.encode()], len(pointer)) or blob == _git_blob(
        _blocks(path), size
    )


def _git_blob(blocks: Iterable[bytes], size: int) -> str:
    """Git's hash of content: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(2**20):
            yield block


def latest_revision(repo_id: str) -> str:
    """Return the newest commit hash of a data set, to be written into `data.sources`.

    Raises
    ------
    UserError
        `huggingface_hub` is not installed, or the hub or the data set cannot be reached.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(MISSING_EXTRA) from error
    try:
        revision = str(HfApi().dataset_info(repo_id, timeout=CONNECT_SECONDS).sha)
    except Exception as error:
        raise UserError(
            f"hub data set {repo_id} cannot be reached: {_first_line(error)}"
        ) from error
    if not re.fullmatch("[0-9a-f]{40}", revision):
        raise UserError(f"hub data set {repo_id}: the hub names no commit")
    return revision


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
