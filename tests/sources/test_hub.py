from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
sys.path.insert(0, str(Path(__file__).parent))
from fake_hub import FakeHub

from streetvision.sources.hub import _is_listed

REPO, REVISION = "natix-network-org/roadwork", "0123456789abcdef0123456789abcdef01234567"
PATTERN = "data/*.parquet"
# In a process of its own: the hub's library reads its environment when it is imported.
SCRIPT = """
import json, sys, time
from streetvision.sources.hub import download_dataset
from streetvision.core.errors import UserError
start = time.monotonic()
try:
    files = download_dataset(sys.argv[1], sys.argv[2], [sys.argv[3]])
    answer = {"files": [str(file) for file in files]}
except UserError as error:
    answer = {"error": str(error)}
print(json.dumps(answer | {"seconds": time.monotonic() - start}))
"""


@pytest.fixture
def hub():
    files = {
        "README.md": b"card",
        "data/train-00000-of-00002.parquet": bytes(range(256)) * 1200,
        "data/train-00001-of-00002.parquet": b"second" * 50_000,
    }
    with FakeHub(REPO, REVISION, files) as server:
        yield server


def download(
    endpoint: str,
    home: Path,
    *,
    offline: bool = False,
    repo: str = REPO,
    revision: str = REVISION,
    pattern: str = PATTERN,
) -> dict:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, repo, revision, pattern],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


def matches(answer: dict, hub: FakeHub) -> bool:
    expected = [data for name, data in sorted(hub.files.items()) if name.startswith("data/")]
    return [Path(file).read_bytes() for file in answer["files"]] == expected


def test_downloads_what_matches_then_needs_no_connection(hub, tmp_path):
    answer = download(hub.endpoint, tmp_path)
    assert matches(answer, hub)
    assert not any("README" in path for _, path, _ in hub.log)
    hub.log.clear()
    assert download(hub.endpoint, tmp_path)["files"] == answer["files"]
    assert hub.log == []  # a pinned revision never changes
    assert download("http://127.0.0.1:9", tmp_path, offline=True)["files"] == answer["files"]


def test_a_broken_connection_goes_on_where_it_broke(hub, tmp_path):
    name = "data/train-00000-of-00002.parquet"
    hub.files[name] = bytes(range(250)) * 48_000
    hub.break_after[name] = 11_000_000  # the library writes in blocks of 10 MiB
    assert matches(download(hub.endpoint, tmp_path), hub)
    ranges = [wanted for method, path, wanted in hub.log if method == "GET" and name in path]
    assert ranges == [None, f"bytes={10 * 2**20}-"]


def test_a_new_run_keeps_finished_files(hub, tmp_path):
    first, second = list(hub.files)[1:]
    answer = download(hub.endpoint, tmp_path, pattern=first)
    assert len(answer["files"]) == 1
    hub.break_after[second] = 1000
    hub.down_after_break = True
    answer = download(hub.endpoint, tmp_path)
    assert "could not be downloaded" in answer["error"]
    assert "what has arrived is kept" in answer["error"]
    offline = download(hub.endpoint, tmp_path, offline=True)
    assert "not complete in the local cache" in offline["error"]
    assert "HF_HUB_OFFLINE" in offline["error"]
    hub.down = False
    hub.log.clear()
    assert matches(download(hub.endpoint, tmp_path), hub)
    assert not any(first in path for _, path, _ in hub.log)


def test_a_truncated_file_in_the_cache_is_not_complete(hub, tmp_path):
    answer = download(hub.endpoint, tmp_path)
    Path(answer["files"][0]).resolve().write_bytes(b"short")
    assert "not complete" in download(hub.endpoint, tmp_path, offline=True)["error"]
    error = download(hub.endpoint, tmp_path)["error"]
    assert "damaged in the local cache: delete" in error
    shutil.rmtree(error.partition(": delete ")[2].removesuffix(" and rerun"))
    assert matches(download(hub.endpoint, tmp_path), hub)


@pytest.mark.parametrize("name", ["data/train-00000-of-00002.parquet", "data/labels.csv"])
def test_a_file_is_what_its_commit_lists(name, hub, tmp_path):
    hub.files["data/labels.csv"] = b"image,label"  # small: no LFS, its hash is Git's
    own = hub.files[name]
    hub.sent[name] = own[:-1] + b"?"  # of the same size
    error = download(hub.endpoint, tmp_path, pattern="data/*")["error"]
    assert "is not what its commit lists, or damaged" in error
    hub.sent.clear()
    shutil.rmtree(error.partition(": delete ")[2].removesuffix(" and rerun"))
    answer = download(hub.endpoint, tmp_path, pattern="data/*")
    assert matches(answer, hub)
    # Nor is one that somebody changes in the cache.
    (path,) = (Path(file) for file in answer["files"] if file.endswith(name))
    path.resolve().write_bytes(own[:-1] + b"?")
    assert (
        "not complete" in download(hub.endpoint, tmp_path, pattern="data/*", offline=True)["error"]
    )


def test_hashes_are_those_of_git(tmp_path):
    """Of a file, and of the pointer that the specification of Git LFS shows."""
    (tmp_path / "file").write_bytes(b"image,label\n")
    command = ["git", "hash-object", "--no-filters"]
    own = subprocess.run(
        [*command, "file"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert _is_listed(tmp_path / "file", 12, own.stdout.strip())
    sha256 = hashlib.sha256(b"image,label\n").hexdigest()
    (tmp_path / "pointer").write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 12\n"
    )
    pointed = subprocess.run(
        [*command, "pointer"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert _is_listed(tmp_path / "file", 12, pointed.stdout.strip())
    assert not _is_listed(tmp_path / "file", 13, pointed.stdout.strip())
    (tmp_path / "file").write_bytes(b"image,lobel\n")
    assert not _is_listed(tmp_path / "file", 12, own.stdout.strip())
    assert not _is_listed(tmp_path / "file", 12, pointed.stdout.strip())


def test_the_hub_answers_for_the_pinned_commit(hub, tmp_path):
    hub.other_commit = "f" * 40
    error = download(hub.endpoint, tmp_path)["error"]
    assert "the hub answers for another commit" in error
    assert "f" * 40 in error
    assert not any(method == "GET" and "/resolve/" in path for method, path, _ in hub.log)


def test_unreachable_without_cache_fails_fast(tmp_path):
    answer = download("http://127.0.0.1:9", tmp_path)
    assert "check the connection" in answer["error"]
    assert "\n" not in answer["error"]
    assert answer["seconds"] < 8
    start = time.monotonic()
    assert (
        "HF_HUB_OFFLINE is set" in download("http://127.0.0.1:9", tmp_path, offline=True)["error"]
    )
    assert time.monotonic() - start < 8


def test_what_does_not_exist_is_named(hub, tmp_path):
    assert "check repo_id" in download(hub.endpoint, tmp_path, repo="nobody/nothing")["error"]
    assert "no such revision" in download(hub.endpoint, tmp_path, revision="f" * 40)["error"]
    error = download(hub.endpoint, tmp_path, pattern="*.arrow")["error"]
    assert "no files like *.arrow" in error
    assert "data/train-00000-of-00002.parquet" in error


def test_the_extra_is_named_when_missing(tmp_path, monkeypatch):
    from streetvision.core.errors import UserError
    from streetvision.sources.hub import download_dataset

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install streetvision\[hub\]"):
        download_dataset(REPO, REVISION, [PATTERN], tmp_path)
