"""Comparisons and judgements: typed rows on top of `datasets`, their media, their formats on disk, and the views."""

from mmalign.records.conversations import asked, entry_of, message_of
from mmalign.records.examples import Examples
from mmalign.records.faults import faults_of
from mmalign.records.frames import animation
from mmalign.records.judgements import append_judgements, read_judgements, with_judgements
from mmalign.records.media import Media, to_rgb
from mmalign.records.reading import IMAGE_SUFFIXES, MEDIA_SUFFIXES, collect, fault_of, raise_faults, read, told_faults
from mmalign.records.rows import Comparison, Content, Dropped, Example, Fault, Judgement, Message, Sample
from mmalign.records.table import COLUMNS, Conversion, comparison, features, outline_rows, outlines, to_dataset, to_row
from mmalign.records.verdicts import PHI, preference_scores, thinned
from mmalign.records.views import SIDE_DEFAULTS, VIEWS, best, joint, pair, ranked, step, unpaired
from mmalign.records.writing import FORMATS, check_target, write

__all__ = [
    "COLUMNS",
    "FORMATS",
    "IMAGE_SUFFIXES",
    "MEDIA_SUFFIXES",
    "PHI",
    "SIDE_DEFAULTS",
    "VIEWS",
    "Comparison",
    "Content",
    "Conversion",
    "Dropped",
    "Example",
    "Examples",
    "Fault",
    "Judgement",
    "Media",
    "Message",
    "Sample",
    "animation",
    "append_judgements",
    "asked",
    "best",
    "check_target",
    "collect",
    "comparison",
    "entry_of",
    "fault_of",
    "faults_of",
    "features",
    "joint",
    "message_of",
    "outline_rows",
    "outlines",
    "pair",
    "preference_scores",
    "raise_faults",
    "ranked",
    "read",
    "read_judgements",
    "step",
    "thinned",
    "to_dataset",
    "to_rgb",
    "to_row",
    "told_faults",
    "unpaired",
    "with_judgements",
    "write",
]
