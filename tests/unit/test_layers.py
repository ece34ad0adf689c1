"""Data flows one way: a file imports from its floor and those below, and one file owns each heavy dependency."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path("stepdistill")
# Floors from the ground: a file may import from its own floor and from those below it.
FLOORS = [
    {"messages", "rng", "jackknife", "diffusion", "run.durable", "run.places"},
    {"objectives", "demo.letters", "demo.reader", "demo.world", "evaluation.measure.drift"}
    | {"models.folder", "models.folder_files", "models.folder_scheduler"},
    {"run", "config", "run.rungs", "run.drawn_pictures", "report.grid"},
    {"models.teacher_source", "run.start_from", "run.folder", "config.load", "plan", "runtime"},
    {"models"},
    {"data"},
    {"run.log", "training", "report"},
    {"run.fork", "ladder", "export", "demo.teacher", "sampling"},
    {"evaluation"},
    {"pace", "disk_need", "finding", "doctor_teacher", "doctor", "stages", "cli", "__main__"},
]
OWNERS = {
    "peft": {"models/adapters.py"},
    "accelerate": {"runtime.py"},
    "torchmetrics": {"evaluation/measure/distances.py", "evaluation/measure/features.py"},
    "psutil": {"evaluation/draw/cost.py"},
    "matplotlib": {"report/plots.py", "demo/letters.py"},
}
TORCH_ONLY = ("diffusion", "objectives")
NO_TORCH = (
    "config",
    "run",
    "plan",
    "pace",
    "jackknife",
    "messages",
    "report",
    "models/folder",
    "models/teacher_source",
)
NO_TORCH += ("stages", "cli")
WITH_TORCH = ("run/fork", "run/log")


def modules():
    """Every file with code in it; __init__.py stands for its folder."""
    return sorted(p for p in PACKAGE.rglob("*.py") if p.stat().st_size)


def name_of(path):
    parts = path.with_suffix("").parts[1:]
    return ".".join(parts[:-1] if path.name == "__init__.py" else parts)


def floor_of(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for index, floor in enumerate(FLOORS):
            if ".".join(parts[:length]) in floor:
                return index
    raise AssertionError(f"{name} is on no floor: add it to FLOORS")


def imports(path, *, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module.startswith("stepdistill"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def known_names():
    return {f"stepdistill.{name_of(p)}" for p in modules()}


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_down(path):
    own = floor_of(name_of(path))
    for imported in set(imports(path)) & known_names():
        assert floor_of(imported.removeprefix("stepdistill.")) <= own, f"{path} imports {imported}"


def test_no_files_import_each_other_in_a_circle():
    """A folder's __init__.py that only hands on what its files hold is no file of its own here."""
    names = {name_of(path): path for path in modules() if path.name != "__init__.py"}
    graph = {
        name: {i.removeprefix("stepdistill.") for i in imports(path)} & names.keys() - {name}
        for name, path in names.items()
    }
    assert tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", modules(), ids=str)
def test_heavy_dependencies_have_one_owner(path):
    relative = path.relative_to(PACKAGE).as_posix()
    for imported in imports(path):
        root = imported.split(".")[0]
        if root in OWNERS:
            assert relative in OWNERS[root], f"{path} imports {root}"
        if relative.startswith(TORCH_ONLY):
            assert root in {"torch", "stepdistill", "collections", "dataclasses", "itertools", "math"}, (
                f"{path} imports {root}"
            )


@pytest.mark.parametrize("path", modules(), ids=str)
def test_what_runs_before_the_config_is_right_imports_no_torch(path):
    relative = path.relative_to(PACKAGE).with_suffix("").as_posix()
    if (
        any(relative == name or relative.startswith((f"{name}/", f"{name}_")) for name in NO_TORCH)
        and relative not in WITH_TORCH
    ):
        roots = {i.split(".")[0] for i in imports(path, top_level_only=True)}
        assert not roots & {"torch", "diffusers", "transformers", "peft", "accelerate"}, path


@pytest.mark.parametrize("path", modules(), ids=str)
def test_files_say_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path
    assert path.stem not in {"utils", "misc", "common", "helpers"}


def lines_of(function):
    """Without the docstring."""
    documented = bool(ast.get_docstring(function)) and len(function.body) > 1
    signature = function.body[0].lineno - function.lineno
    return signature + function.end_lineno - function.body[documented].lineno + 1


def test_functions_fit_on_a_screen():
    """40 lines without the docstring, 60 of one that is a loop and reads from top to bottom."""
    long = []
    folders = (PACKAGE, Path("pipelines"), Path("eval"), Path("docs"))
    for path in sorted(file for folder in folders for file in folder.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                loops = any(isinstance(node, ast.For | ast.While) for node in function.body)
                if lines_of(function) > (60 if loops else 40):
                    long.append(f"{path}: {function.name}, {lines_of(function)} lines")
    assert long == []


def test_stage_scripts_are_thin():
    for path in Path("pipelines").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 100, path


def test_only_the_demo_knows_letters():
    """Elsewhere a world is asked (demo/world.py): its name alone stands in defaults."""
    for path in modules():
        if path.parts[1] != "demo":
            assert "stepdistill.demo.letters" not in set(imports(path)), path
