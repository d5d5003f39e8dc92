"""`python -m intlm`: the command line."""

import sys

from intlm.cli import main

sys.exit(main())
