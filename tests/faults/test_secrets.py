"""Tokens in the environment, in config values, in URLs and in errors appear in no output and in no file."""

import base64
import logging

import pytest

from stepdistill import errors
from stepdistill.cli import guarded
from stepdistill.messages import without_secrets
from stepdistill.terminal import TerminalFormatter, show_traceback
from tests.faults.bounds import command, one_line
from tests.faults.small_run import make_run

CANARY = "canary0123456789abcdef"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MY_PASSWORD", "some_secret")
URL = f"https://someone:{CANARY}@example.org/model"
HUB = "hf_" + "aB3" * 12

ROW = "{name: x, path: /x, steps: 4"


@pytest.fixture
def canaries(monkeypatch):
    """Puts a canary into each environment variable; a function that asserts that a text has none."""
    for number, name in enumerate(VARIABLES):
        monkeypatch.setenv(name, f"{CANARY}{number}")

    def absent(text):
        content = text if isinstance(text, bytes) else text.encode()
        assert CANARY.encode() not in content
        assert HUB.encode() not in content

    return absent


SETTINGS = {
    "a teacher's URL": f"teacher.path={URL}",
    "a LoRA's URL": f"teacher.loras=[{{path: '{URL}'}}]",
    "a base model's URL": f"export.base_model={URL}",
    "a scorer's command": f"evaluation.score_cmd=score --token {HUB} {{images}}",
    "a variable's value": f"evaluation.score_cmd=score {CANARY}1",
    "a prompt": f"preview.prompts=['{HUB}']",
    "a scheduler's option": f"evaluation.loras=[{ROW}, scheduler_options: {{prediction_type: {HUB}}}}}]",
    "the name of a scheduler's option": f"evaluation.loras=[{ROW}, scheduler_options: {{{HUB}: 1}}}}]",
    "text in base64": f"evaluation.score_cmd=!!binary {base64.b64encode(HUB.encode()).decode()}",
    "an unknown key": f"teacher.tokn={URL}",
    "no value": f"seed={URL}",
    "a long URL": f"seed=https://someone:{CANARY * 20}@example.org/model",
    "no YAML": f"seed=[{URL}",
    "no key": URL,
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "words", [("run", "--dry-run"), ("doctor",), ("prepare",)], ids=lambda words: words[0]
)
def test_a_token_in_a_config_is_refused_and_not_repeated(name, words, tmp_path, capsys, canaries):
    stage, *options = words
    settings = (f"output_dir={tmp_path / 'runs'}", SETTINGS[name])
    code, out, error = command(capsys, stage, "configs/letters.yaml", *settings, *options)
    assert code == 2
    assert "***" in one_line(error)
    canaries(out + error)
    assert not (tmp_path / "runs").exists()


def test_a_token_in_an_argument_is_not_repeated(tmp_path, capsys, canaries):
    for words in (
        ["run", URL],
        ["sample", URL, "--prompt", "a"],
        ["report", URL],
        ["export", "letters", "--push", HUB],
    ):
        code, out, error = command(
            capsys, *words, *([] if words[0] != "export" else [f"output_dir={tmp_path}"])
        )
        assert code == 2
        canaries(out + error)


def test_a_token_in_an_error_or_a_log_line_is_not_repeated(capsys, canaries):
    def refused():
        exec(
            compile("raise ValueError(text)", errors.__file__, "exec"), {"text": f"401 for {URL} with {HUB}"}
        )

    assert guarded(refused) == 2
    try:
        raise RuntimeError(f"cannot reach {URL} with {CANARY}0")
    except RuntimeError as error:
        show_traceback(type(error), error, error.__traceback__)
        record = logging.LogRecord("a", logging.WARNING, "a", 1, "%s: %s", (URL, error), None)
    out, error = capsys.readouterr()
    assert error.startswith("stepdistill: 401 for https://***@example.org/model with ***\n")
    assert "RuntimeError: cannot reach https://***@example.org/model with ***" in error
    canaries(out + error + TerminalFormatter().format(record))


def test_ordinary_texts_have_no_secrets():
    for text in (
        "mail me@example.org",
        "C:/a/b",
        "https://example.org/a@b",
        "hf_internal",
        "a red letter a on white",
    ):
        assert without_secrets(text) == text


@pytest.mark.slow
def test_no_token_of_the_environment_is_in_any_file_or_line_of_a_run(tmp_path, capfd, caplog, canaries):
    with caplog.at_level(logging.DEBUG):
        make_run(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 50
    for path in files:
        canaries(path.read_bytes())
    canaries("".join(capfd.readouterr()) + caplog.text)
