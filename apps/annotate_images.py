"""Judge images in the browser: `python apps/annotate_images.py DATA ...` is `mmalign annotate images DATA ...`."""

import sys

from mmalign.annotate import AnnotateConfig, main
from mmalign.config import command_line

if __name__ == "__main__":
    sys.exit(command_line(AnnotateConfig, main, ["images", *sys.argv[1:]], prog="apps/annotate_images.py"))
