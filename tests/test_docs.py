"""README and the pages under `docs/` hold the present: links lead somewhere, commands exist, no history."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from streetvision.cli import main
from tests.pipeline.project import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]
LINK = re.compile(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"')
README_WORDS = 1000


def anchors(page: Path) -> set[str]:
    """What GitHub and MkDocs call a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for found in LINK.findall(page.read_text()):
        link = "".join(found)
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(REPOSITORY), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_readme() -> None:
    links = {"".join(found).partition("#")[0] for found in LINK.findall(PAGES[0].read_text())}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_it_names_no_commit_and_no_script_that_is_gone(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"not kept|of [0-9a-f]{7}\b|commit [0-9a-f]{7}\b", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in set(
        re.findall(r"(?:^|`)streetvision ([a-z][a-z-]+)", page.read_text(), re.MULTILINE)
    ):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0, command
    targets = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE))
    makefile = (REPOSITORY / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets), targets
    capsys.readouterr()


def test_readme_is_short() -> None:
    assert len(PAGES[0].read_text().split()) <= README_WORDS
