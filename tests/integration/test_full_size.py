"""The tables of what the shipped configs take at full size are those of their plans."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PEAKS = json.loads((REPOSITORY / "tests/plan/peaks.json").read_text())


@pytest.mark.slow
def test_the_table_has_the_peaks_of_the_plan(tmp_path):
    command = [
        sys.executable,
        "eval/full_size.py",
        "--configs",
        "sd15_8gb",
        "--output",
        str(tmp_path / "found"),
    ]
    completed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-2000:]
    result = json.loads((tmp_path / "found.json").read_text())["sd15_8gb"]
    for title, peak in PEAKS["sd15_8gb"].items():
        assert result["phases"][title]["peak"] == peak
    assert "| sd15_8gb | 8 GB |" in (tmp_path / "found.md").read_text()


def test_the_committed_table_is_of_the_recorded_peaks():
    committed = json.loads((REPOSITORY / "eval/results/full_size.json").read_text())
    for name, peaks in PEAKS.items():
        budget = "memory_budget" in (REPOSITORY / f"configs/{name}.yaml").read_text()
        for title, peak in peaks.items():
            found = committed[name]["phases"][title]["peak"]
            assert found == peak or (budget and found > peak), (name, title)
