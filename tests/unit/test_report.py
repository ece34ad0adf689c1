"""The report page: self-contained, safe against hostile text, and in agreement with the numbers."""

import base64
import hashlib
import html
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image

from stepdistill.report.build import build_report
from stepdistill.report.markdown import markdown_table, table_notes
from tests.browser.synthetic_run import HOSTILE, load, make_run, save, write_training

MANIFEST = {
    "samples": 1990,
    "bad": {"caption_empty": 3, "image_unreadable": 7},
    "bad_examples": {
        "caption_empty": ["b.png: an empty <b>caption</b>"],
        "image_unreadable": ["a.png: no image", "c.png: no image"],
    },
}


class Page(HTMLParser):
    """Collects all tags with their attributes, and the text between tags."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._inside = [], [], ""
        self.source = text
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data):
        if self._inside != "style":
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(folder, **options):
    return Page((build_report(folder, **options) / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("runs") / "letters", config="tests/assets/letters_adversarial.yaml"
    )


@pytest.fixture(scope="module")
def page(run):
    return page_of(run, grid_columns=4)


def changed(run, tmp_path, change):
    """A copy of the run's files with a changed results.json; its images are not copied."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for name in ("config.yaml", "environment.json", "log.jsonl", "rungs"):
        (folder / name).symlink_to(run / name)
    (folder / "evaluation").mkdir()
    for path in (run / "evaluation").iterdir():
        if path.is_dir():
            (folder / "evaluation" / path.name).symlink_to(path)
    results = load(run)
    save(folder, change(results) or results)
    return folder


@pytest.mark.parametrize("missing", [None, float("nan")], ids=["null", "NaN of an earlier version"])
@pytest.mark.slow_after_first
def test_a_number_that_is_not_finite_is_a_dash_on_the_page_and_null_in_the_report(run, tmp_path, missing):
    def change(results):
        results["rows"][-1]["fid_to_teacher"] = missing
        results["rows"][-1]["fid_to_teacher_std"] = missing
        results["floor"]["fid_to_real"] = missing
        results["scale_sweep"]["cells"][0]["latent_mse_to_teacher"] = missing

    folder = changed(run, tmp_path, change)
    text = page_of(folder).text
    assert "nan" not in text.lower().split()
    assert "–" in text
    written = (folder / "report" / "results.json").read_text()
    assert "NaN" not in written
    assert json.loads(written)["rows"][-1]["fid_to_teacher"] is None


def test_the_page_loads_nothing_but_its_own_images_and_style(page):
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    styles = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(styles[0].encode()).digest()).decode()
    assert len(styles) == 1
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "input"}
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")


def test_links_lead_to_existing_sections(page):
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= ids


def test_every_image_can_be_decoded_and_has_a_description(page):
    images = page.all("img")
    assert len(images) > 80
    for attributes in images:
        assert attributes["alt"].strip()
        kind, data = attributes["src"].removeprefix("data:image/").split(";base64,")
        content = base64.b64decode(data)
        if kind == "svg+xml":
            assert b"<svg" in content
            assert b"<script" not in content
        else:
            displayed = int(attributes["width"]), int(attributes["height"])
            assert min(displayed) > 0
            Image.open(io.BytesIO(content)).load()


def test_small_images_are_embedded_unchanged_and_enlarged_without_smoothing(page):
    tile = next(a for a in page.all("img") if a["alt"].startswith("student-4: "))
    image = Image.open(io.BytesIO(base64.b64decode(tile["src"].split(",")[1])))
    assert image.size == (32, 32)
    assert (tile["width"], tile["class"]) == ("96", "enlarged")


@pytest.mark.slow
def test_large_images_become_thumbnails(tmp_path):
    folder = make_run(tmp_path / "large", size=320, columns=2)
    page = page_of(folder, grid_columns=2)
    tile = next(a for a in page.all("img") if a["alt"].startswith("student-4: "))
    image = Image.open(io.BytesIO(base64.b64decode(tile["src"].split(",")[1])))
    assert (image.format, image.size) == ("JPEG", (256, 256))
    assert Image.open(folder / "report" / "grid.png").width < 3 * 320


def test_hostile_prompts_are_text(page, run):
    assert "<script" not in page.source
    for prompt in HOSTILE:
        assert (
            html.escape(prompt, quote=True).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")
            in page.source
        )
    items = re.findall(r"<li><bdi dir=\"auto\">(.*?)</bdi></li>", page.source, re.DOTALL)
    assert [html.unescape(item) for item in items[:4]] == list(HOSTILE)
    headings = re.findall(r'<bdi dir="auto" class="prompt">(.*?)</bdi>', page.source)
    assert max(len(html.unescape(heading)) for heading in headings) <= 60


def test_a_row_named_like_an_outside_path_shows_no_image(run, tmp_path):
    def escape(results):
        results["rows"][6]["row"] = "../../../letters/evaluation/student-8"
        results["matrix"]["cells"][0]["adapter"] = "../.."

    page = page_of(changed(run, tmp_path, escape), grid_columns=4)
    assert not [a for a in page.all("img") if a["alt"].startswith("../")]


def test_the_text_of_the_page_agrees_with_the_numbers(page):
    for sentence in (
        "FID to teacher 3.05 (undistilled 50.80 at equal network passes; floor 2.60), "
        "paired FID 1.12 (teacher with other noise: 2.60), prompt accuracy 99 %, "
        "0.97 of the teacher's diversity, 8.0 x faster than teacher-32.",
        "500 images: below 5,000 a Frechet distance is mostly bias",
        "resize.mode none",
        "config.yaml",
    ):
        assert sentence in page.text


def test_the_table_marks_the_best_in_words_and_ends_with_the_yardsticks(page):
    body = re.search(r'<table class="numbers">.*?</table>', page.source, re.DOTALL)[0]
    rows = dict(re.findall(r'<th scope="row"><bdi dir="auto">(.*?)</bdi></th>(.*?)</tr>', body, re.DOTALL))
    assert list(rows)[-2:] == ["floor", "other noise"]
    assert "5.8" in rows["floor"]
    assert "0.9000" in rows["other noise"]
    assert '<strong>3.05</strong><span class="unseen"> (best)</span>' in rows["student-4"]
    assert "(best)" not in rows["lcm-lora"].split("</td>")[1]
    assert "0.0023 <small>± 0.0002</small>" in re.sub(r"</?strong>|<span.*?</span>", "", rows["student-4"])


@pytest.mark.slow
def test_equal_runs_give_equal_pages(run, tmp_path):
    first, second = (build_report(run, tmp_path / name, grid_columns=4) for name in ("one", "two"))
    for name in ("index.html", "results.json", "results.md", "grid.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_images_and_logs_may_be_missing(run, tmp_path):
    write_training(tmp_path / "bare", finished=())
    (tmp_path / "bare" / "log.jsonl").unlink()
    (tmp_path / "bare" / "environment.json").unlink()
    (tmp_path / "bare" / "evaluation").mkdir()
    save(tmp_path / "bare", load(run))
    page = page_of(tmp_path / "bare", grid_columns=4)
    assert all(a["src"].startswith("data:image/svg+xml") for a in page.all("img"))
    assert "FID to teacher 3.05" in page.text
    assert not (tmp_path / "bare" / "report" / "grid.png").exists()


def test_a_run_in_training_shows_how_far_it_is(tmp_path):
    config = "tests/assets/letters_adversarial.yaml"
    write_training(tmp_path / "going", config=config, updates=250, finished=(32,))
    with (tmp_path / "going" / "log.jsonl").open("a") as file:
        file.write('{"rung": 8, "pha')
    page = page_of(tmp_path / "going")
    assert re.search(
        r"128 → 32 mse 200 200 of 200 finished .* 32 → 8 mse 80.* 50 of 120 in training", page.text
    )
    assert "no numbers yet" in page.text
    assert [a for a in page.all("img") if a["alt"].startswith("Preview, 32 steps, after phase 0 (mse)")]
    assert [p["value"] for p in page.all("progress")] == ["200", "50", "0", "0", "0"]
    assert not (tmp_path / "going" / "report" / "results.md").exists()


def test_missing_columns_are_named_with_the_reason(run, tmp_path):
    def lacking(results):
        results["absent"] = [{"columns": "FD-DINOv2", "why": "no <b>folder</b> is named"}]
        results["protocol"]["real_images"] = "80 images held out from training, 32 x 32"

    folder = changed(run, tmp_path, lacking)
    page = page_of(folder)
    assert "FD-DINOv2 no <b>folder</b> is named." in page.text
    assert "same prompts and noise, real images: 80 images held out from training, 32 x 32" in page.text
    assert (
        "Not in the table:\n- FD-DINOv2: no <b>folder</b> is named"
        in (folder / "report" / "results.md").read_text()
    )


@pytest.mark.slow
def test_without_fid_to_the_teacher_the_page_does_not_say_that_all_is_well(run, tmp_path):
    def unmeasured(results):
        for row in results["rows"]:
            row.pop("fid_to_teacher", None)

    shown = page_of(changed(run, tmp_path, unmeasured)).text
    assert "FID to the teacher was not measured" in shown
    assert "No number calls for a change." not in shown


def test_samples_that_were_left_out_are_counted_by_kind(tmp_path):
    folder = make_run(tmp_path / "letters")
    (folder / "cache").mkdir()
    (folder / "cache/manifest.json").write_text(json.dumps(MANIFEST))
    page = page_of(folder, grid_columns=4)
    assert "Trained on 1,990 samples; 10 of 2,000 were left out." in page.text
    assert "caption_empty 3 b.png: an empty <b>caption</b>" in page.text
    assert "image_unreadable 7 a.png: no image" in page.text
    text = (folder / "report" / "results.md").read_text()
    assert "10 of 2,000 were left out.\n- caption_empty: 3\n- image_unreadable: 7\n" in text
    (folder / "cache/manifest.json").write_text('{"samples": 2000, "bad": {}, "bad_examples": {}}')
    page = page_of(folder, grid_columns=4)
    assert "Trained on 2,000 samples; none was left out." in page.text
    assert "width x height" not in page.text
    sizes = {"sizes": {"64x96": 1500, "64x64": 500}, "moved": 12, "min_per_bucket": 64}
    manifest = {"samples": 2000, "bad": {}, "bad_examples": {}} | sizes
    (folder / "cache/manifest.json").write_text(json.dumps(manifest))
    page = page_of(folder, grid_columns=4)
    sentence = (
        "They have 2 sizes (width x height): 96 x 64: 1,500, 64 x 64: 500; "
        "12 of them were cropped from ratios that fewer"
    )
    assert sentence in page.text
    assert sentence in (folder / "report" / "results.md").read_text()
    assert not [a for a in page.all("div") if a.get("aria-label") == "Table: samples left out"]


def test_several_runs_are_compared_rung_by_rung(run, tmp_path):
    def better(results):
        for row in results["rows"]:
            row["fid_to_teacher"] -= 0.5 * (row["kind"] == "student")
        results["protocol"]["seed"] = 2
        results["floor"]["fid_to_teacher"] = 2.4

    other = changed(run, tmp_path, better)
    page = page_of([run, other], output=tmp_path / "comparison", grid_columns=4)
    assert "letters and changed" in page.text
    assert "changed 2.55, letters 3.05, lcm-lora" in page.text
    assert "seed is letters: 1, changed: 2" in page.text
    labels = [
        html.unescape(label)
        for label in re.findall(r'<th scope="row"><bdi dir="auto">(.*?)</bdi>', page.source)
    ]
    assert "teacher-32" in labels
    assert "letters: student-4" in labels
    assert "changed: student-4" in labels
    facts = json.loads((tmp_path / "comparison" / "results.json").read_text())
    assert list(facts["runs"]) == ["letters", "changed"]
    assert "| changed: student-4 | 4 |" in (tmp_path / "comparison" / "results.md").read_text()
    spoken = {
        image["alt"].split(" over ")[0]: image["alt"]
        for image in page.all("img")
        if " over steps" in image["alt"]
    }
    assert "floor" not in spoken["FID to the teacher"]  # each run has another
    assert spoken["FID to real images"].endswith("The floor is 5.8.")


@pytest.mark.slow
def test_a_floor_is_drawn_only_if_all_runs_have_it(run, tmp_path):
    def without(results):
        del results["floor"]["fid_to_real"]

    page = page_of([run, changed(run, tmp_path, without)], output=tmp_path / "comparison", grid_columns=4)
    spoken = [image["alt"] for image in page.all("img") if image["alt"].startswith("FID to real images over")]
    assert spoken
    assert not [alt for alt in spoken if "floor" in alt]


def test_the_folder_of_a_comparison_is_beside_the_runs(run, tmp_path):
    for name in ("one", "two"):
        write_training(tmp_path / name, updates=10, finished=())
    assert build_report([tmp_path / "one", tmp_path / "two"]) == tmp_path / "comparison"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is not the folder of a run"),
        (lambda folder: write_training(folder, updates=0, finished=()), "has nothing to report yet"),
        (lambda folder: (folder.mkdir(), (folder / "config.yaml").write_text("[1")), "cannot read"),
        (
            lambda folder: (folder.mkdir(), (folder / "config.yaml").write_text("ladder: [3]")),
            "its ladder cannot",
        ),
        (
            lambda folder: (write_training(folder), (folder / "evaluation").mkdir(), save(folder, [])),
            "is not what `stepdistill evaluate` writes",
        ),
    ],
)
def test_a_folder_that_is_not_a_run_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path / "what")
    with pytest.raises(ValueError, match=message) as caught:
        build_report(tmp_path / "what")
    assert "\n" not in str(caught.value)


def test_the_same_run_twice_is_refused(run):
    with pytest.raises(ValueError, match="several runs are called letters"):
        build_report([run, run])


def test_the_markdown_table_has_the_standard_columns_or_the_chosen_ones(run):
    rows = load(run)["rows"][:1]
    head, _, body = markdown_table(rows).splitlines()
    assert head.split(" | ")[2:7] == [
        "FID to real",
        "FID to teacher",
        "paired FID",
        "prompt accuracy",
        "latent MSE to teacher",
    ]
    assert body == "| teacher-32 | 64 | 23.1 | 3.92 | 1.56 | 0.990 | 0.0312 | 0.0640 | 1.0 x |"
    chosen = {"diversity": {"title": "diversity", "format": ".2f"}}
    assert markdown_table([{**rows[0], "row": "a|b"}], chosen).splitlines()[2] == (
        "| a\\|b | 64 | 0.97 | 0.0640 | 1.0 x |"
    )


def test_the_notes_below_the_table_say_what_each_number_is_compared_with(run):
    results = load(run)
    results["protocol"] |= {"prompts": "a file's", "real_images": "80 images held out from training"}
    results["protocol"]["other_real_images"] = "80 images that were trained on"
    notes = table_notes(results)
    for sentence in (
        "FID to teacher: against images of teacher-32 with other seeds.",
        "Paired FID and latent MSE: against images of teacher-32 with the same noise; teacher-32 itself has 0.",
        "Real images: 80 images held out from training.",
        "Floor of FID to real, between two sets of real images (the second: 80 images that were trained on): 5.8.",
        "Floor of FID to teacher, between images of teacher-32 with two sets of seeds: 2.60.",
        "teacher-32 against itself with other noise: paired FID 2.60, latent MSE to teacher 0.9000.",
    ):
        assert sentence in notes
    del results["floor"], results["other_noise"]
    assert "loor" not in table_notes(results)
    assert "other noise" not in table_notes(results)


def test_the_report_needs_no_torch():
    code = "import sys, stepdistill.report.build; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
