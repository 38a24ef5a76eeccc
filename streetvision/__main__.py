"""`python -m streetvision`: the project's commands."""

import sys

from streetvision.cli import main

sys.exit(main())
