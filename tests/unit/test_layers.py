"""Imports point down: a room (a part of the package) imports only from its floor and lower ones; each heavy dependency has
one owner."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

PACKAGE = Path("stepdistill")
# The floors from bottom to top. A room is a folder of the package, or a file beside these folders.
FLOORS = [
    {
        "errors",
        "messages",
        "terminal",
        "rng",
        "jackknife",
        "launch",
        "runtime",
        "disk",
        "images",
        "diffusion",
    },
    {"config", "objectives", "demo"},
    {"run"},
    {"teacher"},
    {"models"},
    {"data"},
    {"training", "report"},
    {"ladder", "export", "sampling", "plan"},
    {"evaluation", "shrink"},
    {"before_stage"},
    {"doctor", "stages", "cli", "__main__"},
]
OWNERS = {
    "peft": {"models/adapters.py", "models/lora_layers.py"},
    "accelerate": {"runtime.py", "training/trackers.py"},
    "torchmetrics": {"evaluation/measure/distances.py", "evaluation/measure/features.py"},
    "psutil": {"evaluation/draw/cost.py", "plan/real_update.py"},
    "matplotlib": {"report/plots.py", "demo/letters.py"},
}
TORCH_ONLY = ("diffusion", "objectives")
NO_TORCH = {
    "config",
    "disk",
    "run",
    "plan.passes",
    "plan.cards",
    "jackknife",
    "errors",
    "launch",
    "messages",
    "report",
    "before_stage",
    "stages",
    "cli",
}
NO_TORCH |= {"terminal"}
TEACHER = (
    "facts",
    "families",
    "files",
    "fingerprints",
    "folder",
    "ladder_fit",
    "same_teacher",
    "scheduler",
    "source",
)
NO_TORCH |= {f"teacher.{name}" for name in TEACHER}


def modules():
    """All files of the package that contain code."""
    return sorted(p for p in PACKAGE.rglob("*.py") if p.stat().st_size)


def name_of(path):
    parts = path.with_suffix("").parts[1:]
    return ".".join(parts[:-1] if path.name == "__init__.py" else parts)


def room_of(name):
    return name.split(".")[0]


def floor_of(room):
    return next(index for index, floor in enumerate(FLOORS) if room in floor)


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


def imported_files(path):
    names = {name_of(p) for p in modules()} - {name_of(path)}
    return {name.removeprefix("stepdistill.") for name in imports(path)} & names


def test_every_room_is_on_one_floor():
    rooms = {room_of(name_of(path)) for path in modules() if name_of(path)}
    assert sorted(rooms) == sorted(room for floor in FLOORS for room in floor)


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_down(path):
    for imported in imported_files(path) - {""}:
        if name_of(path):
            assert floor_of(room_of(imported)) <= floor_of(room_of(name_of(path))), (
                f"{path} imports {imported}"
            )


@pytest.mark.parametrize("part", [room_of, str], ids=["rooms", "files"])
def test_there_are_no_circular_imports(part):
    """Ignores __init__.py files, which only re-export what the files of their folder define."""
    graph = {}
    for path in (path for path in modules() if path.name != "__init__.py"):
        name = part(name_of(path))
        graph.setdefault(name, set()).update({part(i) for i in imported_files(path)} - {name})
    assert tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", modules(), ids=str)
def test_heavy_dependencies_have_one_owner(path):
    relative = path.relative_to(PACKAGE).as_posix()
    for imported in imports(path):
        root = imported.split(".")[0]
        if root in OWNERS:
            assert relative in OWNERS[root], f"{path} imports {root}"
        if relative.startswith(TORCH_ONLY):
            assert root in {
                "torch",
                "stepdistill",
                "collections",
                "dataclasses",
                "itertools",
                "math",
                "typing",
            }, f"{path} imports {root}"


@pytest.mark.parametrize("path", modules(), ids=str)
def test_code_that_runs_before_the_config_is_checked_imports_no_torch(path):
    if {name_of(path), room_of(name_of(path))} & NO_TORCH:
        roots = {i.split(".")[0] for i in imports(path, top_level_only=True)}
        assert not roots & {"torch", "diffusers", "transformers", "peft", "accelerate"}, path


@pytest.mark.parametrize("path", modules(), ids=str)
def test_every_file_has_a_docstring_and_a_descriptive_name(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path
    assert path.stem not in {"utils", "misc", "common", "helpers"}


def lines_of(function):
    """Number of lines of a function without its docstring."""
    documented = bool(ast.get_docstring(function)) and len(function.body) > 1
    signature = function.body[0].lineno - function.lineno
    return signature + function.end_lineno - function.body[documented].lineno + 1


def test_functions_fit_on_a_screen():
    """At most 40 lines without the docstring; 60 if the function has a loop at its top level."""
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


def test_only_the_demo_imports_letters():
    """All other code uses demo/world.py; only the name "letters" may appear elsewhere, in defaults."""
    for path in modules():
        if path.parts[1] != "demo":
            imported = {name for name in imports(path) if name.startswith("stepdistill.demo.")}
            assert all(name.startswith("stepdistill.demo.world") for name in imported), path


def attributes_set_by(method):
    """The names of the attributes of self that a method assigns."""
    for node in ast.walk(method):
        is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_set and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr


def test_attributes_are_set_in_init_first():
    set_later = []
    for path in modules():
        for kind in (
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
        ):
            methods = {
                node.name: set(attributes_set_by(node))
                for node in kind.body
                if isinstance(node, ast.FunctionDef)
            }
            names = set().union(*methods.values()) - methods.get("__init__", set())
            set_later += [f"{path}: {kind.name}.{name}" for name in names]
    assert set_later == []


ASKS_FOR_A_FAMILY = re.compile(
    r"\b(if|elif|match|case|isinstance)\b.*(StableDiffusion|ZImage|SD3|SDXL|UNet2D|\bfamily\b|network_part|is_unet)"
)
OF_FAMILIES = ("models/network", "teacher", "export", "demo", "shrink")
"""What differs between architectures, the checks of a folder, files for other tools, and what is for U-Nets alone."""


def test_only_networks_and_exports_branch_on_the_name_of_a_family():
    found = [
        f"{path}: {line.strip()}"
        for path in modules()
        if not path.relative_to(PACKAGE).as_posix().startswith(("models/network", "export"))
        for line in path.read_text().splitlines()
        if re.search(r"\b(if|elif|match|case)\b.*\bfamily\b", line.partition("#")[0])
    ]
    assert found == []


def test_no_other_room_asks_which_family_a_model_is_of():
    found = [
        f"{path}: {line.strip()}"
        for path in modules()
        if not path.relative_to(PACKAGE).as_posix().startswith(OF_FAMILIES)
        for line in path.read_text().splitlines()
        if ASKS_FOR_A_FAMILY.search(line.partition("#")[0])
    ]
    assert found == []
