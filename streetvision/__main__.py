"""`python -m streetvision`: the project's commands, as the installed program `streetvision`.

Python puts the working directory first on its path here, so that a `yaml.py` in a folder of somebody else
would be run. Unless that folder is the project itself, it is taken off again before anything is imported. What
a folder with a `streetvision/` of its own would do cannot be undone: for folders of others, `streetvision`.
"""

import os
import sys

_PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
if not sys.flags.safe_path and sys.path[0] != _PROJECT:
    del sys.path[0]

from streetvision.cli import program  # noqa: E402

program("python -m streetvision")
