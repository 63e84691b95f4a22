"""``python -m fmkernels`` is the command ``fmkernels``."""

import sys

from fmkernels.focalmix.cli import main

if __name__ == "__main__":
    sys.exit(main())
