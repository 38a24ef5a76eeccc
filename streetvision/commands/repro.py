"""`dvc repro`, with the parameters of a preset while it runs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from streetvision.core import git
from streetvision.core.artifacts import exclusive, write_bytes_atomic
from streetvision.core.errors import UserError
from streetvision.presets import load_preset

log = logging.getLogger(__name__)
RESULTS = ("dvc.lock", "metrics")  # what of a run's results is in Git


def reproduce(root: Path, preset: str | None) -> int:
    """Run `dvc repro` in `root` and return its exit code; `params.yaml` is afterwards as it was."""
    bin_folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")])}
    environment.pop("PYTHONSAFEPATH", None)  # the stages are this folder's
    command = [sys.executable, "-m", "dvc", "repro"]
    busy = "another `repro` is running in this folder; wait for it or stop it"
    with exclusive(root / ".streetvision/repro.lock", busy), preset_params(root, preset):
        code = subprocess.run(command, cwd=root, env=environment, check=False).returncode
    if preset is not None:
        _say_what_is_the_presets(root, preset)
    if code:
        try:
            git.check_repository(root)
        except UserError as error:
            log.warning("%s", error)
    return code


def _say_what_is_the_presets(root: Path, preset: str) -> None:
    """Warn of results that lie where Git has others, with the command that brings those back."""
    lock = RESULTS[0]
    try:
        changed = git.changed(root, RESULTS)
        if not changed:
            return
        committed = git.files(root, [("HEAD", lock)])["HEAD", lock] is not None
    except UserError:  # no repository, or one without a commit
        return
    back = f"git checkout HEAD -- {' '.join(RESULTS)} && dvc checkout"
    back += " (`make repro`, where DVC's cache has not all of them)"
    log.warning(
        "%s and files in %s, %d that Git has otherwise, hold results of the preset %s, not of params.yaml%s",
        *RESULTS, len(changed), preset, f"; those of HEAD: {back}" if committed else "",
    )  # fmt: skip


@contextmanager
def preset_params(root: Path, preset: str | None) -> Iterator[None]:
    """Let `params.yaml` hold a preset's values; put the user's own back at the end.

    They wait in `.streetvision/params.yaml.yours`. A run that was killed leaves that file, and the
    next run puts it back first. Whoever edits `params.yaml` meanwhile keeps the edit.
    """
    path = root / "params.yaml"
    kept = root / ".streetvision/params.yaml.yours"
    written = root / ".streetvision/params.yaml.preset"

    def restore() -> None:
        if kept.exists():
            if path.read_bytes() == written.read_bytes():
                write_bytes_atomic(path, kept.read_bytes())
            if path.read_bytes() == kept.read_bytes():
                kept.unlink()
            else:
                log.warning("params.yaml was edited during the run; the earlier one is %s", kept)
        written.unlink(missing_ok=True)

    if kept.exists() and written.exists():
        log.info("putting back the params.yaml that an interrupted run had set aside")
        restore()
    if preset is None:
        yield
        return
    if not path.is_file():
        raise UserError(f"{path} is missing; run this in the project's folder")
    document = load_preset(preset, root).model_dump(mode="json")
    text = f"# Preset {preset}, for one run.\n" + yaml.safe_dump(document, sort_keys=False)
    write_bytes_atomic(written, text.encode())
    write_bytes_atomic(kept, path.read_bytes())
    write_bytes_atomic(path, text.encode())
    try:
        yield
    finally:
        restore()
