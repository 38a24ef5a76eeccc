"""The stages `embed` and `cvfm` on tiny splits: both conditions are cached, one of them decides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from stages.common import Stage
from stages.cvfm import cvfm
from stages.embed import embed
from streetvision.core.artifacts import ArtifactSchema, write_json_atomic
from streetvision.core.params import Params, check_params
from streetvision.core.schema import CONDITIONS
from streetvision.data.embeddings import Embeddings, read_embeddings, served_id
from streetvision.data.served_images import served_images
from streetvision.data.store import open_split
from streetvision.fusion.fitting import LabelledViews, choose_fusion
from streetvision.fusion.fusion import load_fusion
from streetvision.models.classifier import load_classifier
from streetvision.models.multiview import score_all_views

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Trained

REPEATS = 2
EMBEDDED = ("train", "val_select", "val_calib")
CHANGES: dict[str, Any] = {
    "subnet": {"validator": "crop"},
    "views": {"grid": 2},
    "embed": {"served_repeats": REPEATS},
    "cvfm": {"fits": 1, "epochs": 2, "latent_dim": 4, "attention_dim": 8},
    "hardware": {"workers": 1, "device": "cpu"},
}


def params_of(**changes: Any) -> Params:
    return check_params(CHANGES | changes, "params.yaml")


def make_project(root: Path, trained: Trained, splits: dict[str, Path]) -> ArtifactSchema:
    paths = ArtifactSchema(root)
    paths.ensure_dirs()
    shutil.copy(Path(__file__).parents[2] / "dvc.yaml", root)
    shutil.copytree(trained.classifier, paths.classifier)
    for name in EMBEDDED:
        paths.split(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(splits[name], paths.split(name))
    write_json_atomic(paths.threshold, {"threshold": 0.4})
    return paths


@pytest.fixture(scope="module")
def project(
    trained: Trained, tiny_splits: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> ArtifactSchema:
    paths = make_project(tmp_path_factory.mktemp("project"), trained, tiny_splits)
    embed(Stage("embed", params_of(), paths))
    return paths


@pytest.mark.parametrize("name", EMBEDDED)
def test_each_split_is_embedded_as_it_is_and_distorted(project: ArtifactSchema, name: str) -> None:
    params = params_of()
    split = open_split("embed", name, project.split(name))
    clean, distorted = (read_embeddings(project.embeddings(name, c)) for c in CONDITIONS)
    assert clean.ids.tolist() == split.ids.tolist()
    assert distorted.ids.tolist() == [served_id(x, k) for x in split.ids for k in range(REPEATS)]
    for found, repeats in ((clean, 1), (distorted, REPEATS)):
        np.testing.assert_array_equal(found.labels, split.labels.repeat(repeats))
        np.testing.assert_array_equal(found.groups, split.groups.repeat(repeats))
        assert len(found.views) == 5
    model, config = load_classifier(project.classifier)
    images = served_images(split, params.subnet, REPEATS, params.seed, workers=1)
    scores = score_all_views(
        model, config.preprocessing, images, params.views, 1, torch.device("cpu")
    )
    np.testing.assert_array_equal(distorted.scores.logits, scores.logits)
    assert (distorted.logits[::REPEATS] != clean.logits).all()


def labelled(found: Embeddings) -> LabelledViews:
    return LabelledViews(found.scores, found.labels, found.groups)


@pytest.mark.parametrize("fit_on", CONDITIONS)
def test_fusion_is_fitted_and_chosen_on_the_images_that_are_named(
    project: ArtifactSchema, fit_on: str
) -> None:
    params = params_of(decision={"fit_on": fit_on})
    cvfm(Stage("cvfm", params, project))
    report = json.loads(project.metric("cvfm").read_text())
    train = labelled(read_embeddings(project.embeddings("train", fit_on), features=True))
    select = {
        name: labelled(read_embeddings(project.embeddings("val_select", name), features=True))
        for name in CONDITIONS
    }
    head = load_classifier(project.classifier)[0].head
    fusion, expected = choose_fusion(
        params.cvfm, params.views, train, select, fit_on, head, 0.4, params.seed
    )
    assert report == json.loads(json.dumps(expected))
    assert (report["fit_on"], report["mode"]) == (fit_on, fusion.config.mode)
    repeats = 1 if fit_on == "clean" else REPEATS
    assert report["val_select_images"] == 40 * repeats
    assert report["fusion_images"] == len(train.labels) == 16 * repeats
    loaded = load_fusion(project.cvfm, lambda: head)
    np.testing.assert_allclose(
        loaded.fuse(*select[fit_on].scores), fusion.fuse(*select[fit_on].scores), atol=1e-5
    )
    assert project.plot("fusion.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_fusion_part_the_files_are_empty(
    trained: Trained,
    tiny_splits: dict[str, Path],
    write_split: Callable[..., Path],
    tmp_path: Path,
) -> None:
    without = write_split(tmp_path / "other/train.arrow", 8)
    paths = make_project(tmp_path, trained, tiny_splits | {"train": without})
    params = params_of(views={"grid": 1})
    embed(Stage("embed", params, paths))
    assert [len(read_embeddings(paths.embeddings("train", c)).ids) for c in CONDITIONS] == [0, 0]
    cvfm(Stage("cvfm", params, paths))
    report = json.loads(paths.metric("cvfm").read_text())
    assert (report["mode"], report["fusion_images"]) == ("single", 0)
