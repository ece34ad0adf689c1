"""Impossible config values: `run` and `doctor` both refuse each in one line with exit code 2, at once."""

import os
import time

import pytest

from stepdistill.config.plain_yaml import plain_yaml
from stepdistill.messages import printable, short
from tests.faults.bounds import bounded, command, one_line

CONFIG = "configs/letters.yaml"
LONG = "x" * 300

VALUES = {
    # steps
    "ladder.0.teacher_steps=1000000000": "ladder.0.teacher_steps: got 1000000000",
    "ladder.0.student_steps=1001": "student_steps: got 1001 (int); allowed: 1000 or less",
    "ladder.2.node_steps=1000000000": "ladder.2.node_steps: got 1000000000",
    "ladder.1.phases.0.teacher_steps=9223372036854775807": "ladder.1.phases.0.teacher_steps",
    "data.teacher_steps=1000000": "data.teacher_steps: got 1000000",
    "evaluation.teacher_steps=[1000000000]": "evaluation.teacher_steps.0: got 1000000000",
    "evaluation.unguided_steps=[-1]": "evaluation.unguided_steps.0: got -1",
    # counts
    "data.num_images=1000000000": "data.num_images: got 1000000000; allowed: up to 10000000 renderings",
    "data.num_images=100000000000000000000": "data.num_images: got 100000000000000000000",
    "evaluation.num_images=1000000000": "evaluation.num_images: got 1000000000",
    "training.train_batch_size=1000000000": "training.train_batch_size: got 1000000000",
    "training.gradient_accumulation_steps=1000000000": "training.gradient_accumulation_steps",
    "evaluation.batch_size=1000000000": "evaluation.batch_size",
    "evaluation.cost_batch_sizes=[1000000000]": "evaluation.cost_batch_sizes.0",
    "evaluation.grid_columns=1000000000": "evaluation.grid_columns",
    "evaluation.diversity_prompts=1000000000": "evaluation.diversity_prompts",
    "evaluation.diversity_seeds=1000000000": "evaluation.diversity_seeds",
    "evaluation.study_images=1000000000": "evaluation.study_images",
    "evaluation.patch_size=1000000000": "evaluation.patch_size",
    "ladder.0.phases.0.cached_updates=1000000000": "ladder.0.phases.0.cached_updates",
    "lora.rank=1000000000": "lora.rank: got 1000000000",
    "export.rank=1000000000": "export.rank: got 1000000000",
    "data.resolution=1000000000": "data.resolution: got 1000000000",
    "ladder.0.phases.0.max_train_steps=1e30": "ladder.0.phases.0.max_train_steps",
    f"seed={'9' * 5000}": "not valid YAML: line 1: a number of 5000 characters; allowed: up to 100",
    f"seed=0x{'f' * 5000}": "not valid YAML: line 1: a number of 5002 characters; allowed: up to 100",
    f"seed=0x{'f' * 90}": "seed: got a whole number of about 108 digits",
    f"seed={':'.join(['59'] * 20000)}": "a number of 59999 characters; allowed: up to 100",
    # numbers that are not finite
    "ladder.0.phases.0.learning_rate=.inf": "learning_rate: got inf (float); allowed: a finite number",
    "teacher.guidance_scale=.nan": "teacher.guidance_scale: got nan",
    "training.max_grad_norm=1e999": "training.max_grad_norm: got inf",
    "evaluation.lora_scales=[.nan]": "evaluation.lora_scales.0: got nan",
    "teacher.loras=[{path: /x, weight: .nan}]": "teacher.loras.0.weight: got nan",
    "teacher.loras=[{path: /x, weight: -.inf}]": "teacher.loras.0.weight: got -inf",
    "evaluation.loras=[{name: x, path: /x, steps: 4, scale: .inf}]": "evaluation.loras.0.scale: got inf",
    "evaluation.loras=[{name: x, path: /x, steps: 4, scheduler_options: {a: .nan}}]": "scheduler_options.a",
    **{
        f"ladder.0.phases.0.discriminator.perturbation_weights={weights}": "perturbation_weights"
        for weights in ("[0, 0, 0, 0]", "[.nan, 1, 1, 1]", "[1, -1, 1, 1]", "[1, .inf, 1, 1]")
    },
    "ladder.0.phases.0.objectives=[{kind: mse, weight: .nan}]": "objectives.0.weight: got nan",
    # names and places
    f"name={LONG}": "name: got 'xxx",
    "name='a b'": "name: got 'a b'",
    'name="a\\0b"': "allowed: text without NUL characters",
    "name=../../etc": "name: got '../../etc'",
    f"output_dir=/tmp/{LONG}": "output_dir: got '/tmp/xxx",
    'output_dir="/tmp/\\0"': "output_dir: got '/tmp/\\x00' (str); allowed: text without NUL characters",
    "output_dir=": "output_dir: got None",
    'output_dir=""': "output_dir: got '' (str); allowed: a path of one letter or more",
    "output_dir=~nobody-of-this-name/runs": "output_dir: got '~nobody-of-this-name/runs'",
    f"teacher.path=/tmp/{LONG}": "teacher.path: got '/tmp/xxx",
    'teacher.path="a\\0"': "teacher.path",
    f"data.source={'/x' * 3000}": "data.source: got '/x/x",
    f"evaluation.clip=/{LONG}": "evaluation.clip",
    f"evaluation.prompts=/{LONG}": "evaluation.prompts",
    'preview.prompts=["a\\0b"]': "preview.prompts: got ['a\\x00b'] (list); allowed: text without NUL characters",
    'preview.prompts=["\\uD800"]': "allowed: text that can be written as UTF-8",
    **{
        f"evaluation.loras=[{{name: x, path: /x, steps: 4, scheduler_options: {options}}}]": f"options: got {{{says}"
        for options, says in (
            ('{"a\\0": 1}', "'a\\x00': 1} (dict); allowed: text without NUL characters"),
            ('{a: "\\0"}', "'a': '\\x00'} (dict); allowed: text without NUL characters"),
            ('{a: "\\uD800"}', "'a': '\\ud800'} (dict); allowed: text that can be written as UTF-8"),
        )
    },
    # shapes
    "ladder=" + "[" * 3000: "line 1: more than 50 lists and mappings are inside each other",
    "seed=2001-99-99": "the value is not valid YAML: line 1: '2001-99-99' cannot be read: month must be in 1..12",
    "seed=!!bool abc": "the value is not valid YAML: line 1: 'abc' cannot be read as !!bool",
    "seed=!!int ''": "line 1: '' cannot be read as !!int",
    "seed=!!int '_'": "line 1: '_' cannot be read as !!int",
    "seed=!!int +": "line 1: '+' cannot be read as !!int",
    "seed=!!float ''": "line 1: '' cannot be read as !!float",
    "seed=!!timestamp abc": "line 1: 'abc' cannot be read as !!timestamp",
    "seed={!!bool abc: 1}": "line 1: 'abc' cannot be read as !!bool",
    "seed=!!timestamp {=: abc}": "line 1: a list or a mapping cannot be read as !!timestamp",
    f"seed=!!int {{=: '{':'.join(['59'] * 20000)}'}}": "line 1: a list or a mapping cannot be read as !!int",
    'name="\\UFFFFFFFF"': "the value is not valid YAML: line 1: it cannot be read: ",
    f"seed=!<{'x' * 5000}> a": "could not determine a constructor for the tag 'xxx",
    "name=" + "[" * 51 + "]" * 51: "line 1: more than 50 lists and mappings are inside each other",
    "name=" + "[" * 49 + "]" * 49: "name: got [[[[...",
    "lora={rank: 4, rank: 8}": "line 1: the key 'rank' is there twice, first in line 1; allowed: once",
    "ladder.²=1": "got '²' for a list; allowed: 0 to 4",
    "ladder.99999999999999999999.student_steps=1": "for a list; allowed: 0 to 4",
    f"ladder.0.phases={[{'objective': 'mse'}] * 100}": "ladder.0.phases: got [{'objective': 'mse'}, ",
    f"preview.prompts={['a'] * 1000}": "preview.prompts: got ['a', 'a', 'a', 'a', ...]",
    "evaluation.loras=[{name: x, path: /x, steps: 4, timesteps: [-5]}]": "evaluation.loras.0.timesteps.0: got -5",
    "evaluation.loras=[{name: x, path: /x, steps: 4, timesteps: [1000000000]}]": "timesteps.0: got 1000000000",
    "evaluation.loras=[{name: x, path: /x, steps: 1000000000}]": "evaluation.loras.0.steps: got 1000000000",
    **{
        f"evaluation.loras=[{{name: '{name}', path: /x, steps: 4}}]": f"evaluation.loras.0.name: got '{name}'"
        for name in (
            *(
                "floor",
                "Floor",
                "features",
                "results.json",
                "extractor",
                "seeds",
                "scales",
                "matrix",
                "studies",
            ),
            *("teacher-4", "Teacher-4", "student-4", "unguided-1", "../x", "a/b", "/x", ".x", ""),
        )
    },
    "evaluation.loras=[{name: x, path: /x, steps: 4}, {name: X, path: /x, steps: 4}]": "loras.0.name: got 'x'",
}


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:50])
def test_an_impossible_config_value_is_refused_at_once(value, tmp_path, capsys, monkeypatch):
    places = [] if value.startswith("output_dir") else [f"output_dir={tmp_path / 'runs'}"]
    code, _, error = command(capsys, "doctor", CONFIG, *places, value)
    assert code == 2
    line = one_line(error)
    assert VALUES[value] in line
    assert len(line) < 1000
    assert list(tmp_path.iterdir()) == []


LEVELS = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9))]
)
FILES = {
    "lists in lists": (b"seed: " + b"[" * 100_000, "line 1: more than 50 lists and mappings are inside"),
    "3,000 brackets": (b"seed: " + b"[" * 3000 + b"]" * 3000, "line 1: more than 50 lists and mappings"),
    "blocks in blocks": (
        "\n".join(" " * depth + "a:" for depth in range(1000)).encode(),
        "line 50: more than 50 lists and mappings are inside each other",
    ),
    "dashes in dashes": (b"- " * 100_000, "line 1: more than 50 lists and mappings are inside each other"),
    "a date that does not exist": (
        b"name: a\nseed: 2001-99-99",
        "is not valid YAML: line 2: '2001-99-99' cannot be read: month must be in 1..12",
    ),
    "a number of 5,000 digits": (b"seed: " + b"9" * 5000, "line 1: a number of 5000 characters; allowed: up"),
    "a fraction of 5,000 digits": (b"seed: " + b"9" * 5000 + b".5", "line 1: a number of 5002 characters"),
    "mappings merged a billion times": (LEVELS.encode(), "line 5: more than 10000 values"),
    "a value inside itself": (b"seed: 1\nname: &a [*a]", "line 2: *a is inside the value that it repeats"),
    "a long text a thousand times": (
        b'a: &a "' + b"x" * 10_000 + b'"\nb: [' + b"*a, " * 1000 + b"]",
        "line 2: more than 1048576 characters in values, with aliases written out",
    ),
    "a million values": (b"seed: [" + b"1," * 500_000 + b"]", "line 1: more than 10000 values"),
    "many thousand keys": (
        "\n".join(f"k{n}: 1" for n in range(20_000)).encode(),
        "line 5000: more than 10000 values",
    ),
    "a key twice": (b"name: a\nseed: 1\nname: b", "line 3: the key 'name' is there twice, first in line 1"),
    "an inner key twice": (
        b"name: a\nlora:\n  rank: 4\n  rank: 8\n",
        "line 4: the key 'rank' is there twice, first in line 3; allowed: once",
    ),
    "not text": (b"\xff\xfe\x00", "is not UTF-8 text"),
    "control characters": (b"name: a\x01b", "is not valid YAML"),
    "tags that make objects": (b"seed: !!python/object/apply:os.system ['true']", "is not valid YAML"),
    "no value of its tag": (
        b"name: a\nseed: !!bool abc",
        "is not valid YAML: line 2: 'abc' cannot be read as !!bool",
    ),
    "an escape that is no character": (
        b'name: a\nseed: "\\U00110000"',
        "line 2: it cannot be read: chr() arg",
    ),
    "a version of 5,000 digits": (b"%YAML 1." + b"9" * 5000 + b"\n--- {}", "line 1: it cannot be read: "),
    "more text than any": (b"#" * (2**20 + 1), "it has 1048577 characters; allowed: up to 1048576"),
    "larger than any": (b"#" * (2**22 + 1), "has more than 4194304 bytes"),
    "a key that is a list": (b"? [a]\n: 1\n", "is not valid YAML"),
    "keys that are numbers": (b"1: 2\n", "name: got nothing"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_config_that_cannot_be_read_is_one_line(name, tmp_path, capsys):
    content, says = FILES[name]
    (tmp_path / "config.yaml").write_bytes(content)
    started = time.process_time()
    code, _, error = command(capsys, "run", tmp_path / "config.yaml")
    assert code == 2
    assert says in one_line(error)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "name",
    ["dashes in dashes", "mappings merged a billion times", "a key twice", "not text", "no value of its tag"],
)
def test_a_saved_config_that_cannot_be_read_is_one_line(name, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(FILES[name][0])
    code, _, error = command(capsys, "report", tmp_path)
    assert code == 2
    assert str(tmp_path) in one_line(error)


def test_a_config_that_names_itself_a_billion_times_costs_nothing(tmp_path, capsys):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "config.yaml").write_text("\n".join([*levels, "name: *a9"]))
    code, _, error = command(capsys, "run", tmp_path / "config.yaml")
    assert code == 2
    assert "line 4: more than 10000 values, those that aliases repeat included" in one_line(error)


def test_a_config_path_that_is_not_a_file_is_refused_in_one_line(tmp_path, capsys):
    for place in (tmp_path / LONG, "/dev/zero", "/proc/self/mem", tmp_path / "nowhere"):
        code, _, error = command(capsys, "run", place)
        assert code == 2
        assert "config" in one_line(error)


@pytest.mark.parametrize("place", ["/proc", "/dev/null", "/proc/self/environ"])
def test_a_place_where_no_folder_can_be_made_is_one_line(place, capsys):
    code, out, error = command(capsys, "doctor", CONFIG, f"output_dir={place}/runs")
    assert code == 2
    assert f"no file can be made in {place}/runs" in out or "is a file" in out
    one_line(error)
    code, _, error = command(capsys, "prepare", CONFIG, f"output_dir={place}/runs")
    assert code == 2
    assert place in one_line(error)


def test_a_run_folder_that_is_not_a_folder_is_refused_in_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "letters")
    code, _, error = command(capsys, "prepare", CONFIG, f"output_dir={tmp_path}")
    assert code == 2
    assert "is a file; choose another name" in one_line(error)


def test_messages_hold_no_line_ends_and_no_large_values():
    assert printable("a\nb\x1b[31m\udcff") == "a\\nb\\x1b[31m\\udcff"
    nested: list = []
    nested.append(nested)
    with bounded(seconds=2):
        assert len(short(["x" * 10**6] * 10**4)) < 1000
        assert len(short({str(k): k for k in range(10**4)})) < 1000
        assert "..." in short(nested)
        assert short(10**5000) == "a whole number of about 5000 digits"


def test_aliases_and_merges_of_ordinary_size_are_read():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\nd: {1: a, '1': b}"
    plain = {"x": 1, "y": 2}
    assert plain_yaml(text) == {"a": plain, "b": {"x": 1, "y": 3}, "c": [plain] * 2, "d": {1: "a", "1": "b"}}
