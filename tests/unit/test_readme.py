"""The numbers of README and docs/ are those of the committed commands; the README is short."""

import json
import re
import statistics
from pathlib import Path

import pytest

RESULTS = Path("eval/results/peers.json")
README = Path("README.md")
PAGE = Path("docs/results.md")


def rows():
    """The measures' means over the seeds, by row."""
    table = json.loads(RESULTS.read_text())["table"]
    return {row.pop("row"): {k: v["mean"] for k, v in row.items() if isinstance(v, dict)} for row in table}


def test_the_tables_are_the_committed_results():
    page = PAGE.read_text()
    results = RESULTS.with_suffix(".md").read_text()
    shown = re.findall(r"<!-- table: eval/results/peers.md -->\n(.*?)\n<!-- end -->", page, flags=re.DOTALL)
    assert len(shown) == 2
    assert all(table in results for table in shown)


def test_the_unpaired_distances_are_the_committed_result():
    page, results = PAGE.read_text(), Path("eval/results/peers_one_seed.md").read_text()
    pattern = r"<!-- table: eval/results/peers_one_seed.md -->\n(.*?)\n<!-- end -->"
    for text in (page, README.read_text()):
        (table,) = re.findall(pattern, text, flags=re.DOTALL)
        assert table in results
    facts = json.loads(Path("eval/results/peers_one_seed.json").read_text())
    assert f"the floor, is at {facts['floors'][0]['fid_to_teacher']:.2f}" in " ".join(page.split())
    taus = {(e["measure"], e["steps"]): f"{e['tau']:.2f}".removeprefix("0") for e in facts["orders"]}
    assert " / ".join(taus["fid_to_teacher", n] for n in (8, 4, 2, 1)) in page
    assert f"({taus['fid_to_real', 8]} / {taus['fid_to_real', 4]})" in page


def test_students_beat_the_undistilled_teacher_on_the_committed_numbers():
    """At equal U-Net passes the student is far nearer to the 32-step teacher than the undistilled one."""
    found = rows()
    for student, teacher, share, accuracy in (
        ("stepdistill-8", "teacher-4", 0.5, 0.99),
        ("stepdistill-4", "teacher-2", 0.1, 0.99),
        ("stepdistill-2", "teacher-1", 0.05, 0.97),
        ("stepdistill-1", "teacher-1", 0.08, 0.85),
    ):
        assert found[student]["paired_fid_to_teacher"] <= share * found[teacher]["paired_fid_to_teacher"]
        assert found[student]["prompt_accuracy"] >= accuracy


def test_few_steps_are_as_good_as_the_teachers_many_on_the_committed_numbers():
    """Three seeds: FID to real within 5 % of the teacher's at 4 steps, 30 % at one; prompts, and typefaces over seeds."""
    facts = json.loads(RESULTS.read_text())
    assert len(facts["seeds"]) >= 3
    assert facts["num_images"] >= 1000
    found = rows()
    teacher = found["teacher-32"]
    for name, share, lost in (("stepdistill-4", 1.05, 0.01), ("stepdistill-1", 1.3, 0.03)):
        assert found[name]["fid_to_real"] <= share * teacher["fid_to_real"]
        assert found[name]["prompt_accuracy"] >= teacher["prompt_accuracy"] - lost
        assert found[name]["diversity"] >= 0.9


def test_no_peer_is_ahead_on_the_committed_numbers():
    """At every step count: FID to real, prompt accuracy to half a point, and beside ours by mse paired FID of the methods
    that keep the teacher's noise; the samplers of LCM and DMD2 add their own."""
    found = rows()
    for n in (8, 4, 2, 1):
        ours, by_mse = found[f"stepdistill-{n}"], found[f"stepdistill-mse-{n}"]
        for peer in ("progressive", "lcm-lora", "dmd2-lora", "lightning"):
            theirs = found.get(f"{peer}-{n}")
            if theirs is None:
                assert (peer, n) == ("lightning", 1)  # its conversion does not fit into the budget
                continue
            assert ours["fid_to_real"] < theirs["fid_to_real"], (peer, n)
            assert ours["prompt_accuracy"] >= theirs["prompt_accuracy"] - 0.005, (peer, n)
            if peer in ("progressive", "lightning"):
                assert by_mse["paired_fid_to_teacher"] < theirs["paired_fid_to_teacher"], (peer, n)


def test_the_floors_are_the_committed_result():
    floors = json.loads(RESULTS.read_text())["floors"]
    text = " ".join(PAGE.read_text().split())
    for key, said in (
        ("fid_to_real", "two sets of real images are {:.1f} apart"),
        ("fid_to_teacher", "two of the teacher with other seeds {:.1f}"),
    ):
        assert said.format(statistics.fmean(floor[key] for floor in floors)) in text


def test_the_speed_is_the_committed_result():
    bench = json.loads(Path("eval/results/bench.json").read_text())
    ratios, page = [row["ratio"] for row in bench["rows"]], " ".join(PAGE.read_text().split())
    waiting, preparing = bench["waiting"]["share"], bench["preparing"]["ratio"]
    assert f".{min(ratios) * 100:.0f} to {max(ratios):.2f} of its bare U-Net passes" in page
    assert f"{waiting:.2%} of it waiting for data".replace("%", " %") in page
    assert f"preparing takes {preparing:.2f} times the bare VAE" in page
    assert waiting <= 0.01
    assert preparing <= 1.15


def test_the_notes_on_the_other_world_are_the_committed_results():
    table = {row["row"]: row for row in json.loads(Path("eval/results/digits.json").read_text())["table"]}
    notes = Path("eval/recipe_notes.md").read_text().partition("## A world that it was not tuned on")[2]
    lines = re.findall(
        r"^\| (?:(FID to real|paired FID to teacher), )?([a-z][a-z-]+) \| (.*) \|$", notes, flags=re.MULTILINE
    )
    assert len(lines) == 8
    key = ""
    for named, method, cells in lines:
        key = named.lower().replace(" ", "_") or key
        said = [f"{table[f'{method}-{n}'][key]['mean']:.1f}" for n in (8, 4, 2, 1)]
        assert cells.split(" | ") == said, (method, key)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", ["README.md", *map(str, sorted(Path("docs").glob("*.md")))])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", Path(page).read_text())
    missing = [link for link in links if "://" not in link and not (Path(page).parent / link).exists()]
    assert missing == []
