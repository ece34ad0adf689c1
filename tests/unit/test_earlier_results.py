"""Rows from earlier calls of a comparison are reused if the settings and the method's learning rate are the same."""

import json
from pathlib import Path

import pytest
from earlier_results import joined, read_earlier
from side_by_side import Table

from stepdistill.config import ConfigError

SETTINGS = {"config": "letters.yaml", "size": "cpu", "budget": 400.0, "num_images": 8, "overrides": []}


def rows(value, *methods):
    return {f"{method}-{n}": {"fid_to_real": value} for method in methods for n in (4, 1)}


def result(folder, name, *, seeds, methods, value=1.0, rates=None, **changed):
    tables = [rows(value + seed, "teacher", *methods) for seed in seeds]
    payload = {**SETTINGS, "commit": "abc", "rates": rates or {}, "seeds": seeds, "tables": tables}
    payload["floors"] = [{"fid_to_real": 10.0 + seed} for seed in seeds]
    payload["costs"] = [{method: {"unet_forwards": 400} for method in methods} for _ in seeds]
    path = folder / name
    path.write_text(json.dumps(payload | changed))
    return path


def test_each_method_comes_from_the_first_file_with_its_learning_rate(tmp_path):
    first = result(tmp_path, "a.json", seeds=[0, 1], methods=["ours", "dmd2"], rates={"dmd2": 9.0})
    second = result(tmp_path, "b.json", seeds=[0], methods=["dmd2"], value=5.0, rates={"dmd2": 3.0})
    earlier = read_earlier([first, second], SETTINGS, {"dmd2": 3.0})
    assert {key: results.source["file"] for key, results in earlier.items()} == {
        (0, "ours"): "a.json",
        (1, "ours"): "a.json",
        (0, "dmd2"): "b.json",
    }
    table = joined(None, {name: results for (seed, name), results in earlier.items() if seed == 0})
    assert table.rows == rows(1.0, "teacher", "ours") | rows(5.0, "dmd2")
    assert table.floor == {"fid_to_real": 10.0}
    assert table.run_dir is None


def test_new_rows_and_earlier_rows_are_joined(tmp_path):
    file = result(tmp_path, "a.json", seeds=[2], methods=["ours"])
    earlier = read_earlier([file], SETTINGS, {})
    here = Table(rows(7.0, "teacher", "lcm"), {"fid_to_real": 9.0}, Path("runs"), {"lcm-4": {}})
    table = joined(here, {"ours": earlier[2, "ours"]})
    assert table.rows == rows(7.0, "teacher", "lcm") | rows(3.0, "ours")
    assert (table.floor, table.run_dir, table.replicates) == (here.floor, here.run_dir, here.replicates)


@pytest.mark.parametrize("key", SETTINGS)
def test_a_file_with_other_settings_is_refused_and_the_setting_named(tmp_path, key):
    file = result(tmp_path, "a.json", seeds=[0], methods=["ours"], **{key: "another"})
    with pytest.raises(ConfigError, match=rf"a\.json, whose {key} is another; allowed: .* as in this call"):
        read_earlier([file], SETTINGS, {})


def test_a_file_that_is_not_a_result_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    for name in ("x.json", "none.json"):
        with pytest.raises(ConfigError, match=r"allowed: the OUTPUT\.json of a comparison"):
            read_earlier([tmp_path / name], SETTINGS, {})
