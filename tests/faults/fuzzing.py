"""Mutations of files, each a function of a seed alone, and an audit hook that reports what a reader may never do."""

import contextlib
import copy
import json
import random
import struct
import sys
from pathlib import Path

from stepdistill.disk.durable import CHECKSUM, sealed

HOSTILE = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        "a",
        "\x1b[31m\n",
        "\ud800",
        "../../../etc/passwd",
        "/dev/zero",
        "(.*.*)*!",
        "x" * 5000,
        "__import__('os')",
    ),
    *([], {}, [[]], [None], [1, "a", {}], {"a": 1}, {"": {}}, [[1, 2], [3]], [1e308] * 4, {"tensor": "a"}),
)
"""Values that take the place of any other in a JSON object."""
DEEP = (
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"- " * 20_000,
    b"9" * 5000,
    b"\x00",
    b"\xff\xfe",
    b"1e999",
    b"&a [*a]",
    *(b"!!bool abc", b"!!int ''", b"!!int '_'", b"!!float ''", b"!!timestamp abc", b"!!int {=: 1}"),
    *(b'"\\U00110000"', b"!!binary ", b"!!set "),
)
"""Bytes that go anywhere into a text."""
TAGS = ("bool", "int", "float", "timestamp", "null", "binary", "str", "set", "omap", "pairs", "map", "seq")
"""Tags of YAML that a mutation puts in front of a value."""
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "pickle.",
    "shutil.",
    "ftplib.",
)
_CACHES = ("/dev/null", str(Path.home()), "<fd")


class Audit:
    """Records forbidden events while `watching`: processes, sockets, pickles, code of the folder's files, files written."""

    def __init__(self):
        self._folder, self._seen = None, []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def watching(self, folder):
        """The list of forbidden events that happen inside it, for readers of files in `folder`."""
        self._folder, self._seen = str(folder), []
        try:
            yield self._seen
        finally:
            self._folder = None

    def _hook(self, event, args):
        if self._folder is None:
            return
        if event.startswith(_FORBIDDEN) or (
            event in ("exec", "compile", "import") and self._is_of_data(event, args)
        ):
            self._seen.append((event, repr(args)[:200]))
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes and not str(args[0]).startswith((self._folder, *_CACHES)):
            self._seen.append((event, repr(args)[:200]))

    def _is_of_data(self, event, args):
        place = {
            "exec": lambda: getattr(args[0], "co_filename", ""),
            "compile": lambda: args[1],
            "import": lambda: args[1],
        }
        return self._folder in str(place[event]())


def mutated_bytes(content, seed):
    """Bytes with one to three random changes: cut, flipped, doubled, or with hostile bytes put in."""
    draw, changed = random.Random(f"bytes {seed}"), bytearray(content)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(changed) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            del changed[at:]
        elif kind == 1 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del changed[at : at + draw.randint(1, 20)]
        elif kind == 3:
            changed[at:at] = changed[at : at + draw.randint(1, 200)]
        elif kind == 4:
            changed[at:at] = draw.choice(DEEP)
        else:
            changed[at : at + 4] = draw.randbytes(4)
    return bytes(changed)


def mutated(value, seed):
    """Plain data with one to three values replaced by hostile ones, removed, or moved under another key."""
    draw, changed = random.Random(f"data {seed}"), copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(changed))
        if not places:
            return draw.choice(HOSTILE)
        node, key = draw.choice(places)
        kind = draw.randrange(5)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[str(draw.choice(HOSTILE))] = node.pop(key)
        elif kind == 2:
            other, its_key = draw.choice(places)
            node[key] = copy.deepcopy(other[its_key]) if its_key in other or isinstance(other, list) else None
        else:
            node[key] = copy.deepcopy(draw.choice(HOSTILE))
    return changed


def _places(value):
    waiting = [value]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            yield node, key
            waiting.append(node[key])


def mutated_json(content, seed):
    """A JSON file changed as bytes, or as plain data; sealed again if it was, so that the checksum lets the change in."""
    if seed % 4 == 0:
        return mutated_bytes(content, seed)
    value = json.loads(content)
    was_sealed = isinstance(value, dict) and CHECKSUM in value
    if was_sealed:
        value.pop(CHECKSUM)
    changed = mutated(value, seed)
    with contextlib.suppress(TypeError, ValueError):
        changed = sealed(changed) if was_sealed and isinstance(changed, dict) else changed
    return json.dumps(changed).encode()


def mutated_lines(content, seed):
    """A file of JSON lines, one of which is changed."""
    lines = content.splitlines()
    number = random.Random(f"lines {seed}").randrange(len(lines))
    lines[number] = mutated_json(lines[number], seed)
    return b"\n".join(lines) + b"\n"


def mutated_safetensors(content, seed):
    """A safetensors file changed as bytes, in its header, or in the JSON that a text of its metadata holds."""
    draw = random.Random(f"header {seed}")
    if seed % 4 == 0:
        return mutated_bytes(content, seed)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    about = header.get("__metadata__", {})
    inner = [key for key, text in about.items() if text.startswith(("{", "["))]
    if inner and seed % 4 == 1:
        key = draw.choice(inner)
        value = mutated_json(about[key].encode(), seed).decode("utf-8", "replace")
        changed = {**header, "__metadata__": {**about, key: value}}
    else:
        changed = mutated(header, seed)
    text = json.dumps(changed).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def tagged_yaml(content, seed):
    """A YAML file with one of YAML's own tags in front of the value of a random line, which may not fit the tag."""
    draw, lines = random.Random(f"tag {seed}"), content.splitlines()
    places = [number for number, line in enumerate(lines) if b": " in line]
    if not places:
        return content
    number = draw.choice(places)
    key, _, value = lines[number].partition(b": ")
    value = draw.choice((value, b"''", b"'_'", b"abc", b"{=: 1}", b"[1]", b"1" * 200))
    lines[number] = key + b": !!" + draw.choice(TAGS).encode() + b" " + value
    return b"\n".join(lines) + b"\n"
