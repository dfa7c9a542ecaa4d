"""``python -m jqlora.cli``: the command without an installed script."""

import sys

from jqlora.cli import main

sys.exit(main())
