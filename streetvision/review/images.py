"""Images to review, whoever labelled them or not, and what a bundle says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streetvision.core.artifacts import ArtifactSchema
from streetvision.core.errors import UserError
from streetvision.core.escaping import escaped
from streetvision.core.progress import progress
from streetvision.data.embeddings import Embeddings
from streetvision.data.store import CONTRACT, Split, open_split, read_arrow
from streetvision.data.transforms import Preprocessing
from streetvision.data.views import ViewScores, content_box
from streetvision.evaluation.labelled import labelled_images

if TYPE_CHECKING:
    from PIL.Image import Image

    from streetvision.bundle.predictor import Predictor

Floats = NDArray[np.float64]
LOOKS = ("brightness", "contrast", "saturation", "sharpness")
_ALONE = "image:"  # how `prepare` names the group of an image that has none


@dataclass(frozen=True)
class Sample:
    """What a bundle says of N images, as they are.

    Attributes
    ----------
    ids, groups : [N]
    logits : those that the policy takes [N]
    features : of the backbone, global view [N, D]
    properties : name → [N]; empty where the images themselves are not there
    """

    ids: NDArray[np.object_]
    groups: NDArray[np.object_]
    logits: Floats
    features: NDArray[np.float32]
    properties: dict[str, Floats] = field(default_factory=dict)

    def take(self, rows: NDArray[np.int64]) -> Sample:
        """The same of some images."""
        properties = {name: values[rows] for name, values in self.properties.items()}
        return Sample(
            self.ids[rows], self.groups[rows], self.logits[rows], self.features[rows], properties
        )


@contextmanager
def open_images(
    data: Path, preprocessing: Preprocessing, side_px: int | None = None
) -> Iterator[Split]:
    """Open what `evaluate` reads, or a folder of images without labels: its first sub-folders are the groups.

    `side_px` as in `labelled_images`. Labels of what has none are 0 and mean nothing.

    Raises
    ------
    UserError
        Nothing there, or no image.
    """
    with labelled_images(data, preprocessing, side_px, unlabelled=True) as split:
        yield split


def open_all(
    places: Sequence[Path], preprocessing: Preprocessing, stack: ExitStack
) -> dict[str, Split]:
    """Open several by `open_images`, named by their files' stems; all stay open until `stack` is closed.

    Images that are not stored yet are stored at the size of those of the first.
    """
    found: dict[str, Split] = {}
    side: int | None = None
    for path in places:
        split = stack.enter_context(open_images(path, preprocessing, side))
        side = side or stored_side(split)
        name = escaped(path.stem)
        found[escaped(path) if name in found else name] = split
    return found


def images_of(embeddings: Path, paths: ArtifactSchema) -> Split | None:
    """The images of the project's own embeddings as they are; None of any others."""
    for name in CONTRACT["embed"]:
        own = paths.embeddings(name).resolve() == embeddings.resolve()
        if own and paths.split(name).is_file():
            return open_split("embed", name, paths.split(name))
    return None


def score_images(predictor: Predictor, split: Split) -> Sample:
    """Read every image once: logits, features and properties, by the code that made the embeddings."""
    from streetvision.models.multiview import score_all_views

    preprocessing = predictor.config.preprocessing
    looks: list[tuple[float, ...]] = []

    def images() -> Iterator[Image]:
        for row in progress(range(len(split)), len(split), "scoring"):
            image = split.image(row)
            looks.append(look(image, preprocessing))
            yield image

    scores = score_all_views(
        predictor.model, preprocessing, images(), predictor.fusion.config.grid,
        predictor.batch_size, predictor.device,
    )  # fmt: skip
    return _sample(predictor, split.ids, split.groups, scores, _properties(split, looks))


def embedded_sample(
    predictor: Predictor, embeddings: Embeddings, split: Split | None = None
) -> Sample:
    """The same of cached scores; with the split whose images they are of, also their properties.

    Raises
    ------
    UserError
        The bundle's classifier did not make these scores, or they are of other images than the split.
    """
    _check_made_by(predictor, embeddings.scores)
    properties: dict[str, Floats] = {}
    if split is not None:
        if embeddings.ids.tolist() != split.ids.tolist():
            raise UserError(f"embeddings and images of {split.name} differ; rerun `embed`")
        preprocessing = predictor.config.preprocessing
        rows = progress(range(len(split)), len(split), "properties")
        properties = _properties(split, [look(split.image(row), preprocessing) for row in rows])
    return _sample(predictor, embeddings.ids, embeddings.groups, embeddings.scores, properties)


def look(image: Image, preprocessing: Preprocessing) -> tuple[float, ...]:
    """`LOOKS` of an image as the model sees it, border left out.

    Mean and standard deviation of luma and mean chroma (largest less smallest channel), all of 1; the
    logarithm of the variance of luma's Laplacian, in which one less is blurred visibly. The size is the
    model's, so that images of different resolution can be compared.
    """
    left, top, right, bottom = content_box(preprocessing, *image.size)
    pixels = preprocessing.apply(image)[top:bottom, left:right].astype(np.float64) / 255
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    chroma = pixels.max(axis=2) - pixels.min(axis=2)
    middle = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * middle
    # One grey level's worth, so that a flat image has a logarithm.
    sharpness = np.log((laplacian.var() if laplacian.size else 0.0) + 255.0**-2)
    return float(luma.mean()), float(luma.std()), float(chroma.mean()), float(sharpness)


def is_embeddings(path: Path) -> bool:
    """Whether a file holds what `embed` writes."""
    return (
        path.suffix.lower() == ".arrow"
        and path.is_file()
        and "features" in read_arrow(path, "embed").column_names
    )


def stored_side(split: Split) -> int:
    """Median shorter side of a split's images as they are stored, pixels."""
    sides = np.minimum(split.column("width"), split.column("height"))
    return int(np.median(sides.astype(np.int64)))


def groups_known(groups: NDArray[np.object_]) -> bool:
    """Whether any image has a group that a source gave it."""
    return any(not str(group).startswith(_ALONE) for group in groups)


def bare_id(image_id: str) -> str:
    """An id without the name of its source: the same file has one, whichever source it came from."""
    return image_id.partition("/")[2] or image_id


def picture_finder(splits: Sequence[Split]) -> Callable[[str], Image | None]:
    """Return a function that finds an image in these splits by its id, or None."""
    places = {
        bare_id(str(name)): (split, row) for split in splits for row, name in enumerate(split.ids)
    }

    def find(image_id: str) -> Image | None:
        split, row = places.get(bare_id(image_id), (None, 0))
        return None if split is None else split.image(row)

    return find


def _properties(split: Split, looks: list[tuple[float, ...]]) -> dict[str, Floats]:
    width, height = (
        split.column(f"original_{side}").astype(np.float64) for side in ("width", "height")
    )
    table = np.array(looks, dtype=np.float64).reshape(-1, len(LOOKS))
    found = dict(zip(LOOKS, table.T, strict=True))
    return found | {"aspect_ratio": width / height, "megapixels": width * height / 1e6}


def _sample(
    predictor: Predictor,
    ids: NDArray[np.object_],
    groups: NDArray[np.object_],
    scores: ViewScores,
    properties: dict[str, Floats],
) -> Sample:
    if scores.features is None:
        raise ValueError("a sample holds features")
    logits, hard = predictor.fusion.fuse(*scores), predictor.policy.hard_images
    if hard is not None and predictor.fusion.n_views > 1:
        logits = hard.compose(scores.logits[:, 0], logits)
    return Sample(ids, groups, logits, scores.features[:, 0].astype(np.float32), properties)


def _check_made_by(predictor: Predictor, scores: ViewScores) -> None:
    """The bundle's head must make the stored logits of the stored features."""
    import torch

    model = predictor.model
    wrong = scores.features is None or scores.features.shape[2] != model.backbone.num_features
    if scores.features is not None and not wrong:
        with torch.inference_mode():
            features = torch.from_numpy(scores.features[:, 0].astype(np.float32))
            made = model.head(model.hidden(features.to(predictor.device))).flatten().cpu().numpy()
        # The features are stored in float16.
        wrong = not np.allclose(made, scores.logits[:, 0], rtol=0.01, atol=0.05)
    if wrong:
        raise UserError(
            "the reference embeddings were made by another classifier than the bundle's; "
            "rerun `embed`, or give images as --reference"
        )
