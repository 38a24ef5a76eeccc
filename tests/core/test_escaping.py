"""What is written for people shows a name as a name, whatever it is."""

from __future__ import annotations

import csv
import html
import io
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streetvision import cli
from streetvision.commands.common import say
from streetvision.core.artifacts import write_csv_atomic
from streetvision.core.errors import UserError, guarded, log_to_terminal
from streetvision.core.escaping import (
    caption,
    csv_cell,
    from_csv_cell,
    markdown,
    shortened,
    terminal,
)
from streetvision.evaluation.predictions import parse_predictions
from streetvision.plots.pictures import plot_mistakes

NAMES = st.text() | st.text(
    alphabet="=+-@'\"\t\r\n1e.x|*_[](){}<>&#$!~`\\:/w \x1b\x9b\u202e\udcff", max_size=12
)


# --------------------------------------------------------------------------- terminal


@given(NAMES)
def test_a_terminal_gets_one_printable_line(name: str) -> None:
    shown = terminal(name)
    assert shown.isprintable()
    shown.encode()
    assert terminal(shown) == shown
    assert terminal(name, keep="\n").count("\n") == name.count("\n")


def test_orders_to_a_terminal_are_shown() -> None:
    assert (
        terminal("a\x1b[2Jb\x9b1m\x07\r\n\u202etxt\udcff")
        == r"a\x1b[2Jb\x9b1m\x07\r\n\u202etxt\udcff"
    )
    assert terminal("Straße 東京 😀") == "Straße 東京 😀"


def test_an_error_is_one_line_without_orders(capsys: pytest.CaptureFixture[str]) -> None:
    def failing() -> None:
        raise UserError("no \x1b]0;title\x07file\nx\u2028y \udcff")

    assert guarded("program", failing) == 2
    assert capsys.readouterr().err == "program: error: no \\x1b]0;title\\x07file x y \\udcff\n"


def test_a_log_line_holds_no_orders_and_is_one(capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        log_to_terminal(logging.INFO, "ingest: %(message)s")
        logging.getLogger("streetvision.x").warning("no %s", "\x1b[2J\nforged: line\udcff")
        logging.getLogger("lightning").warning("a\n\tb\x1b")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert capfd.readouterr().err == (
        "ingest: no \\x1b[2J\\nforged: line\\udcff\ningest: a\n\tb\\x1b\n"
    )


def test_an_answer_keeps_its_layout_only(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\tb\nc\x1b[31m\u202e\udcff")
    assert capsys.readouterr().out == "a\tb\nc\\x1b[31m\\u202e\\udcff\n"


def test_a_wrong_command_line_is_shown_without_orders(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["preset", "smoke", "--\x1b]0;x\x07"])
    assert "\\x1b]0;x\\x07" in capsys.readouterr().err


# --------------------------------------------------------------------------- Markdown


@given(NAMES)
@example("![x](http://a.b/c.png)")
@example("<script>alert(1)</script>")
@example("<!-- </details> ")
@example("__init__ *a* ~~b~~ `c` $d$ [e]: f")
@example("http://a.b www.a.b a@b.cd")
@example("a | b \\")
@example("&lt;b&gt; &amp; &#60;")
def test_markdown_shows_the_text_and_makes_nothing_of_it(name: str) -> None:
    parser = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed").MarkdownIt
    render = parser("gfm-like", {"linkify": False}).render
    wanted = terminal(name).strip()
    for before, after in (("x ", " y"), ("| a |\n| --- |\n| x ", " y |"), ("## x ", " y")):
        shown = render(f"{before}{markdown(name)}{after}")
        tags = set(re.findall(r"</?(\w+)", shown))
        assert tags <= {"p", "table", "thead", "tbody", "tr", "th", "td", "h2"}, shown
        text = html.unescape(re.sub(r"<[^>]*>", "", shown)).replace("\u200b", "")
        assert wanted.replace("\u200b", "") in text or " ".join(wanted.split()) in " ".join(
            text.split()
        )


def test_nobody_is_mentioned_and_nothing_linked() -> None:
    assert markdown("@everyone #12 http://a.b www.a.b") == (
        "@&#8203;everyone #&#8203;12 http:\\//a.b www\\.a.b"
    )
    assert markdown("$x$ a_b _c_ p_") == r"\$x\$ a_b \_c\_ p\_"
    plain = "metrics/train.json:val_select.mcc, 0.5 (3 more), data/splits: 12-3"
    assert markdown(plain) == plain


# --------------------------------------------------------------------------- CSV


@given(NAMES)
def test_a_cell_is_no_formula_and_comes_back(name: str) -> None:
    cell = csv_cell(name)
    safe = name.encode("utf-8", "backslashreplace").decode()
    assert from_csv_cell(cell) == safe
    assert not re.match(r"[=@\t\r]", cell)
    if re.match(r"[+-]", cell):
        assert float(cell) == float(name)


@pytest.mark.parametrize(
    "value", [-0.5, -3, 1e-9, None, np.float64(-2), True, "-3", "+1.5e-3", "-.5", "a=b", "'x"]
)
def test_numbers_and_plain_text_stay(value: object) -> None:
    assert csv_cell(value) is value or csv_cell(value) == value


def test_a_table_with_formulas_is_read_as_it_was(tmp_path: Path) -> None:
    names = ["=cmd|' /C calc'!A0", "+1+2", "-2+3", "@SUM(1)", "\tx", "'=y", "＝1", "plain", "-7"]
    columns = {
        "id": names, "group": [f"={name}" for name in names],
        "label": [0, 1] * 4 + [0], "probability": [0.5] * 9, "=extra": names,
    }  # fmt: skip
    text = write_csv_atomic(tmp_path / "p.csv", columns).read_text()
    cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
    assert not [cell for cell in cells if cell[:1] in set("=+@\t＝") or cell == "-2+3"]
    found = parse_predictions(text, "x")
    assert found.ids.tolist() == names
    # Names of groups have single blanks in every table.
    assert found.groups.tolist() == [f"={name}".replace("\t", " ") for name in names]


# --------------------------------------------------------------------------- pictures and lengths


@given(st.text(max_size=400), st.integers(3, 100))
def test_a_long_name_keeps_its_ends(name: str, most: int) -> None:
    shown = shortened(name, most)
    assert len(shown) <= most
    assert shown == name or (name.startswith(shown.split("…")[0]) and "…" in shown)
    assert len(shortened("x" * 300)) == 80
    assert shortened("a" * 50 + "b" * 50, 5) == "aa…bb"


def test_a_caption_is_no_formula_and_does_not_fail() -> None:
    """An unclosed brace in a formula would be an error, and a formula another picture."""
    image = np.zeros((32, 32, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odd = [
            plot_mistakes([image], [text], text)
            for text in (
                r"$\frac{$", r"$\undefined$", "$x$", r"\$x\$", "x" * 300, "\x1b[1m\x00", "東京\u202e",
                "a\nb" * 90,
            )
        ]  # fmt: skip
    assert len(set(odd)) == len(odd)
    assert plot_mistakes([image], ["$x$"]) != plot_mistakes([image], ["x"])
    assert caption("\x1b" * 100, 20) == caption("\x1b" * 100, 20)[:20]
