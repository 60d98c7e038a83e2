"""``python -m nbgrad``."""

import sys

from nbgrad.cli import main

sys.exit(main())
