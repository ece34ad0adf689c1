"""evaluation.score_cmd: a user's own scoring command."""

import sys
import time

import psutil
import pytest

from stepdistill.evaluation.measure.outside_scorer import run_score_cmd


def score(tmp_path, code, *, timeout=20.0, command=None):
    script = tmp_path / "score.py"
    script.write_text(code)
    command = command or f"{sys.executable} {script} --images {{images}} --prompts={{prompts}}"
    return run_score_cmd(
        command, images=tmp_path / "my images; rm -rf", prompts=tmp_path / "prompts.txt", timeout=timeout
    )


def test_scores_are_read_from_the_last_line_and_placeholders_are_filled_in_without_a_shell(tmp_path):
    code = "import sys, json\nprint('loading')\nprint(json.dumps({'words': len(sys.argv), 'hps': .25}))"
    assert score(tmp_path, code) == {"words": 4, "hps": 0.25}
    code = "import sys, json\nassert sys.argv[2].endswith('my images; rm -rf'), sys.argv\nprint('{}')"
    assert score(tmp_path, code) == {}


def test_output_that_is_not_utf8_is_accepted(tmp_path):
    code = (
        "import sys\nfor s in (sys.stdout, sys.stderr): s.buffer.write(b'caf\\xe9\\n')\nprint('{\"a\": 1}')"
    )
    assert score(tmp_path, code) == {"a": 1}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import sys; print('torch is too old', file=sys.stderr); sys.exit(3)",
            "exited with code 3: torch is too old",
        ),
        ("print('0.5')", "allowed: a JSON object of numbers"),
        ('print(\'{"a": "b"}\')', "allowed: a JSON object of numbers"),
        ("pass", "allowed: a JSON object of numbers"),
        ("print('{\"a\": NaN}')", "allowed: finite numbers"),
        ("print('{\"a\": true}')", "allowed: a JSON object of numbers"),
        ('print(\'{"a": "0.5"}\')', "allowed: a JSON object of numbers"),
        ("print('{\"a\": 1' + '0' * 400 + '}')", "allowed: a JSON object of numbers"),
        ("input()", "EOF"),
    ],
)
def test_errors_of_a_scorer_are_one_line(tmp_path, code, message):
    with pytest.raises(ValueError, match=r"evaluation\.score_cmd") as caught:
        score(tmp_path, code)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_command_and_a_timeout_are_reported(tmp_path):
    with pytest.raises(ValueError, match="cannot run no-such-scorer"):
        score(tmp_path, "", command="no-such-scorer {images}")
    with pytest.raises(ValueError, match=r"evaluation\.score_cmd: cannot read .*No closing quotation"):
        score(tmp_path, "", command="python 'score.py")
    with pytest.raises(ValueError, match="longer than 1 s"):
        score(tmp_path, "import time; time.sleep(30)", timeout=1.0)


def test_a_timeout_also_ends_the_commands_child_processes(tmp_path):
    """With a command such as `conda run python score.py`, the scorer itself is a grandchild process."""
    code = (
        "import pathlib, subprocess\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "child.wait()"
    )
    with pytest.raises(ValueError, match="longer than 2 s"):
        score(tmp_path, code, timeout=2.0)
    child = int((tmp_path / "pid").read_text())

    def is_gone():
        return not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE

    until = time.monotonic() + 10  # of 60 that it would sleep: a killed process is not gone at once
    while not is_gone() and time.monotonic() < until:
        time.sleep(0.05)
    assert is_gone()
