"""Run the tests of the miner's detector with the miner in each environment of the subnet: `make compat`.

Not a part of `make test`: an environment is made once, which downloads 3 GB, takes minutes and 5 GB of disk
(less where pip is told of an index with PyTorch's builds for CPUs alone). They are kept in the user's cache,
or in COMPAT_CACHE, and made anew when their list changes. NATIX_CHECKOUTS, checkouts of the subnet named
like PATH, has the subnet's own miner and validator run, too.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
# Names of the lists beside this file, and the Python of each.
ENVIRONMENTS = {"v0.4.1": "3.11", "before-v0.4": "3.10"}


def main() -> int:
    """Make what is missing, run the tests in each environment; returns 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}; default: all")
    names = parser.parse_args().names or list(ENVIRONMENTS)
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"{', '.join(unknown)} is not one of {', '.join(ENVIRONMENTS)}")
    failed = False
    for name in names:
        python = environment(name)
        print(f"== {name}: {python}", flush=True)
        settings = {**os.environ, "MINER_PYTHON": str(python), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/bundle/natix"]
        failed |= subprocess.run(command, cwd=REPOSITORY, env=settings, check=False).returncode != 0
    return int(failed)


def environment(name: str) -> Path:
    """Return the interpreter of an environment, which is made if it is not there."""
    listed = HERE / f"{name}.txt"
    cache = os.environ.get("COMPAT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = hashlib.sha256(listed.read_bytes()).hexdigest()[:12]
    folder = (Path(cache) if cache else base / "streetvision/compat") / f"{name}-{version}"
    python = folder / "bin/python"
    if not (folder / "made").exists():
        print(f"== {name}: making {folder}, which downloads 3 GB", flush=True)
        started = time.monotonic()
        source = interpreter(ENVIRONMENTS[name])
        subprocess.run([source, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-r", listed]
        subprocess.run(pip, check=True)
        (folder / "made").touch()
        print(f"== {name}: made in {time.monotonic() - started:.0f} s", flush=True)
    return python


def interpreter(version: str) -> str:
    """Return a Python of that version: from the path, pyenv or uv."""
    found = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found += sorted(str(path) for path in pyenv.glob(f"versions/{version}.*/bin/python"))
    if uv := shutil.which("uv"):
        asked = [uv, "python", "find", version]
        found.append(subprocess.run(asked, capture_output=True, text=True, check=False).stdout)
    for candidate in (path.strip() for path in found if path):
        if candidate and runs(candidate, version):  # pyenv has a program for versions it has not
            return candidate
    sys.exit(f"Python {version} is needed: no python{version} on the path, in pyenv or in uv")


def runs(python: str, version: str) -> bool:
    """Whether a program is a Python of that version."""
    command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() == version


if __name__ == "__main__":
    sys.exit(main())
