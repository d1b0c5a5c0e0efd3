"""``python -m tokencache_kernels`` is the command ``tokencache``."""

import sys

from .commands.cli import main

sys.exit(main())
