"""The GitHub workflows and the Makefile: names and code of others, and the review's comment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.project import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))
REPORT = "# What this change does\n\n| MCC | 0.9 |\n\n![roc](roc.png)\n\n## Cost\n"


# Lists comments as the filter of the script does, which is jq, and notes what else it is called with.
GH = """
import json, re, sys
if "--jq" in sys.argv:
    assert sys.argv[1:4] == ["api", "--paginate", "repos/o/r/issues/7/comments"]
    wanted = sys.argv[sys.argv.index("--jq") + 1]
    pattern = (
        r'\\.\\[\\] \\| select\\(\\.user\\.login == "(.*)"'
        r' and \\(\\.body \\| startswith\\("(.*)"\\)\\)\\) \\| \\.id'
    )
    login, start = re.fullmatch(pattern, wanted).groups()
    for each in json.load(open("listed.json")):
        if each["user"]["login"] == login and each["body"].startswith(start):
            print(each["id"])
else:
    open("called", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_official_actions_and_lines_that_a_shell_can_read(path: Path) -> None:
    for step in steps(path):
        assert ("uses" in step) != ("run" in step)
        assert step.get("uses", "actions/").startswith("actions/")
        # What an event holds reaches a shell through the environment, never as text of the script.
        assert "${{" not in step.get("run", "")
        subprocess.run(["bash", "-n", "-c", step.get("run", "")], check=True)
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(path: Path) -> None:
    """With the version beside it, for people."""
    lines = [line for line in path.read_text().splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.search(r"uses: actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_no_credentials_where_a_pull_requests_code_runs(path: Path) -> None:
    """Whatever follows a checkout may run its code; a job that may write checks nothing out."""
    document = yaml.safe_load(path.read_text())
    for name, job in document["jobs"].items():
        checkouts = [
            step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")
        ]
        text = yaml.safe_dump(job)
        if checkouts:
            assert all(step["with"]["persist-credentials"] is False for step in checkouts), name
            assert "permissions" not in job, name
            assert "token" not in text.lower(), name
            assert "secrets" not in text, name
        else:
            assert not [
                step for step in job["steps"] if re.search("make|python", step.get("run", ""))
            ]
    assert "pull_request_target" not in path.read_text()


# What may stand where a branch's name is wanted; T is the name of a file that must not be made.
NAMES = [
    "main", "x; touch T", "$(touch T)", "`touch T`", "$(shell touch T)", "$$(touch T)", "x' \"; touch T; '",
    "${HOME}", "$(BIN)", "-x", "--output=T", "a b", "x & touch T", "x | touch T", "x > T", "x\ny", "*", "#x",
]  # fmt: skip


@pytest.fixture
def makefile(tmp_path: Path) -> Path:
    """A folder with the Makefile and an environment whose python writes its arguments into a file."""
    for name in ("Makefile", "pyproject.toml", ".ci/constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    program = tmp_path / ".venv/bin/python"
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('given', 'w'))\n"
    )
    program.chmod(0o755)
    make(tmp_path, "--touch", "venv")
    return tmp_path


def make(folder: Path, *arguments: str, **environment: str) -> None:
    """Call make as a user does: without what the make (or CI) that runs these tests hands down."""
    handed_down = {"BASE", "HEAD", "PRESET", "ONLY", "VENV", "MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
    clean = {key: value for key, value in os.environ.items() if key not in handed_down}
    subprocess.run(["make", "--quiet", *arguments], cwd=folder, env=clean | environment, check=True)


def given_to_python(folder: Path, *arguments: str, **environment: str) -> list[str]:
    before = {path.name for path in folder.iterdir()} | {"given"}
    make(folder, *arguments, **environment)
    assert {path.name for path in folder.iterdir()} == before
    found: list[str] = json.loads((folder / "given").read_text())
    (folder / "given").unlink()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_make_hands_names_over_as_they_are(makefile: Path, name: str) -> None:
    report = ["-m", "streetvision", "report", "--plots", "--"]
    assert given_to_python(makefile, "report", f"BASE={name}") == [*report, name]
    assert given_to_python(makefile, "report", BASE=name) == [*report, name]
    assert given_to_python(makefile, "report", f"HEAD={name}", BASE="b") == [*report, "b", name]
    assert given_to_python(makefile, "report", HEAD=name) == [*report, "main", name]
    repro = ["-m", "streetvision", "repro"]
    assert given_to_python(makefile, "repro", f"PRESET={name}") == [*repro, f"--preset={name}"]
    assert given_to_python(makefile, "repro") == repro
    bench = ["-m", "tests.benchmarks", "--"]
    assert given_to_python(makefile, "bench", f"ONLY={name}") == [*bench, name]
    assert given_to_python(makefile, "bench", ONLY=name) == [*bench, name]


def test_they_call_targets_of_the_makefile() -> None:
    lines = [line for path in WORKFLOWS for step in steps(path) for line in [step.get("run", "")]]
    targets = {line.split()[1] for line in lines if line.startswith("make ")}
    makefile = (REPOSITORY / "Makefile").read_text()
    assert {"test", "report"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_gate_is_first_and_needs_no_data() -> None:
    """Results that are stale are judged by nothing; the report is made all the same."""
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/review.yml").read_text())["jobs"]
    lines = [step.get("run", "") for step in jobs["report"]["steps"]]
    gate = lines.index('.venv/bin/streetvision gate --inconclusive pass -- "$BASE"')
    assert [line for line in lines[:gate] if line] == ["make venv"]
    for step in jobs["report"]["steps"][gate + 1 :]:
        assert step["if"] == "${{ !cancelled() }}"
    assert jobs["comment"]["if"].startswith("${{ !cancelled() && needs.report.outputs.")


MARKER = "<!-- streetvision review -->"
# What GitHub may list: another workflow's comment, somebody's who knows the marker, ours.
COMMENTS = [
    {"id": 1, "user": {"login": "github-actions[bot]"}, "body": f"coverage, not {MARKER}"},
    {"id": 2, "user": {"login": "somebody"}, "body": f"{MARKER}\n"},
    {"id": 3, "user": {"login": "github-actions[bot]"}, "body": f"{MARKER}\nold"},
    {"id": 4, "user": {"login": "github-actions[bot]"}, "body": "later"},
]


@pytest.mark.parametrize(
    ("read_only", "listed", "called"),
    [
        ("true", COMMENTS, None),  # a fork or Dependabot: the summary alone
        ("false", COMMENTS, "--method PATCH repos/o/r/issues/comments/3"),
        ("false", COMMENTS[:2], "--method POST repos/o/r/issues/7/comments"),
        ("false", [], "--method POST repos/o/r/issues/7/comments"),
    ],
)
def test_the_comment(
    tmp_path: Path, read_only: str, listed: list[dict[str, Any]], called: str | None
) -> None:
    """It is found by a marker of ours, not as the last one of its author."""
    script = next(
        step["run"] for step in steps(REPOSITORY / ".github/workflows/review.yml")
        if step.get("name") == "comment"
    )  # fmt: skip
    (tmp_path / "listed.json").write_text(json.dumps(listed))
    gh = tmp_path / "bin/gh"
    gh.parent.mkdir()
    gh.write_text(f"#!{sys.executable}\n{GH}")
    gh.chmod(0o755)
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.md").write_text(REPORT + "long " * 20_000)
    environment = os.environ | {
        "PATH": f"{gh.parent}:{os.environ['PATH']}", "READ_ONLY": read_only, "NUMBER": "7", "GH_REPO": "o/r",
        "PICTURES": "https://example.org/a", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }  # fmt: skip
    subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, check=True)
    comment = (tmp_path / "comment.md").read_text()
    assert comment == (tmp_path / "summary").read_text()
    assert comment.startswith(
        f"{MARKER}\n[Pictures and plots](https://example.org/a)\n\n# What this change does\n\n| MCC | 0.9 |\n"
    )
    assert "![" not in comment
    assert len(comment) < 65_536
    written = tmp_path / "called"
    if called is None:
        assert not written.exists()
    else:
        assert written.read_text() == f"api --silent {called} -F body=@comment.md\n"


def test_tokens_that_may_not_write_are_known() -> None:
    jobs = yaml.safe_load((REPOSITORY / ".github/workflows/review.yml").read_text())["jobs"]
    read_only = jobs["comment"]["steps"][-1]["env"]["READ_ONLY"]
    assert "head.repo.full_name != github.repository" in read_only
    assert "github.actor == 'dependabot[bot]'" in read_only
