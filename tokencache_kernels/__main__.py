"""``python -m tokencache_kernels`` is the command ``tokencache``."""

import sys

from .cli import main

sys.exit(main())
