"""The house rules that can be read from the source: arrows point one way, importing is cheap, files stay small."""

import ast
import subprocess
import sys
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mimir_fast"

LEAVES = {"_tyro", "philox", "versions", "validation", "world", "extensions", "registry", "sizes"}


class Room(NamedTuple):
    """A folder of the package."""

    holds: str
    imports: tuple[str, ...]
    """Rooms and files that it may import, beside itself and the leaves."""


_LOWER = ("layers", "ops", "checkpoints")
ROOMS = {
    "ops": Room("definition, registration, gradient, public function", ("_native",)),
    "checkpoints": Room("reading, verifying and writing checkpoints", ()),
    "layers": Room("layers as modules, the fused paths beside them, models on loan to an attack", ("ops", "_native")),
    "models": Room("masked model, classifier, weights from elsewhere; `families/`: one family per file", _LOWER),
    "attacks": Room("threat model and attacks; they leave no trace", ("models", "layers", "ops", "losses")),
    "methods": Room(
        'a batch in, `{"loss": …}` out; one file per method',
        ("attacks", "models", "layers", "ops", "losses", "data.batch"),
    ),
    "data": Room("sources, order, loaders, prepared shards", ("ops.crop_resize", "checkpoints.durable", "cli")),
    "training": Room("the one loop and its parts", ("methods", "attacks", "models", "data", *_LOWER)),
    "evaluation": Room(
        "topics of the report, each one file in `topics/`; suites, images, progress",
        ("training", "methods", "attacks", "models", "data", "losses", *_LOWER),
    ),
    "probing": Room(
        "what a frozen encoder knows: neighbours, linear and attentive probes",
        ("evaluation", "attacks", "models", "data", *_LOWER),
    ),
    "exporting": Room(
        "export formats, each one file in `formats/`; the comparison with what is exported", ("models", *_LOWER)
    ),
    "recipes": Room(
        "named configurations", ("training", "evaluation", "methods", "attacks", "models", "data", "cli")
    ),
    "reproduction": Room(
        "the demo and the ablation: stages, cells, tables",
        ("recipes", "training", "evaluation", "methods", "attacks", "models", "data", *_LOWER),
    ),
}  # fmt: skip


def table() -> str:
    """As CONTRIBUTING.md has it."""
    lines = ["| folder | what it holds | may import |", "| --- | --- | --- |"]
    for name, room in ROOMS.items():
        others = ", ".join(f"`{other}`" for other in room.imports) or "nothing of ours"
        lines.append(f"| `mimir_fast/{name}/` | {room.holds} | {others} |")
    return "\n".join(lines) + "\n"


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("mimir_fast.") for name in found if name.startswith("mimir_fast.")}


def files_imported(path: Path, files: Collection[str]) -> set[str]:
    """Those of our modules that a file imports anywhere but for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(name if name in files else node.module for name in inner)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found & set(files)


def test_arrows_point_one_way() -> None:
    wrong = []
    for room, (_, others) in ROOMS.items():
        allowed = (room, *others)
        for path in (PACKAGE / room).rglob("*.py"):
            for module in imports_of(path):
                if module.split(".")[0] in LEAVES:
                    continue
                if not any(module == ok or module.startswith(ok + ".") for ok in allowed):
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_table_for_contributors_is_these_rooms() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(ROOMS)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert table() in text, f"CONTRIBUTING.md: put in\n{table()}"


def test_no_file_imports_itself_by_a_way_round() -> None:
    """Also not by imports inside functions: what two files need of each other belongs into a third."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
             for path in PACKAGE.rglob("*.py")}  # fmt: skip
    graph = {name: files_imported(path, files) - {name} for name, path in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"import circle: {' <- '.join(error.args[1])}") from None


def test_kernels_know_nothing_of_the_package() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imports_of(path), path


IMPORTS = """
import os, sys, torch
if os.fork() == 0:
    import mimir_fast.data
    heavy = ("PIL", "sklearn", "nvidia.dali", "webdataset", "torchvision")
else:
    os.wait()
    import mimir_fast
    names = [getattr(mimir_fast, n) for n in mimir_fast.__all__]
    heavy = ("timm", "torchvision", "tyro", "rich", "matplotlib", "xformers", "nvidia", "sklearn", "tensorboard", "PIL")
print([m for m in heavy if m in sys.modules])
"""


def test_importing_the_package_needs_only_torch() -> None:
    """No optional package is loaded by `import mimir_fast` or by the public ops; no image library by the data room."""
    out = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == ["[]", "[]"]


def test_files_stay_small_and_say_what_they_are() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"
        assert text.count("\n") <= 500, f"{path} is longer than 500 lines: one idea each?"
