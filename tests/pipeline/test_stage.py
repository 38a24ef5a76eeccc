"""What a stage script is around its work: its scratch belongs to parameters, data and code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.common import Stage
from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.errors import UserError
from streetvision.core.params import Params

CODE = {
    "stages/__init__.py": "",
    "stages/toy.py": "from streetvision.models import loop\n",
    "streetvision/__init__.py": "",
    "streetvision/models/__init__.py": "",
    "streetvision/models/loop.py": "import streetvision.models.optim\n",
    "streetvision/models/optim.py": "RATE = 0.1\n",
    "streetvision/models/elsewhere.py": "",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose stage `toy` imports a module that imports another."""
    for name, text in CODE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def interrupted(project: Path, config: dict[str, Any], data: dict[str, Any]) -> list[str]:
    """What a run finds of earlier ones, before it leaves a checkpoint of its own behind."""
    found: list[str] = []

    def run() -> None:
        stage = Stage("toy", Params(), ArtifactSchema(project))
        with stage.scratch(config, data) as folder:
            found.extend(sorted(path.name for path in folder.iterdir()))
            (folder / "last.ckpt").write_text("weights")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run()
    return found


def test_a_checkpoint_is_found_again_by_the_same_parameters_data_and_code(project: Path) -> None:
    assert interrupted(project, {"lr": 1}, {"prepare": "a"}) == []
    assert interrupted(project, {"lr": 1}, {"prepare": "a"}) == ["last.ckpt"]
    (project / "streetvision/models/elsewhere.py").write_text("CHANGED = True\n")
    assert interrupted(project, {"lr": 1}, {"prepare": "a"}) == ["last.ckpt"]


@pytest.mark.parametrize("changed", ["stages/toy.py", "streetvision/models/loop.py",
                                     "streetvision/models/optim.py"])  # fmt: skip
def test_new_code_does_not_take_up_an_old_checkpoint(changed: str, project: Path) -> None:
    assert interrupted(project, {"lr": 1}, {"prepare": "a"}) == []
    with (project / changed).open("a") as file:
        file.write("RATE = 0.2\n")
    assert interrupted(project, {"lr": 1}, {"prepare": "a"}) == []


@pytest.mark.parametrize(
    ("config", "data"), [({"lr": 2}, {"prepare": "a"}), ({"lr": 1}, {"prepare": "b"})]
)
def test_nor_do_other_parameters_or_data(
    config: dict[str, Any], data: dict[str, Any], project: Path
) -> None:
    assert interrupted(project, {"lr": 1}, {"prepare": "a"}) == []
    assert interrupted(project, config, data) == []


def test_a_run_that_ends_leaves_nothing(project: Path) -> None:
    stage = Stage("toy", Params(), ArtifactSchema(project))
    with stage.scratch({}, {}) as folder:
        (folder / "last.ckpt").write_text("weights")
    assert not folder.exists()


def test_two_runs_in_one_place_write_the_same_outputs(project: Path) -> None:
    """DVC was killed, its stage is still at work; the next has other parameters."""
    stage = Stage("toy", Params(), ArtifactSchema(project))
    with (
        stage.scratch({"lr": 1}, {}),
        pytest.raises(UserError, match="another process is still running this stage in"),
        stage.scratch({"lr": 2}, {}),
    ):
        pass
