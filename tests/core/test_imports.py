"""The import closure on a small package: late, nested and package imports; names are no modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from streetvision.core.imports import code_sha256, import_closure

FILES = {
    "stages/__init__.py": "",
    "stages/work.py": "import streetvision.a\nimport os.path\nfrom numpy import array\n",
    "stages/other.py": "import streetvision.unused\n",
    "streetvision/__init__.py": "from streetvision.version import number\n",
    "streetvision/version.py": "number = 1\n",
    "streetvision/a.py": (
        "from streetvision.sub import late_name, module_b\n"
        "def work():\n"
        "    if True:\n"
        "        from streetvision.late import thing\n"
        "    return thing\n"
    ),
    "streetvision/late.py": "import streetvision.a\nthing = 1\n",  # a circle
    "streetvision/unused.py": "",
    "streetvision/sub/__init__.py": "late_name = 1\n",
    "streetvision/sub/module_b.py": "import yaml\n",
    "streetvision/sub/late_name2.py": "",
    "numpy/__init__.py": "raise RuntimeError('must not count')\n",
}
NEEDED = [
    "stages/__init__.py",
    "stages/work.py",
    "streetvision/__init__.py",
    "streetvision/a.py",
    "streetvision/late.py",
    "streetvision/sub/__init__.py",
    "streetvision/sub/module_b.py",
    "streetvision/version.py",
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_closure_is_what_a_module_needs_and_no_more(project: Path) -> None:
    closure = [
        path.relative_to(project).as_posix() for path in import_closure("stages.work", project)
    ]
    assert closure == NEEDED


def test_an_imported_name_is_not_a_module(project: Path) -> None:
    # `late_name` is a name in sub/__init__.py; as a file of that name it is a module and counts.
    (project / "streetvision/sub/late_name.py").write_text("")
    closure = import_closure("stages.work", project)
    assert project / "streetvision/sub/late_name.py" in closure


def test_a_module_that_does_not_exist_needs_only_its_packages(project: Path) -> None:
    assert import_closure("stages.nothing", project) == [project / "stages/__init__.py"]


def test_the_hash_follows_the_closure_alone(project: Path) -> None:
    before = code_sha256("stages.work", project)
    (project / "streetvision/unused.py").write_text("changed = True\n")
    (project / "stages/other.py").write_text("changed = True\n")
    assert code_sha256("stages.work", project) == before
    for name in NEEDED:
        old = (project / name).read_text()
        (project / name).write_text(old + "# changed\n")
        assert code_sha256("stages.work", project) != before
        (project / name).write_text(old)
    assert code_sha256("stages.work", project) == before


def test_a_renamed_file_changes_the_hash(project: Path) -> None:
    before = code_sha256("stages.work", project)
    text = (project / "streetvision/version.py").read_text()
    (project / "streetvision/version.py").unlink()
    (project / "streetvision/version").mkdir()
    (project / "streetvision/version/__init__.py").write_text(text)
    assert code_sha256("stages.work", project) != before


def test_real_imports_agree(repository: Path) -> None:
    """What Python loads for a stage's modules at import time is within the closure."""
    import subprocess
    import sys

    code = (
        "import sys, stages.sweep, streetvision.decision.report\n"
        "print('\\n'.join(m.__file__ for n, m in sys.modules.items()"
        " if n.split('.')[0] in ('streetvision', 'stages') and m.__file__))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.split()
    closure = {str(path) for path in import_closure("stages.sweep", repository)}
    assert set(loaded) <= closure
    assert len(loaded) > 5
