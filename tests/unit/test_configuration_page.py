"""docs/configuration.md is generated from the config's fields and documents every key."""

import re
from pathlib import Path

from docs.make_configuration import PAGE, configuration

SHIPPED = sorted(Path("configs").glob("*.yaml"))


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == configuration(), "run: python docs/make_configuration.py"


def test_every_key_is_documented():
    entries = re.findall(r"^- `([^`]+)` \((.+?)\): *(.*)$", configuration(), flags=re.MULTILINE)
    assert len(entries) > 80
    assert [key for key, _, about in entries if not about] == []


def test_every_key_of_the_shipped_configs_is_on_the_page():
    keys = set(re.findall(r"^- `([^`]+)`", configuration(), flags=re.MULTILINE))
    for path in SHIPPED:
        for line in path.read_text().splitlines():
            name = re.match(r"\s*-? ?(\w+):(?: |$)", line)
            if name and not line.lstrip().startswith("#"):
                assert any(key.rpartition(".")[2] == name[1] for key in keys), (path, name[1])
