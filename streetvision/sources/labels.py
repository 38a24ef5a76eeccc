"""What a label means: one reader for every source and command.

A column is read as a whole, because what a value means depends on the others: "None" beside "Roadwork" is
a class, beside "1" and "0" it is what `str` makes of a missing value.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from streetvision.core.errors import UserError
from streetvision.sources.values import MISSING, is_missing, stripped

logger = logging.getLogger(__name__)

# Names of classes, without case and without blanks, hyphens and underscores between their words.
_WORK = r"(road(way)?works?|(road(way)?|highway|street)?constructions?|(work|constructions?)zones?)"
_PLACE = r"(zones?|sites?|areas?|present|visible|detected|ahead|inprogress)?"
_ROADWORK = re.compile(rf"(is|has|with|under)?{_WORK}{_PLACE}")
_NO_ROADWORK = re.compile(
    r"(there(is|are))?(is|has)?(no|non|not|without)(any|signsof|visible|under)*"
    rf"{_WORK}{_PLACE}|{_WORK}(absent|free)"
)
_POSITIVE = frozenset({"positive", "pos", "yes", "y", "true", "t", "present"})
_NEGATIVE = frozenset(
    {"negative", "neg", "no", "n", "false", "f", "none", "clear", "nothing", "absent"}
)
_NUMBERED = re.compile(r"(class|label)?([01])")  # `LABEL_1` is what transformers calls a class
_WHOLE = re.compile(r"[+-]?\d{1,18}(\.0*)?")
_NO_NAME = re.compile(r"[+-]?\d[\d.e+-]*|true|false")
_NONE = "none"
# More of a column's labels than this not understood: it has other classes, not a few slips.
MAX_UNKNOWN_SHARE = 0.1
MAX_LABEL_CHARACTERS = 200  # that are looked at
MAX_LABEL_VALUES = 1000  # of a source; more are no classes
_MAX_SHOWN, _MAX_NAME_SHOWN = 8, 60  # values that an error lists, their characters
_WAY_OUT = (
    "labels are 0 and 1, True and False, or sure names such as None and Roadwork; say which others mean "
    "roadwork with positive_classes and negative_classes (of the source in data.sources)"
)


def class_label(name: str) -> int | None:
    """1 where a class name surely means roadwork, 0 where it surely means none, else None.

    Any case, with blanks, hyphens, underscores or nothing between words: `no_roadwork`, `Work Zone`.
    """
    name = _squashed(name)
    if name in _POSITIVE or _ROADWORK.fullmatch(name):
        return 1
    if name in _NEGATIVE or _NO_ROADWORK.fullmatch(name):
        return 0
    numbered = _NUMBERED.fullmatch(name)
    return int(numbered[2]) if numbered else None


def denies_roadwork(description: str) -> bool:
    """Whether a description says only that there is no roadwork: "No roadwork visible."."""
    return bool(_NO_ROADWORK.fullmatch(_squashed(description.rstrip(". "))))


def _squashed(name: str) -> str:
    """Without case and separators of words; a leading sign stays, it may mean "not"."""
    name = unicodedata.normalize("NFKC", stripped(name)).casefold()
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", "", name)


def _spelled(value: object, names: Sequence[str] = ()) -> str | None:
    """One spelling of a label's value; None where there is none. `names`: what the file calls 0, 1, …."""
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if isinstance(value, str):
        value = stripped(value[:MAX_LABEL_CHARACTERS])
        if value.casefold() in MISSING - {_NONE}:
            return None
        if not _WHOLE.fullmatch(value):
            return _squashed(value)
        value = int(value.partition(".")[0])
    elif is_missing(value):
        return None
    if isinstance(value, int | float | Decimal) and math.isfinite(value) and int(value) == value:
        number = int(value)
        return _squashed(names[number]) if 0 <= number < len(names) else str(number)
    return str(value)


def _show(value: object) -> str:
    text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
    return stripped(text[:MAX_LABEL_CHARACTERS])[:_MAX_NAME_SHOWN]


@dataclass(frozen=True)
class ClassNames:
    """What a user calls the classes, where it is not sure by itself: `positive_classes`, `negative_classes`."""

    positive: Sequence[str] = ()
    negative: Sequence[str] = ()


SURE_NAMES = ClassNames()  # no further ones


@dataclass(frozen=True)
class LabelReader:
    """Reads the labels of one source; `learn` makes it of all of them.

    Attributes
    ----------
    counts : rows of each spelling; missing labels are left out
    meaning : label of each spelling that is understood
    shown : each spelling as the source has it
    declared : spellings of the classes that a file names beside its numbers
    """

    counts: Mapping[str, int]
    meaning: Mapping[str, int]
    shown: Mapping[str, str]
    declared: frozenset[str] = frozenset()

    @classmethod
    def learn(
        cls,
        columns: Iterable[tuple[Mapping[Any, int], Sequence[str]]],
        classes: ClassNames = SURE_NAMES,
    ) -> LabelReader:
        """Find out what the labels of a source mean.

        Understood are 0 and 1 however they are stored (`1.0`, `True`, `"1"`), and names of classes that are
        sure (`class_label`). "None" is the class without roadwork if it stands alone or beside names of
        classes, else a missing label.

        Parameters
        ----------
        columns
            Of each file: rows by value, and what its 0, 1, … are called; empty if nothing says so.
        classes
            Names of classes with and without roadwork, which come before what is understood otherwise. For
            names and numbers in any column: `ClassNames(["barrier"], ["street"])`, `ClassNames(["2"], ["1"])`.
        """
        given = {_spelled(name) or _squashed(name): 1 for name in classes.positive}
        given |= {_spelled(name) or _squashed(name): 0 for name in classes.negative}
        counts: Counter[str] = Counter()
        shown: dict[str, str] = {}
        declared: set[str] = set()
        for values, names in columns:
            for value, rows in values.items():
                spelling = _spelled(value, names)
                if spelling is not None:
                    counts[spelling] += rows
                    shown.setdefault(spelling, _show(value))
            for name in names:  # also those that no row has
                shown[_squashed(name)] = _show(name)
                counts[_squashed(name)] += 0
                declared.add(_squashed(name))
        meaning = {}
        for spelling in counts:
            label = given.get(spelling, class_label(spelling))
            if label is not None:
                meaning[spelling] = label
        if _NONE in meaning and _NONE not in given and _NONE not in declared:
            others = [other for other in counts if other != _NONE]
            no_names = all(_NO_NAME.fullmatch(other) for other in others)
            if others and (no_names or 0 in (meaning.get(other) for other in others)):
                logger.warning(
                    'labels "%s" are taken for missing: the others are %s',
                    shown.pop(_NONE), ", ".join(shown[other] for other in others[:_MAX_SHOWN]),
                )  # fmt: skip
                del meaning[_NONE], counts[_NONE]
        return cls(dict(counts), meaning, shown, frozenset(declared))

    def read(self, value: object, names: Sequence[str] = ()) -> int | None:
        """Label of one value: 0, 1, or None if it is missing or not understood."""
        spelling = _spelled(value, names)
        return None if spelling is None else self.meaning.get(spelling)

    def unknown(self, value: object, names: Sequence[str] = ()) -> str | None:
        """How to show a value that is there but not understood; None of any other."""
        spelling = _spelled(value, names)
        if spelling is None or spelling in self.meaning or spelling not in self.counts:
            return None
        return self.shown[spelling]

    def check(self, place: str) -> None:
        """Refuse labels whose classes cannot be told; a few slips pass.

        Raises
        ------
        UserError
            More than a tenth of the labels, or a class that a file names, is not understood; or something
            is not and all else means the same; or all classes that a file names do.
        """
        unknown = [each for each in self.counts if each not in self.meaning]
        total = sum(self.counts.values())
        n_unknown = sum(self.counts[each] for each in unknown)
        found = {label for each, label in self.meaning.items() if self.counts[each]}
        declared = {self.meaning.get(each) for each in self.declared}
        if (
            n_unknown > MAX_UNKNOWN_SHARE * total
            or (n_unknown and len(found) < 2)
            or (declared and declared != {0, 1})
        ):
            raise UserError(f"{place}: {self.explain()}")

    def explain(self) -> str:
        """Say what each label is taken for, those not understood first, and the way out."""
        taken = {1: "roadwork", 0: "no roadwork", None: "not understood"}
        known = sorted(self.counts, key=lambda each: (each in self.meaning, each))
        rows = [
            f'"{self.shown[each]}" ({self.counts[each]} rows: {taken[self.meaning.get(each)]})'
            for each in known[:_MAX_SHOWN]
        ]
        rows += [f"{len(known) - _MAX_SHOWN} more"] * (len(known) > _MAX_SHOWN)
        return f"cannot tell what the labels mean: {', '.join(rows)}; {_WAY_OUT}"


def read_labels(values: Sequence[object], wrong: Callable[[int, str], str]) -> list[int | None]:
    """Labels of a short table's column; None where one is missing.

    `wrong` makes the error of the first that is not understood, of its row and of how to show it.

    Raises
    ------
    UserError
        Some are not understood.
    """
    # What JSON may nest is shown as text: it is no label.
    plain = [
        value if isinstance(value, str | int | float | None) else repr(value) for value in values
    ]
    labels = LabelReader.learn([(Counter(plain), ())])
    for row, value in enumerate(plain):
        if (shown := labels.unknown(value)) is not None:
            raise UserError(wrong(row, shown))
    return [labels.read(value) for value in plain]
