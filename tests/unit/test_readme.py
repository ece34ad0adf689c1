"""The numbers in README.md and docs/ are those of the committed results; README.md is short."""

import json
import re
import statistics
from pathlib import Path

import pytest

from stepdistill import errors

RESULTS = Path("eval/results/peers.json")
OF_A_FLOW = Path("eval/results/sd3_peers.json")
PEERS = ("progressive", "lcm-lora", "dmd2-lora", "lightning")
README = Path("README.md")
PAGE = Path("docs/results.md")


def rows(file=RESULTS):
    """The means of all measures over the seeds, by row."""
    table = json.loads(file.read_text())["table"]
    return {row.pop("row"): {k: v["mean"] for k, v in row.items() if isinstance(v, dict)} for row in table}


def shown_tables(text):
    return re.findall(r"<!-- table: eval/results/peers.md -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL)


def test_every_table_is_that_of_the_file_it_names():
    pages = [README, *PAGE.parent.glob("*.md")]
    blocks = [
        block
        for page in pages
        for block in re.findall(
            r"<!-- table: (\S+) -->\n(.*?)\n<!-- end -->", page.read_text(), flags=re.DOTALL
        )
    ]
    assert len(blocks) >= 6
    for file, table in blocks:
        assert table in Path(file).read_text(), file


def test_the_tables_are_the_committed_results():
    results = RESULTS.with_suffix(".md").read_text()
    assert len(shown_tables(PAGE.read_text())) == 4
    (headline,) = shown_tables(README.read_text())
    assert headline.startswith("| FID to teacher |")
    assert all(table in results for table in [headline, *shown_tables(PAGE.read_text())])


def test_the_agreement_of_the_readers_is_the_committed_result():
    page = " ".join(PAGE.read_text().split())
    orders = json.loads(RESULTS.read_text())["orders"]
    taus = {(e["measure"], e["steps"]): f"{e['tau']:.2f}".removeprefix("0") for e in orders}
    assert f"tau {' / '.join(taus['fid_to_teacher', n] for n in (8, 4, 2, 1))} at" in page
    assert f"({taus['fid_to_real', 2]} / {taus['fid_to_real', 1]})" in page
    assert f"({taus['fid_to_real', 8]} / {taus['fid_to_real', 4]})" in page
    assert "No pair of methods changes its order beyond the deviations" in page
    assert [flip for order in orders for flip in order["flips"]] == []
    table = rows()
    for n in (8, 4, 2, 1):  # "ahead of every peer ... for the shipped reader and for a second one"
        for measure in ("fid_to_real", "second_fid_to_real"):
            peers = [table[f"{peer}-{n}"] for peer in PEERS if f"{peer}-{n}" in table]
            assert table[f"stepdistill-{n}"][measure] < min(peer[measure] for peer in peers)


def test_the_statements_about_our_rows_are_the_committed_result():
    table, page = rows(), " ".join(PAGE.read_text().split())
    floors = json.loads(RESULTS.read_text())["floors"]
    floor = statistics.fmean(f["fid_to_teacher"] for f in floors)
    ours = [table[f"stepdistill-{n}"] for n in (8, 4, 2, 1)]
    above = " / ".join(f"{row['fid_to_teacher'] - floor:.1f}" for row in ours)
    assert f"{above} above the floor" in page
    first, last = above.split(" / ")[:: len(ours) - 1]
    readme = " ".join(README.read_text().split())
    assert f"{first} above the floor at 8 steps, and {last} above it at one step" in readme
    real = " / ".join(f"{r['fid_to_real'] - table['teacher-32']['fid_to_real']:.1f}" for r in ours)
    assert f"they are {real} further than the teacher" in page
    assert f"is at {table['teacher-32']['fid_to_real']:.1f}." in page
    for text in (page, " ".join(README.read_text().split())):
        assert f"draw {ours[-1]['prompt_accuracy']:.3f} of the prompts right" in text


def test_students_beat_the_undistilled_teacher_on_the_committed_numbers():
    """At equal U-Net passes the student is far nearer to the 32-step teacher than the undistilled one."""
    means = rows()
    for student, teacher, share, accuracy in (
        ("stepdistill-8", "teacher-4", 0.5, 0.99),
        ("stepdistill-4", "teacher-2", 0.1, 0.99),
        ("stepdistill-2", "teacher-1", 0.05, 0.97),
        ("stepdistill-1", "teacher-1", 0.08, 0.85),
    ):
        assert means[student]["paired_fid_to_teacher"] <= share * means[teacher]["paired_fid_to_teacher"]
        assert means[student]["prompt_accuracy"] >= accuracy


def test_students_of_a_flow_beat_their_undistilled_teacher_on_the_committed_numbers():
    means, page = rows(OF_A_FLOW), " ".join(PAGE.read_text().split())
    assert len(json.loads(OF_A_FLOW.read_text())["seeds"]) >= 3
    shares = []
    for n, share in ((8, 0.5), (4, 0.1), (2, 0.05)):
        ours, undistilled = means[f"stepdistill-{n}"], means[f"teacher-{n // 2}"]
        shares.append(ours["paired_fid_to_teacher"] / undistilled["paired_fid_to_teacher"])
        assert shares[-1] <= share
    accuracies = [means[f"stepdistill-{n}"]["prompt_accuracy"] for n in (8, 4, 2, 1)]
    assert all(a >= least for a, least in zip(accuracies, (0.99, 0.98, 0.97, 0.95), strict=True))
    said = " / ".join(f"{share:.3f}" for share in shares), " / ".join(f"{a:.3f}" for a in accuracies)
    assert f"is {said[0]} of its at 8 / 4 / 2 passes, and {said[1]} of our prompts are drawn right" in page


def test_few_step_students_are_as_good_as_the_teacher_on_the_committed_numbers():
    """FID to real is within 6 % of the teacher's at 4 steps and 15 % at one; prompt accuracy and diversity are kept."""
    facts = json.loads(RESULTS.read_text())
    assert len(facts["seeds"]) >= 3
    assert facts["num_images"] >= 500
    means = rows()
    teacher = means["teacher-32"]
    for name, share, lost in (("stepdistill-4", 1.06, 0.01), ("stepdistill-1", 1.15, 0.01)):
        assert means[name]["fid_to_real"] <= share * teacher["fid_to_real"]
        assert means[name]["prompt_accuracy"] >= teacher["prompt_accuracy"] - lost
        assert means[name]["diversity"] >= 0.9


def test_no_peer_is_ahead_on_the_committed_numbers():
    """At every step count, ours is ahead in FID to real, and in prompt accuracy to within half a point. Our mse students are
    ahead in paired FID of those peers that keep the teacher's noise (the samplers of LCM and DMD2 add noise)."""
    means = rows()
    for n in (8, 4, 2, 1):
        ours, by_mse = means[f"stepdistill-{n}"], means[f"stepdistill-mse-{n}"]
        for peer in PEERS:
            theirs = means.get(f"{peer}-{n}")
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
    for key, sentence in (
        ("fid_to_real", "two sets of real images are {:.1f} apart"),
        ("fid_to_teacher", "two sets of the teacher with other seeds are {:.1f} apart"),
    ):
        assert sentence.format(statistics.fmean(floor[key] for floor in floors)) in text


def test_the_speed_is_the_committed_result():
    bench = json.loads(Path("eval/results/bench.json").read_text())
    ratios, page = [row["ratio"] for row in bench["rows"]], " ".join(PAGE.read_text().split())
    waiting, preparing = bench["waiting"]["share"], bench["preparing"]["ratio"]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times as long as its U-Net passes alone" in page
    assert f"{waiting:.2%} of it waiting for data".replace("%", " %") in page
    assert f"Preparing takes {preparing:.2f} times as long as the VAE's encoding alone" in page
    assert waiting <= 0.01
    assert preparing <= 1.15


def test_the_numbers_of_the_digits_world_are_the_committed_results():
    table = {row["row"]: row for row in json.loads(Path("eval/results/digits.json").read_text())["table"]}
    notes = Path("eval/recipe_notes.md").read_text().partition("## A world that it was not tuned on")[2]
    lines = re.findall(
        r"^\| (?:(FID to real|paired FID to teacher), )?([a-z][a-z-]+) \| (.*) \|$", notes, flags=re.MULTILINE
    )
    assert len(lines) == 8
    key = ""
    for named, method, cells in lines:
        key = named.lower().replace(" ", "_") or key
        expected = [f"{table[f'{method}-{n}'][key]['mean']:.1f}" for n in (8, 4, 2, 1)]
        assert cells.split(" | ") == expected, (method, key)


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", ["README.md", *map(str, sorted(Path("docs").glob("*.md")))])
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)", Path(page).read_text())
    missing = [link for link in links if "://" not in link and not (Path(page).parent / link).exists()]
    assert missing == []


def test_the_guide_lists_the_exit_codes_of_errors_py():
    listed = dict(re.findall(r"^    (\d+) +(.+)$", errors.__doc__, flags=re.MULTILINE))
    table = Path("docs/guide.md").read_text().split("| exit code | meaning |")[1].split("\n\n")[0]
    assert dict(re.findall(r"^\| (\d+) \| (.+) \|$", table, flags=re.MULTILINE)) == listed
    classes = [
        c
        for c in vars(errors).values()
        if isinstance(c, type) and isinstance(getattr(c, "exit_code", None), int)
    ]
    assert {str(c.exit_code) for c in classes} == listed.keys() - {"0", "1", "2", "75", "130"}
