"""index.html: one self-contained page with a strict Content-Security-Policy. Jinja autoescapes every value."""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from stepdistill.report import gallery
from stepdistill.report.advice import advice_for
from stepdistill.report.curves import distance_plots, training_plots
from stepdistill.report.embedded_images import EmbeddedImage, sheet
from stepdistill.report.entries import entries_of
from stepdistill.report.gallery import TileSizes
from stepdistill.report.looks_by_phase import looks_table
from stepdistill.report.number_format import format_number, number
from stepdistill.report.read import Run, RungLog
from stepdistill.report.summary import joined_names, report_warnings, sentences
from stepdistill.report.table import cost_table, metrics_of, quality_table
from stepdistill.run.start_from import taken_from

_LARGEST = 20 * 2**20
# Image sizes, tried in this order until the page is small enough.
_SIZES = (TileSizes(256, 128), TileSizes(192, 96), TileSizes(128, 64), TileSizes(96, 48))
_PREVIEW = 1000


@dataclass(frozen=True)
class Progress:
    """A row of the training section's table: how far a rung is."""

    run: str
    rung: str
    phases: str
    updates: int
    max_train_steps: int
    state: str
    seconds: float | None


def render_page(runs: Sequence[Run], *, columns: int) -> str:
    """The page of one run, or of several compared. Large images are shrunk further if the page exceeds 20 MiB."""
    fixed = _context(runs)
    for sizes in _SIZES:
        page = _fill(fixed | _images(runs, columns=columns, sizes=sizes))
        if len(page) <= _LARGEST:
            break
    return page


def content_security_policy(style: str) -> str:
    """A policy that allows only images embedded in the page and the one style sheet `style`, by its hash."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _yardsticks(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Floors and other-noise values to compare distances with, by label; one entry if all runs agree, else one per run."""
    yardsticks: dict[str, dict[str, float]] = {}
    for label, values in (
        ("floor", [run.floor for run in runs]),
        ("other noise", [run.other_noise for run in runs]),
    ):
        if len({str(value) for value in values}) == 1:
            yardsticks[label] = values[0]
        else:
            yardsticks |= {f"{run.name}: {label}": v for run, v in zip(runs, values, strict=True)}
    return yardsticks


def _fill(context: dict[str, Any]) -> str:
    folder = files("stepdistill.report")
    style = (folder / "page.css").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(style=Markup(style), policy=content_security_policy(style), **context)


def _context(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything on the page except the images of `_images`, whose size varies."""
    entries, several = entries_of(runs), len(runs) > 1
    floors = _yardsticks(runs)
    metrics = metrics_of(entries)
    quality = quality_table(entries, floors) if metrics else None
    return {
        "title": joined_names(runs),
        "several": several,
        "leads": _leads(runs),
        "warnings": report_warnings(runs),
        "sentences": sentences(entries),
        "advice": [(run.name, advice) for run in runs if (advice := advice_for(run))],
        "can_advise": any(entry.value("fid_to_teacher") is not None for entry in entries),
        "quality": quality,
        "meanings": [column for column in quality.columns if column.about] if quality else [],
        "absent": _absent(runs),
        "cost": cost_table(entries) if entries else None,
        "distances": distance_plots(entries),
        "progress": [row for run in runs for row in _progress(run)],
        "training": training_plots(runs),
        "data": [(run.name, run.data) for run in runs if run.data is not None],
        "previews": [(run.name, images) for run in runs if (images := list(_previews(run)))],
        "looks": [(run.name, table) for run in runs if (table := looks_table(run)) is not None],
        "protocols": [(run.name, _facts(run), _config_text(run)) for run in runs],
        "evaluated": any(run.results is not None for run in runs),
    }


def _images(runs: Sequence[Run], *, columns: int, sizes: TileSizes) -> dict[str, Any]:
    """The tables of images, with large images shrunk to `sizes`."""
    entries = entries_of(runs)
    studies = {
        "seeds": [(run.name, gallery.seeds(run, sizes=sizes)) for run in runs],
        "scale_sweep": [(run.name, gallery.scale_sweep(run, sizes=sizes)) for run in runs],
        "matrix": [(run.name, gallery.matrix(run, sizes=sizes)) for run in runs],
    }
    drawn = {key: [(name, g) for name, g in galleries if g is not None] for key, galleries in studies.items()}
    return {"same_noise": gallery.same_noise(entries, columns=columns, sizes=sizes), **drawn}


def _leads(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(run's name, summary line) of each run; a single line without a name if all lines are equal."""
    leads = [(run.name, _lead(run)) for run in runs]
    return leads if len({text for _, text in leads}) > 1 else [("", leads[0][1])]


def _lead(run: Run) -> str:
    """One line about the run: ladder, teacher, guidance, LoRA rank, images."""
    teacher, lora = run.config.get("teacher") or {}, run.config.get("lora") or {}
    parts = []
    if run.rungs:
        ladder = [run.rungs[0].teacher_steps, *(rung.student_steps for rung in run.rungs)]
        parts.append(f"ladder {' → '.join(map(str, ladder))}")
    origins = [origin for rung in run.rungs if (origin := _origin(run, rung)) is not None]
    if origins:
        parts.append(f"started from {origins[-1]}")
    if "path" in teacher:
        parts.append(f"teacher {teacher['path']}")
    if run.smaller_base is not None:
        parts.append(f"on {run.smaller_base}")
    if "guidance_scale" in teacher:
        parts.append(f"guidance {format_number(teacher['guidance_scale'], 'g')}")
    if "rank" in lora:
        parts.append(f"LoRA rank {lora['rank']}")
    if run.results is not None and "num_images" in run.results:
        parts.append(f"{run.results['num_images']:,} images per row, same prompts and noise")
    real = (run.part("protocol") or {}).get("real_images")
    if isinstance(real, str) and real != "none":
        parts.append(f"real images: {real}")
    return ", ".join(parts)


def _origin(run: Run, rung: RungLog) -> str | None:
    """The rung of another run that this rung was copied from, None if it was trained here."""
    return taken_from(run.path, rung.student_steps, (rung.record or {}).get("sha256"))


def _absent(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(columns, reason) for columns missing from the table, as the runs' results give them; each pair once."""
    absent = (one for run in runs for one in run.part("absent") or ())
    return list(dict.fromkeys((str(one.get("columns")), str(one.get("why"))) for one in absent))


def _progress(run: Run) -> Iterator[Progress]:
    found_current = False
    for rung in run.rungs:
        phases = ", ".join(f"{phase.objective} {phase.max_train_steps:,}" for phase in rung.phases)
        if rung.record is not None:
            origin = _origin(run, rung)
            state = "finished" if origin is None else f"taken over from {origin}"
        else:
            state = "in training" if rung.updates and not found_current else "waiting"
            found_current = found_current or bool(rung.updates)
        seconds = number((rung.record or {}).get("training_seconds"))
        name = f"{rung.teacher_steps} → {rung.student_steps}"
        yield Progress(run.name, name, phases, rung.updates, rung.max_train_steps, state, seconds)


def _previews(run: Run) -> Iterator[tuple[str, EmbeddedImage]]:
    for rung in run.rungs:
        for path in rung.previews:
            caption = _preview_caption(rung, path.stem)
            image = sheet(path, f"Preview, {caption}: teacher above, student below", longest=_PREVIEW)
            if image is not None:
                yield caption, image


def _preview_caption(rung: RungLog, stem: str) -> str:
    """The caption of a preview file: "4 steps, after phase 1 (paired)" for the stem phase1-paired-end."""
    place, _, objective = stem.removeprefix("phase").removesuffix("-end").partition("-")
    return f"{rung.title}, after phase {place} ({objective})"


def _config_text(run: Run) -> str:
    return yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)


def _facts(run: Run) -> list[tuple[str, str]]:
    """Protocol, then environment, as flat (key, value) pairs; nested keys are dotted."""
    return [*_flat(run.part("protocol") or {}), *_flat(run.environment)]


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, part in value.items():
        if isinstance(part, dict):
            yield from _flat(part, f"{prefix}{key}.")
        elif isinstance(part, list):
            yield f"{prefix}{key}", ", ".join(map(str, part))
        else:
            yield f"{prefix}{key}", "none" if part is None else str(part)
