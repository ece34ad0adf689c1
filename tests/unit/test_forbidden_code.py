"""No file of the project unpickles, evaluates text, starts a shell, or trusts code that comes with a model."""

import ast
import re
from pathlib import Path

import pytest

FOLDERS = ("stepdistill", "pipelines", "eval", "docs")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__"}
DOTTED = {
    *("torch.load", "torch.save", "torch.hub.load", "numpy.load", "np.load", "torch.package.PackageImporter"),
    *(
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "os.system",
        "os.popen",
        "subprocess.getoutput",
    ),
}
ALLOWED = {
    (
        "stepdistill/evaluation/measure/distances.py",
        "np.load",
    ),  # with allow_pickle=False, which is checked below
}
SAFE_LOADERS = {"stepdistill/config/plain_yaml.py"}


def forbidden(tree):
    """Each forbidden thing in a file's syntax tree, by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if name.split(".")[0] in PICKLES or name in DOTTED)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in DOTTED:
            yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                yield node.func.id
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", ...)
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and value is not False:
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"
                if keyword.arg == "weights_only":
                    yield "weights_only"


def files():
    return sorted(path for folder in FOLDERS for path in Path(folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_unpickles_evaluates_or_trusts(folder):
    seen = [
        (path.as_posix(), name)
        for path in sorted(Path(folder).rglob("*.py"))
        for name in forbidden(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert [entry for entry in seen if entry not in ALLOWED] == []


def test_every_numpy_file_is_read_without_pickles():
    for place, _ in ALLOWED:
        calls = [node for node in ast.walk(ast.parse(Path(place).read_text())) if isinstance(node, ast.Call)]
        loads = [call for call in calls if ast.unparse(call.func) == "np.load"]
        assert loads
        for call in loads:
            assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}[
                "allow_pickle"
            ] == "False"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load('a')",
        "read = torch.load",
        "np.load('a', allow_pickle=True)",
        "np.lib.format.read_array(a, allow_pickle=flag)",
        "eval('1')",
        "exec(text)",
        "__import__(name)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(words, shell=True)",
        "run(words, shell=is_text)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "os.system('ls')",
    ],
)
def test_each_forbidden_thing_is_seen(code):
    assert list(forbidden(ast.parse(code)))
    assert not list(
        forbidden(ast.parse("model.eval(); re.compile('a'); run(words, shell=False); yaml.safe_load(text)"))
    )


def test_security_md_names_tests_that_exist():
    text = Path("SECURITY.md").read_text(encoding="utf-8")
    places = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert len(places) > 8
    assert all(Path(place).is_file() for place in places)


def test_every_pinned_package_but_torch_has_hashes():
    """Torch's wheel differs between machines."""
    pins = set(Path("constraints.txt").read_text(encoding="utf-8").split())
    hashes: dict[str, int] = {}
    for line in Path(".ci/hashes.txt").read_text(encoding="utf-8").splitlines():
        if "==" in line:
            name = line.removesuffix(" \\")
            hashes[name] = 0
        else:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), line
            hashes[name] += 1
    assert pins - set(hashes) == {pin for pin in pins if pin.startswith("torch==")}
    assert set(hashes) <= pins
    assert min(hashes.values()) >= 1
