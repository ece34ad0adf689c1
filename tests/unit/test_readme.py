"""The README's numbers are those of the committed command."""

import json
from pathlib import Path


def test_the_readmes_speed_is_the_committed_result():
    ratios = [row["ratio"] for row in json.loads(Path("eval/results/bench.json").read_text())["rows"]]
    assert (
        f".{min(ratios) * 100:.0f} to {max(ratios):.2f} of its bare U-Net passes"
        in Path("README.md").read_text()
    )
