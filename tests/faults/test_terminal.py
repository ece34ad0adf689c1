"""What reaches the terminal: no control characters of file names, prompts and arguments, and no errors of encodings."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from stepdistill.run.log import read_log
from stepdistill.terminal import TerminalFormatter, given_text, printable_lines
from tests.faults.bounds import command

RED = "\x1b[31m"
OPTIONS = ("configs/letters.yaml", "--dry-run")
GREETING = "Grüße 日本"
LOCALES = {
    "C": {"LANG": "C"},
    "all C": {"LC_ALL": "C"},
    "ASCII alone": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII output": {"PYTHONIOENCODING": "ascii:strict"},
}


def in_terminal(locale, *words):
    """Runs the command line in a process with another locale: (exit code, standard output, standard error), as bytes."""
    names = ("LANG", "LC_ALL", "LC_CTYPE", "PYTHONUTF8", "PYTHONIOENCODING")
    environment = {key: value for key, value in os.environ.items() if key not in names} | locale
    done = subprocess.run(
        [sys.executable, "-m", "stepdistill", *words], capture_output=True, check=False, env=environment
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", LOCALES)
def test_a_prompt_in_any_letters_is_read_and_shown_in_any_terminal(name, tmp_path):
    code, out, error = in_terminal(
        LOCALES[name], "run", *OPTIONS, f'preview.prompts=["{GREETING}"]', f"output_dir={tmp_path}/runs"
    )
    assert (code, error) == (0, b"")
    assert b'"Gr\\xFC\\xDFe \\u65E5\\u672C"' in out


def test_a_wrong_value_in_other_letters_is_one_line_in_an_ascii_terminal(tmp_path):
    code, _, error = in_terminal(
        LOCALES["ASCII alone"], "run", *OPTIONS, f"output_dir={tmp_path}/runs", f"name={GREETING}"
    )
    assert code == 2
    assert error.startswith(b"stepdistill: name: got 'Gr\\xfc\\xdfe \\u65e5\\u672c' (str); allowed: ")
    assert error.count(b"\n") == 1


def test_a_folder_that_cannot_be_named_in_ascii_is_one_line(tmp_path):
    code, _, error = in_terminal(
        LOCALES["ASCII alone"], "prepare", OPTIONS[0], f"output_dir={tmp_path}/{GREETING}"
    )
    assert code == 2
    assert b"cannot be written in ascii, which Python takes for the encoding of file names here" in error
    assert error.count(b"\n") == 1


def test_an_argument_is_decoded_as_utf_8_or_left_as_it_is():
    assert given_text(GREETING) == GREETING
    assert given_text("a\udcff") == "a\udcff"


@pytest.mark.parametrize("words", [["run", "letters", f"--{RED}"], [RED]], ids=["an option", "a command"])
def test_typers_messages_have_no_control_characters(words):
    code, out, error = in_terminal({}, *words)
    assert code == 2
    assert b"\x1b[31m" not in out + error
    assert b"\\x1b[31m" in error


def test_log_records_have_no_control_characters(tmp_path, caplog):
    (tmp_path / f"{RED}\n").mkdir()
    (tmp_path / f"{RED}\n" / "log.jsonl").write_text("damaged\n{}\n")
    with caplog.at_level(logging.WARNING):
        read_log(tmp_path / f"{RED}\n" / "log.jsonl")
        logging.getLogger("stepdistill").warning("two\nlines: %s\u202e %d", f"{RED}\n", 7)
    damage, lines = map(TerminalFormatter("%(message)s").format, caplog.records)
    assert damage.startswith(
        f"{tmp_path}/\\x1b[31m\\n/log.jsonl is missing or not as it was written: 2 of its 2 lines"
    )
    assert "\n" not in damage
    assert lines == "two\nlines: \\x1b[31m\n\\u202e 7"
    assert printable_lines("a\tb\r\n\x07\udcff") == "a\\tb\\r\n\\x07\\udcff"


def test_doctor_shows_no_control_characters_of_a_data_folders_name(tmp_path, capsys):
    data = tmp_path / RED
    data.mkdir()
    (data / f"{RED}.png").write_bytes(b"no image")
    (data / f"{RED}.txt").write_text("a wall")
    source = f'data.source="{tmp_path}/\\e[31m"'
    code, out, error = command(
        capsys, "doctor", "configs/letters.yaml", f"output_dir={tmp_path}/runs", source
    )
    assert code == 2
    assert f"data: {tmp_path}/\\x1b[31m, the first 1 samples read" in out
    assert "\x1b" not in out + error


@pytest.mark.slow
def test_prepare_in_an_ascii_terminal_shows_no_control_characters_of_a_data_files_name(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in (f"{RED}a", "b", "c", "d"):
        Image.new("RGB", (40, 40), (200, 10, 10)).save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(GREETING)
    (data / f"{RED}a.png").write_bytes(b"no image")
    words = (
        f"data.source={data}",
        "data.on_bad={image_unreadable: skip}",
        "data.max_bad_fraction=0.9",
        "data.held_out=0",
    )
    code, out, error = in_terminal(
        LOCALES["ASCII alone"], "prepare", "configs/letters.yaml", f"output_dir={tmp_path}/runs", *words
    )
    assert code == 0, error
    assert b"\x1b" not in out + error
    assert b"\\x1b[31ma.png" in error


def test_a_image_of_an_unknown_format_is_refused_before_anything_is_read(tmp_path, capsys):
    for name in ("x.foo", "x", ".png", f"{RED}.gif"):
        code, _, error = command(
            capsys, "sample", tmp_path / "nowhere", "--prompt", "a", "--output", tmp_path / name
        )
        assert code == 2
        assert error.startswith("stepdistill: --output: got ")
        assert error.endswith("; allowed: a file that ends in .png, .jpg, .jpeg, .webp\n")
        assert "\x1b" not in error
    assert not list(Path(tmp_path).iterdir())
