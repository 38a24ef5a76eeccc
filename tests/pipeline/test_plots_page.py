"""`dvc plots diff` on two revisions, looked at in a browser that has no network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streetvision.core.artifacts import write_csv_atomic, write_json_atomic
from streetvision.plots import curves
from tests.pipeline.project import REPOSITORY, Project, names, read_dvc_yaml, with_git

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
SHOWN = ("roc", "precision_recall", "reliability", "calibration", "mcc_curve", "predictions")
BROWSERS_OWN = re.compile(r"(^|\.)(google|googleapis|gstatic|gvt1)\.com(:\d+)?$")
PRIOR = 0.5
COLOURS = ("#945dd6", "#13adc7")  # DVC's of the first and the second revision
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")


def write_results(project: Project, seed: int) -> None:
    """Every file that dvc.yaml has among the plots, of a made-up model."""
    rng = np.random.default_rng(seed)
    labels = np.arange(600) % 2
    p = 1 / (1 + np.exp(-rng.normal(4 * labels - 2, 1.5 + seed)))
    panels = [curves.reliability_table(labels, each, PRIOR, name)
              for each, name in ((p**2, "before"), (p, "after"))]  # fmt: skip
    tables = {
        "roc": curves.roc_curve(labels, p),
        "precision_recall": curves.precision_recall_curve(labels, p, PRIOR),
        "reliability": curves.reliability_table(labels, p, PRIOR, "as sërved"),
        "calibration": {name: panels[0][name] + panels[1][name] for name in panels[0]},
        "mcc_curve": {"threshold": [0.0, 0.5, 1.0], "mcc": [0.0, 0.8 + seed / 10, 0.0]},
        "predictions": {"id": [f"image-{row}" for row in range(600)], "label": labels.tolist(),
                        "probability": p.tolist()},
        "training": {"epoch": [0, 1], "val_mcc": [0.1, 0.2 + seed], "train_loss": [2.0, 1.0 + seed],
                     "val_loss": [2.0, 1.5]},
        "explora": {"epoch": [], "loss": []},
    }  # fmt: skip
    for stage in read_dvc_yaml(REPOSITORY)["stages"].values():
        for name in names(stage.get("plots", [])):
            path = project / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".csv":
                write_csv_atomic(path, tables[path.stem])
            elif path.suffix == ".json":
                write_json_atomic(path, {"mcc": 0.9, "interval": {"low": 0.8}})
            else:
                Image.new("RGB", (40, 30), (90 * seed, 80, 60)).save(path)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A repository with the results of two revisions and the page of their difference."""
    project = Project(tmp_path_factory.mktemp("plots") / "project")
    project.root.mkdir()
    for name in (
        ".dvc/config",
        ".dvc/.gitignore",
        ".gitignore",
        ".dvcignore",
        "dvc.yaml",
        "params.yaml",
    ):
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy2(REPOSITORY / name, project / name)
    shutil.copytree(REPOSITORY / ".dvc/plots", project / ".dvc/plots")
    write_results(project, 0)
    with_git(project).git("tag", "base")
    write_results(project, 1)
    project.commit()
    project.git("tag", "head")
    project.dvc("plots", "diff", "base", "head")
    return project


@dataclass(frozen=True)
class Opened:
    """A page as drawn, what the console said, and the hosts that were asked for something."""

    page: str
    console: list[str]
    hosts: set[str]


@pytest.fixture(scope="module")
def look(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Project, Path], Opened]:
    """Open a page where no host has an address."""

    def opened(project: Project, page: Path) -> Opened:
        home = tmp_path_factory.mktemp("browser")
        done = project.run(
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--disable-extensions", f"--user-data-dir={home / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--log-net-log={home / 'net.json'}",
            "--enable-logging=stderr", "--v=0", "--virtual-time-budget=30000", "--dump-dom",
            page.as_uri(), env={"HOME": str(home)},
        )  # fmt: skip
        # The log ends where the browser was stopped, so it need not be whole JSON.
        asked = set(re.findall(r'"url":"https?://([^/"]+)', (home / "net.json").read_text()))
        own = {host for host in asked if BROWSERS_OWN.search(host)}
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return Opened(done.stdout, console, asked - own)

    return opened


def drawing(page: str, name: str) -> str:
    """The part of the page that draws `metrics/plots/NAME.csv`."""
    found = re.search(rf'<div id="metrics_plots_{name}_csv".*?</svg>', page, re.DOTALL)
    assert found, f"{name} is not drawn"
    return found[0]


def test_the_page_holds_the_scripts_that_npm_has(two: Project) -> None:
    page = (two / "dvc_plots/index.html").read_text(encoding="utf-8")
    assert page.index('<meta charset="utf-8">') < 1024
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    packed = re.search(r'<script id="vega" type="text/plain">(.*?)</script>', page)
    assert packed
    maker = runpy.run_path(str(REPOSITORY / ".dvc/plots/page.py"))
    scripts = gzip.decompress(base64.b64decode(packed[1])).split(maker["BETWEEN"])
    for script, (name, version, digest) in zip(scripts, maker["SCRIPTS"], strict=True):
        assert f"{name} {version}" in page
        assert hashlib.sha256(script).hexdigest() == digest, name
    empty = maker["PAGE"].replace("@packed", packed[1]).partition("{plot_divs}")
    assert page.endswith(empty[2])


def test_every_curve_has_both_revisions(two: Project) -> None:
    drawn = json.loads(two.dvc("plots", "diff", "base", "head", "--json").stdout)
    assert not drawn.get("errors")
    for name in SHOWN:
        [plot] = drawn["data"][f"metrics/plots/{name}.csv"]
        assert plot["revisions"] == ["base", "head"], name
        text = json.dumps(plot["content"])
        assert "<DVC_METRIC" not in text, name
        assert text.count('"rev": "base"') <= (600 if name == "predictions" else 200)


@needs_browser
def test_the_page_is_drawn_without_a_network_or_a_complaint(two: Project, look: Callable) -> None:
    found = look(two, two / "dvc_plots/index.html")
    page = found.page.rpartition("</head>")[2]  # what is drawn, without the scripts
    assert found.console == []
    assert found.hosts == set()
    for name in SHOWN:
        svg = drawing(page, name)
        for colour in COLOURS:
            assert svg.count(colour) > 1, (name, colour)  # the legend, and a mark
    for words in ("perfectly calibrated", "before", "after", "as sërved", "no roadwork", "MCC"):
        assert words in html.unescape(page), words
    # What has nothing to draw leaves no hole.
    assert re.findall(r'<div id="(metrics_\w+_json)"', page) == []
    assert 'id="metrics_plots_explora_csv"' not in page
    assert page.count("<img src=") == 2 * len(list((two / "metrics/plots").glob("*.png")))


@needs_browser
def test_dvcs_own_page_would_ask_a_server(two: Project, look: Callable, tmp_path: Path) -> None:
    """What the test above would see on a page that needs the network."""
    (tmp_path / "own.html").write_text(
        "<html><head>{scripts}</head><body>{plot_divs}</body></html>"
    )
    two.dvc(
        "plots", "diff", "base", "head", "--out", "own", "--html-template", tmp_path / "own.html"
    )
    found = look(two, two / "own/index.html")
    assert any("vegaEmbed is not defined" in line for line in found.console)
    assert found.hosts == {"cdn.jsdelivr.net"}
