"""`python -m jaxbench`: the command line where no script is on the path."""

import sys

from jaxbench.cli import main

sys.exit(main())
