"""A bundle on the Hugging Face hub: the subnet's `model_card.json`, the hub's model card, one commit of all.

Nothing is published before the licences of backbone and data are named. The card's results are those that
`evaluate` and `challenge` measured of this very bundle, by the SHA-256 in their manifests.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streetvision.bundle.archive import bundle_folder
from streetvision.bundle.cards import Facts, hub_card
from streetvision.bundle.publishable import FOLDED_FILES, check_fold, check_publishable
from streetvision.bundle.validate import BUNDLE_JSON, BundleValidator, load_bundle, read_bundle
from streetvision.core.artifacts import (
    ArtifactSchema,
    read_json,
    sha256_file,
    write_bytes_atomic,
    write_json_atomic,
)
from streetvision.core.errors import UserError
from streetvision.sources.hub import CONNECT_SECONDS

MODEL_CARD, HUB_CARD = "model_card.json", "README.md"
# Where the bundle lies in a repository whose root is the folded model.
BUNDLE_FOLDER = "bundle"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)", re.ASCII)
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
# Of substrate's generic addresses, which Bittensor's are.
_ADDRESS_TYPE = 42


@dataclass(frozen=True)
class Submission:
    """What the publisher says; UserError if a field is unusable.

    Attributes
    ----------
    name, description: of the model
    version: X.Y.Z
    hotkey: the miner's address (SS58)
    time: of the submission, Unix seconds
    backbone_licence, data_licence: as the publisher acknowledges them; empty ones are not acknowledged
    """

    name: str
    description: str
    version: str
    hotkey: str
    time: int
    backbone_licence: str = ""
    data_licence: str = ""

    def __post_init__(self) -> None:
        if not _VERSION.fullmatch(self.version):
            raise UserError(f'version "{self.version}" is not X.Y.Z, such as 1.0.0')
        for name in ("name", "description"):
            if not getattr(self, name).strip():
                raise UserError(f"the {name} is empty")
        check_hotkey(self.hotkey)

    def model_card(self) -> dict[str, Any]:
        """Content of the subnet's `model_card.json`."""
        return {
            "model_name": self.name,
            "description": self.description,
            "version": self.version,
            "submitted_by": self.hotkey,
            "submission_time": self.time,
        }


def check_hotkey(address: str) -> str:
    """Return an SS58 address; UserError if it is none (a digit is wrong, another network, no address).

    SS58 is base 58 of a type byte, 32 bytes of key and two of BLAKE2b over `SS58PRE` and these:
    https://docs.polkadot.com/reference/parachains/accounts/#address-formats
    """
    number = 0
    for letter in address:
        digit = _BASE58.find(letter)
        if digit < 0:
            raise UserError(f'hotkey "{address}" is no SS58 address: "{letter}" cannot be in one')
        number = number * 58 + digit
    # The first byte is 42, so none before it is lost.
    data = number.to_bytes((number.bit_length() + 7) // 8, "big")
    digest = hashlib.blake2b(b"SS58PRE" + data[:-2], digest_size=64).digest()
    if len(data) != 35 or data[0] != _ADDRESS_TYPE or data[-2:] != digest[:2]:
        raise UserError(
            f'hotkey "{address}" is no SS58 address of Bittensor (48 characters from 5): its check sum '
            "or length is wrong; `btcli wallet list` shows it"
        )
    return address


@contextmanager
def publication(
    bundle: Path,
    submission: Submission,
    project: ArtifactSchema,
    output: Path,
    folded: Path | None = None,
) -> Iterator[dict[str, Path]]:
    """Write the two cards into `output`; yield every file to publish by its path in the repository.

    Parameters
    ----------
    bundle
        A bundle folder or `bundle.tar.gz`; unpacked for as long as the context lasts.
    submission
        With the licences.
    project
        Whose metrics are those of the bundle.
    output
        Folder of `model_card.json` and `README.md`.
    folded
        What `fold` made of this bundle: it becomes the root of the repository, where transformers and
        the subnet's stock detector look, and the bundle goes into the folder `bundle`.

    Raises
    ------
    UserError
        The bundle is not whole, or holds a file that is not published (`publishable`); a licence is not
        named; the metrics are missing or of another bundle; so is `folded`.
    """
    with _copies(bundle, folded) as (folder, model):
        BundleValidator().validate(folder)
        parts = load_bundle(folder)
        document = parts.document
        check_publishable(folder, document)
        licence = _recorded_licence(document["classifier"]["backbone"])
        facts = Facts(
            document,
            evaluation=_measured(project, "evaluate", "evaluation", folder),
            challenge=_measured(project, "challenge", "challenge", folder),
            data=read_json(project.metric("data"), "prepare"),
            recorded_licence=licence,
            fold=None if model is None else check_fold(model, parts),
        )
        _check_licences(submission, facts)
        if facts.evaluation is None:
            raise UserError(
                f"{project.metric('evaluation')} is missing or not of this bundle: its card has no results; "
                "run `dvc repro evaluate`"
            )
        write_json_atomic(output / MODEL_CARD, submission.model_card())
        text = hub_card(submission, facts)
        write_bytes_atomic(output / HUB_CARD, text.encode())
        place = "" if folded is None else f"{BUNDLE_FOLDER}/"
        files = {f"{place}{name}": folder / name for name in (BUNDLE_JSON, *document["files"])}
        if model is not None and facts.fold is not None:
            from streetvision.bundle.folded import RECORD

            files |= {name: model / name for name in (RECORD, *facts.fold["files"])}
        yield files | {name: output / name for name in (MODEL_CARD, HUB_CARD)}


@contextmanager
def _copies(bundle: Path, folded: Path | None) -> Iterator[tuple[Path, Path | None]]:
    """Copies of the bundle and of the folded model that nobody else writes to: what is checked is published.

    Errors raised meanwhile name the originals.
    """
    with (
        tempfile.TemporaryDirectory(prefix="streetvision-") as home,
        bundle_folder(bundle) as source,
    ):
        copies = {source: Path(home) / "bundle"}
        document = read_bundle(source).document
        _copy(source, copies[source], (BUNDLE_JSON, *document["files"]))
        if folded is not None:
            from streetvision.bundle.folded import RECORD

            record = read_json(folded / RECORD, "python -m streetvision fold")
            copies[folded] = Path(home) / "folded"
            names = FOLDED_FILES & set(record.get("files") or ())
            _copy(folded, copies[folded], (RECORD, *names))
        try:
            yield copies[source], None if folded is None else copies[folded]
        except UserError as error:
            text = str(error)
            for original, copy in copies.items():
                text = text.replace(str(copy), str(original))
            raise UserError(text) from error


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file():  # what is missing is said when the copy is checked
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def upload(
    repo_id: str, files: Mapping[str, Path], message: str, *, private: bool | None = None
) -> str:
    """Upload `files`, by their paths in the repository, in one commit; return its address.

    The repository is made if there is none (`private`, or as the account has it by default). One that an
    earlier bundle was published in holds exactly the new files afterwards, and the old ones in its history.

    Raises
    ------
    UserError
        `huggingface_hub` is not installed; the repository holds something else; no access, no connection,
        or somebody else published meanwhile. The repository is then as it was.
    """
    check_repo(repo_id)
    try:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError as error:
        raise UserError(
            "publish --upload needs huggingface_hub: pip install streetvision[hub]"
        ) from error
    api = HfApi()
    try:
        try:
            info = api.model_info(repo_id, timeout=CONNECT_SECONDS)
        except RepositoryNotFoundError:
            api.create_repo(repo_id, private=private, repo_type="model")
            info = api.model_info(repo_id, timeout=CONNECT_SECONDS)
        there = {each.rfilename for each in info.siblings or ()} - {".gitattributes"}
        if there and not there & {BUNDLE_JSON, f"{BUNDLE_FOLDER}/{BUNDLE_JSON}"}:
            raise UserError(
                f"{repo_id} holds files and no bundle ({', '.join(sorted(there)[:3])}, …): "
                "name a repository of a bundle, or a new one"
            )
        add = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        delete = [CommitOperationDelete(name) for name in sorted(there - files.keys())]
        # A commit on another parent is refused: nobody's files are deleted unseen.
        done = api.create_commit(
            repo_id, [*add, *delete], commit_message=message, parent_commit=info.sha
        )
    except UserError:
        raise
    except Exception as error:  # transport errors share no public base class across versions
        reason = " ".join(str(error).split())
        raise UserError(
            f"{repo_id} could not be published ({reason}): check the connection and that HF_TOKEN may write "
            "there, and run it again"
        ) from error
    return str(done.commit_url)


def check_repo(repo_id: str) -> str:
    """Return the name of a repository; UserError unless it is owner/name."""
    if not _REPO.fullmatch(repo_id):
        raise UserError(f'repository "{repo_id}" is not owner/name')
    return repo_id


def _measured(
    project: ArtifactSchema, step: str, metric: str, folder: Path
) -> dict[str, Any] | None:
    """A stage's metrics, if its manifest says that they are of this bundle."""
    manifest, path = project.manifest(step), project.metric(metric)
    if not manifest.is_file() or not path.is_file():
        return None
    listed = read_json(manifest, step)
    read = {each["sha256"] for each in listed["inputs"]}
    wrote = {each["sha256"] for each in listed["outputs"]}
    if sha256_file(folder / BUNDLE_JSON) not in read or sha256_file(path) not in wrote:
        return None
    return read_json(path, step)


def _recorded_licence(backbone: str) -> str | None:
    """What timm says of the pretrained weights of that name."""
    import timm

    try:
        config = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    except RuntimeError:  # no such tag
        return None
    return None if config is None else config.license


def _check_licences(submission: Submission, facts: Facts) -> None:
    missing = []
    if not submission.backbone_licence.strip():
        recorded = facts.recorded_licence or "none"
        missing.append(
            f"--backbone-licence (of {facts.backbone}; timm records {recorded} for pretrained weights of that "
            'name; "own" if it was trained from random ones)'
        )
    if not submission.data_licence.strip():
        missing.append(f"--data-licence (of the images of {', '.join(sorted(facts.sources))})")
    if missing:
        raise UserError(
            f"whoever publishes a model answers for its licences: read them and name {' and '.join(missing)}"
        )
