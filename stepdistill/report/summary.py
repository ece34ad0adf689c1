"""The section "In short": one line per rung, made only of measured numbers; and the warnings of the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from stepdistill.report.entries import Entry, equal_passes
from stepdistill.report.number_format import format_number, percent, steps_text
from stepdistill.report.read import Run

_DISTANCES = (("fid_to_teacher", "FID to teacher"), ("fid_to_real", "FID to real"))
# Protocol entries that must be equal for the numbers of two runs to be comparable.
_SHARED = (
    "num_images",
    "teacher_images",
    "prompts_sha256",
    "seed",
    "feature_extractor_sha256",
    "resize",
    "real_images_key",
    "dtype",
)


@dataclass(frozen=True)
class Sentence:
    """One line: the step count as heading, the label of a foreign LoRA's row (else ""), and the text."""

    heading: str
    lora: str
    text: str


def sentences(entries: Sequence[Entry]) -> list[Sentence]:
    """One sentence per distilled row of a run, or with several runs one per step count; most steps first."""
    distilled = sorted(
        (e for e in entries if e.kind != "teacher"), key=lambda e: (-e.steps, e.kind == "lora")
    )
    if len({entry.run.name for entry in entries}) > 1:
        steps = dict.fromkeys(entry.steps for entry in distilled)
        groups = [[e for e in distilled if e.steps == n] for n in steps]
        parts = [(group[0].steps, "", _compared(group, entries)) for group in groups]
    else:
        parts = [(e.steps, e.label if e.kind == "lora" else "", _measured(e, entries)) for e in distilled]
    return [
        Sentence(steps_text(steps), lora, text[0].upper() + text[1:]) for steps, lora, text in parts if text
    ]


def joined_names(runs: Sequence[Run]) -> str:
    """The runs' names as text: "a", "a and b", "a, b and c"."""
    *before, last = (run.name for run in runs)
    return f"{', '.join(before)} and {last}" if before else last


def report_warnings(runs: Sequence[Run]) -> list[str]:
    """The warnings in the runs' results, differences in how several runs were measured, and missing numbers."""
    warnings = list(dict.fromkeys(str(text) for run in runs for text in run.part("warnings") or ()))
    evaluated = [run for run in runs if run.results is not None]
    for key in _SHARED:
        values = {run.name: (run.part("protocol") or {}).get(key, run.part(key)) for run in evaluated}
        if len({str(value) for value in values.values()}) > 1:
            each = ", ".join(f"{name}: {value}" for name, value in values.items())
            warnings.append(
                f"the runs were measured differently, so their numbers cannot be compared: {key} is {each}"
            )
    warnings += [
        f"{run.name} is only partly evaluated; `stepdistill evaluate` continues. Missing: {', '.join(map(str, missing))}"
        for run in evaluated
        if (missing := run.part("unmeasured"))
    ]
    warnings += [
        f"{run.name} has no numbers yet: run `stepdistill evaluate`" for run in runs if run.results is None
    ]
    return warnings


def _measured(entry: Entry, entries: Sequence[Entry]) -> str:
    """A row's numbers as one sentence."""
    parts: list[str] = []
    for key, title in _DISTANCES:
        if entry.value(key) is not None:
            parts = [f"{title} {_formatted(entry, key)}{_comparison(key, entry, entries)}"]
            break
    if entry.value("paired_fid_to_teacher") is not None and entry.kind == "student":
        yardstick = entry.run.other_noise.get("paired_fid_to_teacher")
        beside = "" if yardstick is None else f" (teacher with other noise: {yardstick:.2f})"
        parts.append(f"paired FID {_formatted(entry, 'paired_fid_to_teacher')}{beside}")
    return ", ".join([*parts, *_other_numbers(entry, entries)])


def _compared(group: Sequence[Entry], entries: Sequence[Entry]) -> str:
    """The rows of one step count as one sentence, best first for each number."""
    parts: list[str] = []
    for key, title in (*_DISTANCES, ("prompt_accuracy", "prompt accuracy")):
        measured = [(value, entry) for entry in group if (value := entry.value(key)) is not None]
        if not measured or (key == "fid_to_real" and parts):
            continue
        order = sorted(measured, key=lambda pair: pair[0], reverse=key == "prompt_accuracy")
        each = ", ".join(
            f"{e.name if e.kind == 'lora' else e.run.name} {percent(v) if key == 'prompt_accuracy' else _formatted(e, key)}"
            for v, e in order
        )
        beside = "" if key == "prompt_accuracy" else _comparison(key, order[0][1], entries)
        parts.append(f"{title}{beside}: {each}")
    return "; ".join(parts)


def _formatted(entry: Entry, key: str) -> str:
    return format_number(entry.value(key), entry.run.metrics.get(key, {}).get("format", ".2f"))


def _comparison(key: str, entry: Entry, entries: Sequence[Entry]) -> str:
    """The undistilled teacher's distance and the floor, in brackets, for comparison; "" if neither is known."""
    asides = []
    teacher = equal_passes(entry, entries)
    if teacher is not None and teacher.value(key) is not None:
        same = "network passes" if teacher.row["nfe"] == entry.row["nfe"] else "steps"
        asides.append(f"undistilled {_formatted(teacher, key)} at equal {same}")
    if key in entry.run.floor:
        spec = entry.run.metrics.get(key, {}).get("format", ".2f")
        asides.append(f"floor {format_number(entry.run.floor[key], spec)}")
    return f" ({'; '.join(asides)})" if asides else ""


def _other_numbers(entry: Entry, entries: Sequence[Entry]) -> list[str]:
    phrases = []
    reference = next((e for e in entries if e.is_reference), None)
    accuracy, clip, diversity = (entry.value(k) for k in ("prompt_accuracy", "clip_score", "diversity"))
    if accuracy is not None:
        phrases.append(f"prompt accuracy {percent(accuracy)}")
    if clip is not None:
        beside = None if reference is None else reference.value("clip_score")
        phrases.append(f"CLIP score {clip:.2f}" + (f" (teacher {beside:.2f})" if beside is not None else ""))
    if diversity is not None:
        phrases.append(f"{diversity:.2f} of the teacher's diversity")
    speed_up = entry.value("speed_up")
    if speed_up is not None:
        compared = f"{speed_up:.1f} x faster" if speed_up >= 1 else f"{1 / max(speed_up, 1e-9):.1f} x slower"
        phrases.append(f"{compared} than {reference.name}" if reference is not None else compared)
    return phrases
