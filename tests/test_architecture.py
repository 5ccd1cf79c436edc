"""The house rules that can be read from the source: arrows point one way, importing is cheap, files stay small."""

import ast
import subprocess
import sys
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mimir_fast"

# Room: the rooms (and leaf modules) it may import. `ops` may also use the kernels and the native door.
LEAVES = {"philox", "versions", "validation", "world", "extensions", "registry"}
ALLOWED = {
    "ops": {"ops", "_native"},
    "checkpoints": {"checkpoints"},
    "models": {"models", "ops", "checkpoints"},  # reading a run's weights
    "attacks": {"attacks", "models", "ops", "losses"},
    "methods": {"methods", "attacks", "models", "ops", "losses", "data.batch"},
    "data": {"data", "ops.crop_resize", "cli"},  # prepare is a command
    "training": {"training", "methods", "attacks", "models", "ops", "data", "checkpoints"},
    "evaluation": {"evaluation", "checkpoints", "training", "methods", "attacks", "models", "ops", "data", "losses"},
    "reproduction": {
        "reproduction",
        "checkpoints",
        "recipes",
        "training",
        "evaluation",
        "methods",
        "attacks",
        "models",
        "data",
    },
    "recipes": {"recipes", "training", "methods", "attacks", "models", "data", "evaluation", "cli"},
}


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
    for room, allowed in ALLOWED.items():
        for path in (PACKAGE / room).rglob("*.py"):
            for module in imports_of(path):
                if module.split(".")[0] in LEAVES:
                    continue
                if not any(module == ok or module.startswith(ok + ".") for ok in allowed):
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


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


def test_importing_the_package_needs_only_torch() -> None:
    """No optional package is loaded by `import mimir_fast` or by the public ops."""
    code = (
        "import sys, mimir_fast; names = [getattr(mimir_fast, n) for n in mimir_fast.__all__];"
        "print([m for m in ('timm', 'torchvision', 'tyro', 'rich', 'matplotlib', 'xformers', 'nvidia', 'sklearn',"
        " 'tensorboard', 'PIL') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_files_stay_small_and_say_what_they_are() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"
        assert text.count("\n") <= 500, f"{path} is longer than 500 lines: one idea each?"
