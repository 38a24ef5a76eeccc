"""params.yaml, the schema and its defaults are one; every mistake is one line that names key and choice."""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from streetvision.core.errors import UserError
from streetvision.core.params import Params, check_params, leaves, load_params
from streetvision.presets import value

DEFAULTS = Params().model_dump(mode="json")
LEAVES = list(leaves(DEFAULTS))
SECTIONS = list(Params.model_fields)  # and `seed`


def leaves_of(section: str) -> list[str]:
    return [key for key in LEAVES if key.partition(".")[0] == section]


def fields(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and field of every leaf of the schema."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def with_value(key: str, value: Any) -> dict[str, Any]:
    """The default document with one leaf changed."""
    document = copy.deepcopy(DEFAULTS)
    *sections, name = key.split(".")
    inner = document
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return document


def bad_values(field: FieldInfo) -> list[Any]:
    """Values of the wrong kind, beyond each bound, and not among the choices."""
    kind, metadata = field.annotation, field.metadata
    optional = [each for each in typing.get_args(kind) if each is not type(None)]
    if len(optional) == 1 and type(None) in typing.get_args(kind):
        kind, *extra = typing.get_args(optional[0])
        metadata = [bound for each in extra for bound in getattr(each, "metadata", [])]
    else:
        optional = []
    if typing.get_origin(kind) is Literal:
        return ["nonsense", 3, True]
    if kind is bool:
        return ["perhaps", 2, None]
    if kind is str:
        return [3, None, ["a"]]
    if kind not in {int, float}:
        empty = field.default == () or typing.get_origin(typing.get_args(kind)[0]) is Literal
        return ["x", None] if empty else ["x", [], None]
    bad: list[Any] = ["three", True, [1], float("nan"), float("inf"), -float("inf")]
    bad += [] if optional else [None]
    if kind is int:
        bad.append(2.5)
    for bound in metadata:
        bad += [bound.ge - 1 for _ in "a" if hasattr(bound, "ge")]
        bad += [bound.gt for _ in "a" if hasattr(bound, "gt")]
        bad += [bound.le + 1 for _ in "a" if hasattr(bound, "le")]
        bad += [bound.lt for _ in "a" if hasattr(bound, "lt")]
    return bad


def refusal(document: Any) -> str:
    """The one line that refuses `document`."""
    with pytest.raises(UserError) as caught:
        check_params(document, "params.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("params.yaml: ")
    return message


def test_params_yaml_has_the_schemas_leaves_and_default_values(repository: Path) -> None:
    document = yaml.safe_load((repository / "params.yaml").read_text())
    assert list(leaves(document)) == LEAVES == [name for name, _ in fields()]
    assert document == DEFAULTS
    assert load_params(repository / "params.yaml") == Params()


@pytest.mark.parametrize("section", SECTIONS)
def test_a_bad_value_names_its_key(section: str) -> None:
    for key, field in fields():
        if key.partition(".")[0] == section:
            for value in bad_values(field):
                message = refusal(with_value(key, value))
                assert message.removeprefix("params.yaml: ").startswith((f"{key}:", f'{key} "'))


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("train.epochs", 0, "greater than or equal to 1 (got 0)"),
        ("train.dropout", 1.0, "less than 1 (got 1.0)"),
        ("train.learning_rate", 0, "greater than 0 (got 0)"),
        ("data.jpeg_quality", 101, "less than or equal to 100 (got 101)"),
        ("train.fit", "squash", '"squash" is not one of letterbox, crop'),
        ("hardware.device", "tpu", '"tpu" is not one of auto, cpu, cuda'),
        ("train.epochs", "many", "valid integer"),
        ("train.epochs", True, "a number is needed (got True)"),
        ("train.learning_rate", float("inf"), "finite number"),
        ("data.sources", [], "at least 1 item"),
        ("data.sources", [{"name": "a"}], "one of synthetic, folder, csv, parquet, hub"),
        ("data.sources", [{"kind": "zip"}], 'zip" is not one of synthetic, folder, csv, parquet, hub'),
    ],
)  # fmt: skip
def test_the_message_says_what_is_allowed(key: str, value: Any, allowed: str) -> None:
    message = refusal(with_value(key, value))
    assert key in message
    assert allowed in message


@pytest.mark.parametrize("section", SECTIONS)
def test_a_misspelt_key_gets_the_right_one_as_a_hint(section: str) -> None:
    for key in leaves_of(section):
        message = refusal(with_value(f"{key}z", 1))
        assert f'unknown parameter "{key}z"' in message
        assert f'did you mean "{key.rsplit(".", maxsplit=1)[-1]}"?' in message


def test_an_unknown_key_far_from_all_others_lists_them() -> None:
    message = refusal(with_value("sweep.qqqq", 1))
    assert "known: n_thresholds, optimize_metric, selection, save_curve" in message


@pytest.mark.parametrize("section", list(Params.model_fields)[1:])
def test_an_unknown_or_empty_section(section: str) -> None:
    assert f'did you mean "{section}"?' in refusal(DEFAULTS | {f"{section}x": {}})
    assert f"params.yaml: {section}:" in refusal(DEFAULTS | {section: None})


@pytest.mark.parametrize("section", SECTIONS)
def test_a_missing_key_is_named(section: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for key in leaves_of(section):
        document = with_value(key, 0)
        *above, name = key.split(".")
        inner: Any = document
        for each in above:
            inner = inner[each]
        del inner[name]
        path.write_text(json.dumps(document))  # is YAML, too
        with pytest.raises(UserError, match=rf"^params.yaml: missing {key}$"):
            load_params(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing"),
        (b"seed: [", "not valid YAML"),
        (b"seed: \xff\xfe", "not valid YAML"),
        (b"- 1\n", "must hold sections"),
        (b"", "must hold sections"),
        (b"7: 1\n", 'unknown parameter "7"'),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        load_params(path)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    message = refusal({"seed": -1, "train": {"epochs": 0, "fitt": "crop"}})
    for key in ("seed", "train.epochs", '"train.fitt"'):
        assert key in message


def test_fractions_and_source_names() -> None:
    assert "add up to 1.1, not 1" in refusal(with_value("data.train_fraction", 0.7))
    twice = [{"kind": "folder"}, {"kind": "folder"}]
    assert "source names must differ, got folder, folder" in refusal(
        with_value("data.sources", twice)
    )
    check_params(with_value("data.sources", [{"kind": "folder"}, {"kind": "synthetic"}]), "x")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"kind": "csv"}, "data.sources.0.csv.path: Field required"),
        ({"kind": "csv", "path": "a", "imagez": "b"}, 'did you mean "images"?'),
        (
            {"kind": "parquet", "path": "a", "repo_id": "b/c"},
            "known: positive_classes, negative_classes, kind, name",
        ),
        ({"kind": "synthetic", "path": "a"}, "data.sources.0.synthetic.path"),
        ({"kind": "hub", "repo_id": "a", "revision": "0" * 40}, "data.sources.0.hub.repo_id"),
        ({"kind": "hub", "repo_id": "a/b", "revision": "main"}, "data.sources.0.hub.revision"),
        ({"kind": "folder", "name": "a/b"}, "data.sources.0.folder.name"),
        ({"kind": "synthetic", "images": 0}, "greater than or equal to 1"),
        ("folder", "data.sources.0"),
    ],
)
def test_the_source_union(source: Any, said: str) -> None:
    assert said in refusal(with_value("data.sources", [source]))


def test_each_kind_of_source_is_read_as_its_own() -> None:
    sources = [
        {"kind": "synthetic"},
        {"kind": "folder"},
        {"kind": "csv", "path": "labels.csv"},
        {"kind": "parquet", "path": "shards"},
        {"kind": "hub", "repo_id": "owner/name", "revision": "a" * 40},
    ]
    params = check_params(with_value("data.sources", sources), "x")
    assert [source.kind for source in params.data.sources] == [s["kind"] for s in sources]
    assert check_params(params.model_dump(mode="json"), "x") == params


def test_parameters_cannot_be_changed() -> None:
    params = Params()
    with pytest.raises(ValidationError, match="frozen"):
        params.seed = 8  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        params.train.epochs = 8  # type: ignore[misc]


def test_the_shares_by_name_are_those_of_the_fields() -> None:
    fractions = Params().data.fractions
    assert fractions == {"train": 0.6, "val_select": 0.1, "val_calib": 0.15, "val_test": 0.15}


def test_attention_heads_divide_its_width() -> None:
    message = refusal(with_value("cvfm.attention_heads", 5))
    assert message == "params.yaml: cvfm: attention_dim 64 is not a multiple of attention_heads 5"


def test_dvc_changes_one_line_a_value(repository: Path, tmp_path: Path) -> None:
    """`dvc exp run -S` writes the file anew: its form must be that which DVC gives it."""
    text = (repository / "params.yaml").read_text()
    path = tmp_path / "params.yaml"
    path.write_text(text)
    apply_overrides(path, ["train.epochs=3"])
    assert path.read_text() == text.replace(
        f"\n  epochs: {DEFAULTS['train']['epochs']}\n  batch_size: 32",
        "\n  epochs: 3\n  batch_size: 32",
    )
    # Every number, text and truth value at once, each as long as it was.
    path.write_text(text)
    values = {key: value(DEFAULTS, key) for key in leaves(DEFAULTS)}
    changed = [
        key for key, each in values.items() if each is not None and not isinstance(each, list)
    ]
    apply_overrides(path, [f"{key}=9" for key in changed])
    before, after = text.splitlines(), path.read_text().splitlines()
    assert len(before) == len(after)
    differing = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(differing) <= len(changed)
    for old, new in differing:
        assert old.partition(":")[0] == new.partition(":")[0]
        assert old.partition("#")[2] == new.partition("#")[2]
    # Lists and nothing, too: what is given again changes no byte.
    path.write_text(text)
    lists = [key for key, each in values.items() if each is None or isinstance(each, list)]
    assert len(lists) > 5
    apply_overrides(
        path, [f"{key}={json.dumps(values[key])}" for key in lists if key != "data.sources"]
    )
    assert path.read_text() == text


def test_null_turns_a_gate_off() -> None:
    gates = dict.fromkeys(DEFAULTS["gates"])
    assert check_params({"gates": gates}, "x").gates.model_dump() == gates
