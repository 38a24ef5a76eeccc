"""Revisions, parameters, groups and metrics with names of an attacker's choice, in all that is shown."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from streetvision.core.artifacts import write_csv_atomic
from streetvision.core.escaping import terminal
from tests.pipeline.project import Project
from tests.review.test_change_report import made, reported, rows, write_results  # noqa: F401

Run = Callable[..., tuple[int, str, str]]
ODD = {
    "picture": "![x](http://a.b/c.png)",
    "tag": "<img src=x onerror=alert(1)>",
    "cell": "a | b",
    "formula": "=HYPERLINK(1)",
    "mention": "@everyone #1",
    "math": r"$\frac{$",
    "orders": "\x1b]0;owned\x07\n### forged",
    "end": "</details> <!--",
    "long": "x" * 300,
}
LIVE = re.compile(
    r"(?<!\\)!\[x|<img|<!--|</details> |\x1b|(?<!&#8203;)(?<=@)everyone|http://|^### forged",
    re.MULTILINE,
)


@pytest.fixture
def hostile(reported: Project) -> Project:  # noqa: F811
    """A commit whose parameters, metrics, groups and branch are called so."""
    write_results(reported, 1.5, 0.75)
    params = yaml.safe_load((reported / "params.yaml").read_text())
    params["odd"] = {"values": ODD, **dict.fromkeys(ODD.values(), 1), "number": 10**299}
    (reported / "params.yaml").write_text(yaml.safe_dump(params))
    metrics = json.loads((reported / "metrics/train.json").read_text())
    metrics |= dict.fromkeys(ODD.values(), 1) | {
        "text": ODD["tag"],
        "number": 10**299,
        "list": [ODD["tag"]],
    }
    (reported / "metrics/train.json").write_text(json.dumps(metrics))
    with (reported / "metrics/plots/predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        row["group"] = f"{ODD['formula']}{row['group']}"
        row["id"] = f"=={row['id']}"
    columns = {name: [row[name] for row in table] for name in table[0]}
    for name in ("main", "x"):
        if name == "x":
            reported.git("checkout", "--quiet", "-b", "a`<b>|$x$@c&#1")
        write_csv_atomic(reported / "metrics/plots/predictions.csv", columns)
        columns["probability"] = [str(1 - float(p)) for p in columns["probability"]]
        reported.commit()
    return reported


@pytest.mark.slow
def test_the_report_shows_them_and_makes_nothing_of_them(hostile: Project, run: Run) -> None:
    code, shown, said = run("report", "main", "a`<b>|$x$@c&#1")
    assert (code, said) == (0, ""), said
    text = (hostile / "report/report.md").read_text()
    assert not LIVE.findall(text)
    assert "### a\\`&lt;b&gt;\\|\\$x\\$@&#8203;c&amp;#&#8203;1 against main" in text
    for line in text.splitlines():
        assert len(line) < 2000
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert tables
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, table
    with (hostile / "report/changed.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith("=")]
    assert [cell for cell in cells if cell.startswith("'==")]
    assert (hostile / "report/roc.png").is_file()
    assert shown.isprintable() or shown.endswith("report.md\n")


@pytest.mark.slow
def test_the_parameters_of_a_branch_in_the_report(hostile: Project, run: Run) -> None:
    assert run("report", "main~", "main")[0] == 0
    text = (hostile / "report/report.md").read_text()
    assert not LIVE.findall(text)
    found = rows(text.replace("\\|", "/"))
    assert r"!\[x\](http:\//a.b/c.png)" in found["odd.values.picture"][1]
    assert found["odd.values.orders"][1] == r"\\x1b\]0;owned\\x07\\n### forged"
    assert len(found["odd.values.long"][1]) == 80
    assert len(found["odd.number"][1]) == 80


@pytest.mark.slow
def test_compare_and_sweep_summary_print_no_orders(
    hostile: Project, run: Run, tmp_path: Any
) -> None:
    name = "a`<b>|$x$@c&#1"
    code, shown, _ = run(
        "compare", "main", name, "--md", str(tmp_path / "c.md"), "--json", str(tmp_path / "c.json")
    )
    assert code == 0
    assert shown.startswith(f"{name} against main\n")
    assert not LIVE.findall((tmp_path / "c.md").read_text())
    json.loads((tmp_path / "c.json").read_text())
    hostile.git("branch", "other", "main~")
    (hostile / "params.yaml").write_text("seed: 1\n")
    common = {
        "seed": 1,
        "odd": {ODD["cell"]: ODD["orders"], "picture": ODD["picture"], "f": "=1+1"},
    }
    for rank, branch in enumerate(("one", "two")):
        hostile.git("checkout", "--quiet", "-f", "-b", branch, "main~")
        common["odd"]["picture"] += str(rank)
        common["odd"][ODD["cell"]] += str(rank)
        common["odd"]["f"] += str(rank)
        (hostile / "params.yaml").write_text(yaml.safe_dump(common))
        (hostile / "metrics/train.json").write_text(json.dumps({"val_select": {"mcc": rank / 2}}))
        ran = {"cmd": "true", "params": {"params.yaml": {"train.learning_rate": None}}}
        lock = {"stages": {"train": ran, "evaluate": {"cmd": "true"}}}
        (hostile / "dvc.lock").write_text(yaml.safe_dump(lock))
        hostile.commit()
    code, shown, said = run(
        "sweep-summary", "one", "two", "--md", str(tmp_path / "s.md"), "--json", str(tmp_path / "s.json"),
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, said
    assert terminal(shown, keep="\n") == shown
    assert "forged" in shown
    assert not [line for line in shown.splitlines() if line.startswith("### forged")]
    text = (tmp_path / "s.md").read_text()
    assert not LIVE.findall(text)
    with (tmp_path / "out/sweep.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert "'=1+10" in table[2] or "'=1+101" in table[1]
    assert (tmp_path / "out/sweep.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["", "x,y\n1,2\n", *(f"threshold,mcc\n{row}" for row in ("", "1\n", "nan,1\n", "0,a\n"))],
)
def test_a_broken_curve_is_one_line(hostile: Project, run: Run, text: str) -> None:
    (hostile / "metrics/plots/mcc_curve.csv").write_text(text)
    code, _, said = run("report", "main")
    assert code == 2
    assert "mcc_curve.csv of working tree is no table of thresholds" in said
    assert said.count("\n") == 1
