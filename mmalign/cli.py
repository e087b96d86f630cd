"""`mmalign <verb>`: a coat over the verbs' modules, none of which is imported before it is called."""

import difflib
import importlib
import sys
from collections.abc import Sequence

import mmalign
from mmalign.config import command_line, tell

# verb -> (module with main(config), config class in it, one line of help)
VERBS: dict[str, tuple[str, str, str]] = {
    "quickstart": ("mmalign.quickstart", "QuickstartConfig", "align a small real model on this machine and see the gain"),
    "train": ("mmalign.train", "TrainConfig", "tune a model on preferences"),
    "prepare": ("mmalign.prepare", "PrepareConfig", "encode images and prompts once into a cache for training"),
    "generate": ("mmalign.generate", "GenerateConfig", "sample candidates for prompts, seeds recorded"),
    "answer": ("mmalign.answer", "AnswerConfig", "sample answers of language models, tuned ones too, seeds recorded"),
    "blind": ("mmalign.blind", "BlindConfig", "answer prompts without their images, as rejected answers for Blind PO"),
    "score": ("mmalign.score", "ScoreConfig", "judge candidates with one or more scorers"),
    "rank": ("mmalign.rank", "RankConfig", "merge and rank scored candidates for RankDPO, or select expert images"),
    "select": ("mmalign.select", "SelectConfig", "keep the rows that are worth training on"),
    "relabel": ("mmalign.relabel", "RelabelConfig", "label rows anew: votes of judges, a judge in both orders, goals"),
    "pairs": ("mmalign.pairs", "PairsConfig", "make pairs of lists, in stages from easy to hard, or of two models' answers"),
    "evaluate": ("mmalign.evaluate", "EvaluateConfig", "compare a tuned model with its base: win rate, drift, report"),
    "annotate": ("mmalign.annotate", "AnnotateConfig", "judge pairs and lists of images or texts in the browser"),
    "exam": ("mmalign.exam", "ExamConfig", "mark answers of models that see without a judge: POPE, AMBER, CHAIR, VLGuard ..."),
    "validate-data": ("mmalign.validate_data", "ValidateDataConfig", "check a preference dataset and count what is in it"),
    "export": ("mmalign.export", "ExportConfig", "write the judgements of an annotation project as a data set to train on"),
    "doctor": ("mmalign.doctor", "DoctorConfig", "say what is installed, which device there is and what would fit"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code; without a verb, or with --help, lists them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("--help", "-h", "help"):
        tell(_help())
        return 0
    verb, *rest = argv
    if verb in ("--version", "-V"):
        tell(f"mmalign {mmalign.__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb.replace("_", "-"), VERBS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"mmalign: got {verb!r}, want one of {', '.join(VERBS)}.{hint}", file=sys.stderr)
        return 2
    module_name, config_class, _ = VERBS[verb]
    module = importlib.import_module(module_name)
    return command_line(getattr(module, config_class), module.main, rest, prog=f"mmalign {verb}")


def _help() -> str:
    wide = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb.ljust(wide)}  {line}" for verb, (_, _, line) in VERBS.items())
    return (
        f"usage: mmalign VERB [CONFIG.yaml] [key=value ...] [--key value ...]\n\n{mmalign.__doc__}\n\n{verbs}\n\n"
        "mmalign VERB --help lists the settings of a verb; mmalign --version tells the version."
    )


if __name__ == "__main__":
    sys.exit(main())
