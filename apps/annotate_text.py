"""Judge texts in the browser: `python apps/annotate_text.py DATA ...` is `mmalign annotate text DATA ...`."""

import sys

from mmalign.annotate import AnnotateConfig, main
from mmalign.config import command_line

if __name__ == "__main__":
    sys.exit(command_line(AnnotateConfig, main, ["text", *sys.argv[1:]], prog="apps/annotate_text.py"))
