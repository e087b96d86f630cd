"""The house rules that syntax trees can tell: imports go down, heavy packages are imported late, only the command line prints.

A new file of mmalign/ needs a floor in FLOORS. A sideways import needs a line in SIDEWAYS, and floor 1 has none to give.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmalign

ROOT = Path(mmalign.__file__).parents[1]
ROOMS = (
    {"__init__", "errors", "devices"},
    {
        "losses",
        "likelihoods",
        "noise",
        "records",
        "config",
        "metrics",
        "scorers",
        "memory",
        "statistics",
        "model_card",
        "processes",
        "prompts",
        "readability",
        "stages",
    },
    {
        "families",
        "models",
        "importers",
        "language",
        "multimodal",
        "annotation",
        "cache",
        "curation",
        "exams",
        "report",
        "checkpoints",
        "objective",
        "optimisers",
        "sources",
        "training",
        "digits",
        "digits_flow",
        "loop",
        "moving_reference",
        "asked",
        "prose",
        "smollm2",
        "judging",
    },
    {"adapters"},
    {
        "train",
        "generate",
        "answer",
        "answerers",
        "blind",
        "blind_model",
        "blind_rows",
        "claims",
        "score",
        "rank",
        "evaluate",
        "evaluate_texts",
        "exam",
        "sight",
        "sight_sides",
        "export",
        "prepare",
        "validate_data",
        "text_findings",
        "doctor",
        "quickstart",
        "text_quickstart",
        "recipes",
        "experiment",
        "loss_data",
        "held_out",
        "kept_scores",
        "clips",
        "snapshots",
        "makers",
        "select",
        "relabel",
        "pairs",
        "row_files",
    },
    {"cli", "__main__", "apps", "annotate"},
)
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
SIDEWAYS = {
    "devices": {"errors"},
    "annotation": {"importers"},
    "curation": {"importers", "language"},
    "digits_flow": {"digits"},
    "prose": {"digits"},
    "smollm2": {"digits", "language", "prose"},
    "language": {"checkpoints"},
    "multimodal": {"checkpoints", "language"},
    "models": {"checkpoints", "families"},
    "loop": {"checkpoints", "moving_reference", "objective", "optimisers", "sources", "training"},
    "sources": {"cache", "models", "moving_reference"},
    "training": {"moving_reference", "optimisers"},
    "experiment": {"loss_data"},
    "train": {"experiment"},
    "snapshots": {"experiment"},
    "makers": {"snapshots"},
    "generate": {"claims", "makers"},
    "answerers": {"experiment", "makers", "snapshots"},
    "answer": {"answerers", "blind_model", "claims", "makers"},
    "blind": {"answerers", "blind_model", "blind_rows", "claims", "makers", "row_files"},
    "blind_model": {"answerers"},
    "exam": {"sight"},
    "sight": {"blind_rows", "held_out", "row_files", "sight_sides", "snapshots"},
    "sight_sides": {"blind_model"},
    "prepare": {"experiment"},
    "validate_data": {"text_findings"},
    "select": {"row_files"},
    "relabel": {"row_files"},
    "pairs": {"row_files"},
    "evaluate": {"evaluate_texts", "score", "experiment", "held_out", "clips", "kept_scores"},
    "held_out": {"experiment"},
    "quickstart": {"train", "generate", "score", "evaluate", "prepare", "text_quickstart"},
    "text_quickstart": {"train"},
    "__main__": {"cli"},
    "annotate": {"apps"},
    "apps": {"annotate"},
}
HEAVY = {"transformers", "diffusers", "peft", "open_clip", "gradio", "datasets", "sklearn", "matplotlib"}
PRINTERS = {"cli", "config"}
ADDRESS = re.compile(r"(mmalign(?:\.\w+)+):\w+")


def sources() -> list[Path]:
    return sorted([*ROOT.glob("mmalign/**/*.py"), *ROOT.glob("apps/**/*.py")])


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "apps" else parts[1]


def imported_rooms(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and room of each import of mmalign, wherever it stands, and of each address "mmalign.room:THING"."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*above, *([node.module] if node.module else [])))
            names = [f"{start}.{alias.name}" for alias in node.names] if start == "mmalign" else [start]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (found := ADDRESS.fullmatch(node.value)):
            names = [found[1]]
        for name in names:
            root, *rest = name.split(".")
            if root == "mmalign":
                known = rest and (rest[0] in FLOORS or (ROOT / "mmalign" / rest[0]).is_dir())
                yield getattr(node, "lineno", 0), rest[0] if known else "__init__"


def faults_of_imports(room: str, source: str, package: tuple[str, ...] = ("mmalign",)) -> list[str]:
    """Sentences about imports that go up or sideways."""
    found = []
    for line, other in imported_rooms(ast.parse(source), package):
        if other == room or other in SIDEWAYS.get(room, ()):
            continue
        here, there = FLOORS[room], FLOORS.get(other, len(ROOMS))
        if there >= here:
            way = "sideways" if there == here else "up"
            found.append(
                f"line {line}: {room} (floor {here}) imports {other} (floor {there}), which goes {way}. Imports only go down."
            )
    return found


def at_module_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run on import: not those of functions, nor under `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not guarded and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                waiting.append(child)
                if isinstance(child, ast.stmt):
                    yield child


def heavy_imports(source: str) -> list[str]:
    """Sentences about heavy packages imported at module level."""
    found = []
    for node in at_module_level(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            if name.split(".")[0] in HEAVY:
                found.append(
                    f"line {node.lineno}: {name} is imported at module level. Import it inside the function that needs it."
                )
    return found


def prints(source: str) -> list[str]:
    """Sentences about calls of print."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"line {call.lineno}: print(...) outside the command line. Log it: logging.getLogger(__name__).info(...)."
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]


def test_every_file_has_a_floor() -> None:
    homeless = [str(p.relative_to(ROOT)) for p in sources() if room_of(p) not in FLOORS]
    assert ROOT / "mmalign/errors.py" in sources()
    assert not homeless, (
        f"{', '.join(homeless)}: no floor yet. Add the room to ROOMS in tests/test_floors.py, as low as its imports allow."
    )


def test_imports_only_go_down() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in sources()
        if room_of(path) in FLOORS
        for fault in faults_of_imports(room_of(path), path.read_text(), path.relative_to(ROOT).parent.parts)
    ]
    assert not found, "\n".join(["", *found])


def test_heavy_packages_are_imported_where_they_are_needed() -> None:
    found = [f"{path.relative_to(ROOT)}: {fault}" for path in sources() for fault in heavy_imports(path.read_text())]
    assert not found, "\n".join(["", *found])


def test_only_the_command_line_prints() -> None:
    quiet = [path for path in sources() if room_of(path) not in PRINTERS]
    found = [f"{path.relative_to(ROOT)}: {fault}" for path in quiet for fault in prints(path.read_text())]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    ("room", "source", "way"),
    [
        ("losses", "import mmalign.loop", "up"),
        ("losses", "from mmalign.noise import VPSchedule", "sideways"),
        ("losses", "from mmalign import noise", "sideways"),
        ("noise", "def f():\n    from mmalign.train import main", "up"),
        ("noise", "if TYPE_CHECKING:\n    from mmalign.adapters import ADAPTERS", "up"),
        ("objective", "table = Table('mmalign.adapters:ADAPTERS')", "up"),
        ("train", "from mmalign.prepare import main", "sideways"),
        ("errors", "import mmalign", "sideways"),
        ("loop", "from .adapters import diffusion", "up"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_told(room: str, source: str, way: str) -> None:
    [fault] = faults_of_imports(room, source)
    assert f"which goes {way}" in fault


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("losses", "from mmalign.losses.links import PreferenceLoss\nfrom mmalign.errors import UserError"),
        ("loop", "import torch, mmalign\nfrom mmalign import checkpoints\nfrom mmalign.config import Choice"),
        ("train", "Table('mmalign.adapters:ADAPTERS')"),
    ],
)
def test_an_import_that_goes_down_is_silent(room: str, source: str) -> None:
    assert faults_of_imports(room, source) == []


def test_a_heavy_import_is_told_only_at_module_level() -> None:
    assert len(heavy_imports("try:\n    import diffusers.utils\nexcept ImportError:\n    pass\nfrom sklearn import svm")) == 2
    assert heavy_imports("def f():\n    import diffusers\nif TYPE_CHECKING:\n    import datasets\nimport torch") == []


def test_a_print_is_told() -> None:
    assert len(prints("def f():\n    print(1)\nfingerprint(2)")) == 1
