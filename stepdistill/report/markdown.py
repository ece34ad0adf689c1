"""The table of results as Markdown: results.md, and the table in a model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.report.number_format import format_number
from stepdistill.report.read import DataCounts

_FIRST = {"row": ("model", ""), "nfe": ("network passes", "")}
_METRICS = {
    "fid_to_real": ("FID to real", ".1f"),
    "fid_to_teacher": ("FID to teacher", ".2f"),
    "paired_fid_to_teacher": ("paired FID", ".2f"),
    "prompt_accuracy": ("prompt accuracy", ".3f"),
    "latent_mse_to_teacher": ("latent MSE to teacher", ".4f"),
}
_LAST = {"seconds_per_image": ("s / image", ".4f"), "speed_up": ("speed-up", ".1f")}


def markdown_table(rows: list[dict[str, Any]], metrics: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The rows as a Markdown table with a short list of metrics, or with all of `metrics` (title and format by key)."""
    middle = {
        key: (about.get("title", key), about.get("format", "g")) for key, about in (metrics or {}).items()
    }
    shown = {key: column for key, column in (middle or _METRICS).items() if any(key in row for row in rows)}
    columns = _FIRST | shown | _LAST
    lines = [[title for title, _ in columns.values()], ["---", *["---:"] * (len(columns) - 1)]]
    lines += [[_text(row.get(key), key, spec) for key, (_, spec) in columns.items()] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def markdown(name: str, results: Mapping[str, Any], data: Sequence[DataCounts] = ()) -> str:
    """results.md: the table, what it was measured on, and how many samples of the data were used and left out."""
    metrics, rows = results.get("metrics"), results["rows"]
    parts = [f"# {name}", markdown_table(rows), table_notes(results), "![same noise per column](grid.png)"]
    if metrics:
        parts += ["## All metrics", markdown_table(rows, metrics)]
    absent = [f"\n- {one.get('columns')}: {one.get('why')}" for one in results.get("absent") or []]
    if absent:
        parts.append(f"Not in the table:{''.join(absent)}")
    for counts in data:
        kinds = "".join(f"\n- {kind}: {count:,}" for kind, count in counts.bad.items())
        parts.append(f"{counts}{kinds}")
    return "\n\n".join(parts) + "\n"


def table_notes(results: Mapping[str, Any]) -> str:
    """One paragraph below the table: which images each distance compares, the distance between two sets of the same kind
    (floor), and where the prompts and the real images come from."""
    floor, noise, protocol = (results.get(key) or {} for key in ("floor", "other_noise", "protocol"))
    reference = results.get("reference", "the teacher")
    notes = [f"{results.get('num_images', 'Some')} images per row, drawn from the same prompts and noise."]
    measured = {key for row in results.get("rows") or [] for key in row}
    if "fid_to_teacher" in measured:
        notes.append(f"FID to teacher: against images of {reference} with other seeds.")
    if measured & {"paired_fid_to_teacher", "latent_mse_to_teacher"}:
        notes.append(
            f"Paired FID and latent MSE: against images of {reference} with the same noise; {reference} itself has 0."
        )
    if "prompts" in protocol:
        notes.append(f"Prompts: {protocol['prompts']}. Real images: {protocol.get('real_images')}.")
    if results.get("unmeasured"):
        notes.append(f"Not measured yet: {', '.join(map(str, results['unmeasured']))}.")
    if floor.get("fid_to_real") is not None:
        second = (
            f" (the second: {protocol['other_real_images']})" if protocol.get("other_real_images") else ""
        )
        notes.append(
            f"Floor of FID to real, between two sets of real images{second}: {floor['fid_to_real']:.1f}."
        )
    if floor.get("fid_to_teacher") is not None:
        notes.append(
            f"Floor of FID to teacher, between images of {reference} with two sets of seeds: {floor['fid_to_teacher']:.2f}."
        )
    paired = [
        f"{title} {noise[key]:{spec}}"
        for key, (title, spec) in _METRICS.items()
        if isinstance(noise.get(key), int | float)
    ]
    if paired:
        notes.append(f"{reference} against itself with other noise: {', '.join(paired)}.")
    return " ".join(notes)


def _text(value: Any, key: str, spec: str) -> str:
    if isinstance(value, str):
        return " ".join(value.split()).replace("|", "\\|")
    text = format_number(value, spec)
    return f"{text} x" if key == "speed_up" and value is not None else text
