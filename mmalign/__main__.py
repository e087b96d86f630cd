"""`python -m mmalign` is `mmalign`."""

import sys

from mmalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
