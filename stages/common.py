"""What every stage script does around its work: arguments, parameters, run log, errors, manifest."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NoReturn

from streetvision.core.artifacts import (
    ArtifactSchema,
    create_step_manifest,
    exclusive,
    main_process,
    run_log,
    scratch_folder,
    scratch_path,
    sha256_file,
    write_json_atomic,
)
from streetvision.core.documents import read_yaml
from streetvision.core.errors import UserError, guarded, log_to_terminal
from streetvision.core.imports import code_sha256
from streetvision.core.params import Params, load_params
from streetvision.core.processes import collect_rarely, keep_freed_memory, leave


@dataclass(frozen=True)
class Stage:
    """One run of one stage, in the project whose root is the working directory."""

    name: str
    params: Params
    paths: ArtifactSchema

    def config(self) -> dict[str, Any]:
        """The parameters that determine this stage's result: those that `dvc.yaml` tracks for it."""
        document = read_yaml((self.paths.root / "dvc.yaml").read_bytes(), "dvc.yaml")
        values = self.params.model_dump(mode="json")
        tracked = document["stages"][self.name].get("params", [])
        return {key: reduce(getitem, key.split("."), values) for key in tracked}

    @contextmanager
    def scratch(self, config: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[Path]:
        """Yield a folder that survives a crash, keyed by parameters, data and code.

        The ranks of a training job share that of the first one. Killing DVC may leave its stage at work: until
        that ends, this one is refused, whatever its key is, as both write the same outputs.
        """
        code = code_sha256(f"stages.{self.name}", self.paths.root)
        key = {"config": config, "data": data, "code": code}
        if not main_process():
            yield scratch_path(self.paths.scratch, self.name, key)
            return
        lock = self.paths.lock(self.name)
        busy = f"another process is still running this stage in {self.paths.root}; wait for it or stop it"
        with (
            exclusive(lock, busy),
            scratch_folder(self.paths.scratch, self.name, key) as folder,
        ):
            yield folder

    def upstream(self, *steps: str) -> dict[str, str]:
        """Fingerprints of the data of earlier steps: their manifests hash every file."""
        found = {}
        for step in steps:
            path = self.paths.manifest(step)
            if not path.is_file():
                raise UserError(f"{path} is missing; the stage `{step}` makes it")
            found[step] = sha256_file(path)
        return found

    def write_manifest(
        self,
        config: Mapping[str, Any],
        inputs: list[Path],
        outputs: list[Path],
        metrics: Mapping[str, Any],
    ) -> None:
        """Write `<stage>.manifest.json`, the last file of a stage."""
        document = create_step_manifest(
            self.paths.root, self.name, config, inputs, outputs, metrics
        )
        write_json_atomic(self.paths.manifest(self.name), document)


def run_stage(name: str, description: str, body: Callable[[Stage], None]) -> NoReturn:
    """Run `body` as the program `python -m stages.<name>`; a user's mistake ends in one line, exit code 2."""
    parser = argparse.ArgumentParser(prog=f"python -m stages.{name}", description=description)
    parser.parse_args()
    level = logging.INFO if main_process() else logging.ERROR
    log_to_terminal(level, f"{name}: %(message)s")
    root = Path.cwd()
    keep_freed_memory()
    collect_rarely()

    def main() -> None:
        paths = ArtifactSchema(root)
        params = load_params(root / "params.yaml")
        paths.ensure_dirs()
        with run_log(paths.run_log, name) if main_process() else nullcontext():
            body(Stage(name, params, paths))

    leave(guarded(name, main))
