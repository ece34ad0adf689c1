"""The README's numbers are those of the committed command."""

import json
from pathlib import Path


def test_the_readmes_table_is_the_committed_result():
    readme = Path("README.md").read_text()
    table = Path("eval/results/letters.md").read_text().strip()
    assert table in readme


def test_students_beat_the_undistilled_teacher_on_the_committed_numbers():
    """At equal U-Net passes the student is far nearer to the 32-step teacher than the undistilled one."""
    facts = json.loads(Path("eval/results/letters.json").read_text())
    assert facts["num_images"] == 2000
    rows = {row["row"]: row for row in facts["ladders"]["mse"]["rows"]}
    for student, teacher, share, accuracy in (
        ("student-8", "teacher-4", 0.5, 0.99),
        ("student-4", "teacher-2", 0.1, 0.99),
        ("student-2", "teacher-1", 0.05, 0.97),
        ("student-1", "teacher-1", 0.08, 0.85),
    ):
        assert rows[student]["fid_to_teacher"] <= share * rows[teacher]["fid_to_teacher"]
        assert rows[student]["prompt_accuracy"] >= accuracy
    other = {row["row"]: row for row in facts["ladders"]["adversarial"]["rows"]}
    for steps in (8, 4, 2, 1):
        name = f"student-{steps}"
        assert rows[name]["fid_to_teacher"] <= other[name]["fid_to_teacher"]


def test_the_readmes_floors_are_the_committed_result():
    floor = json.loads(Path("eval/results/letters.json").read_text())["ladders"]["mse"]["floor"]
    text = " ".join(Path("README.md").read_text().split())
    assert f"two sets of real images are {floor['fid_to_real']:.1f} apart" in text
    assert f"two of the teacher with other seeds {floor['fid_to_teacher']:.1f}" in text


def test_the_readmes_speed_is_the_committed_result():
    ratios = [row["ratio"] for row in json.loads(Path("eval/results/bench.json").read_text())["rows"]]
    assert (
        f".{min(ratios) * 100:.0f} to {max(ratios):.2f} of its bare U-Net passes"
        in Path("README.md").read_text()
    )
