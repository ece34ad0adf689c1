"""The report of a run: results.json, a Markdown table, a picture. JSON and PNG in; no torch."""

from pathlib import Path
from typing import Any

from PIL import Image

from stepdistill.durable import read_json, write_json, write_text
from stepdistill.report.grid import image_grid

_COLUMNS = {
    "row": ("model", "{}"),
    "nfe": ("U-Net passes", "{}"),
    "fid_to_real": ("FID to real", "{:.1f}"),
    "fid_to_teacher": ("FID to teacher", "{:.2f}"),
    "prompt_accuracy": ("prompt accuracy", "{:.3f}"),
    "latent_mse_to_teacher": ("latent MSE to teacher", "{:.4f}"),
    "seconds_per_image": ("s / image", "{:.4f}"),
    "speed_up": ("speed-up", "{:.1f} x"),
}


def build_report(run_dir: Path, *, grid_columns: int = 10) -> Path:
    """Writes report/results.json, results.md and grid.png of an evaluated run; returns the folder."""
    results = read_json(run_dir / "evaluation" / "results.json")
    if results is None:
        raise ValueError(
            f"{run_dir} is not evaluated yet: run `stepdistill evaluate` (pipelines/evaluate.py) first"
        )
    folder = run_dir / "report"
    results["environment"] = read_json(run_dir / "environment.json")
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", markdown(run_dir.name, results))
    comparison_grid(run_dir, results, columns=grid_columns).save(folder / "grid.png")
    return folder


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [[title for title, _ in _COLUMNS.values()], ["---", *["---:"] * (len(_COLUMNS) - 1)]]
    lines += [[form.format(row[key]) for key, (_, form) in _COLUMNS.items()] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def markdown(name: str, results: dict[str, Any]) -> str:
    """results.md: the table and what it was measured on."""
    return (
        f"# {name}\n\n{markdown_table(results['rows'])}\n\n"
        f"{results['num_images']} images a row, equal prompts and noise. FID to teacher: against the images of "
        f"{results['reference']}. Two sets of real images are {results['fid_floor']:.1f} apart at this number of images.\n\n"
        f"![same noise per column](grid.png)\n"
    )


def comparison_grid(run_dir: Path, results: dict[str, Any], *, columns: int) -> Image.Image:
    """Rows: the reference, then for each step count the undistilled teacher and the student; same noise per column."""
    names = {row["row"] for row in results["rows"]}
    order = [results["reference"]]
    for row in sorted((r for r in results["rows"] if r["distilled"]), key=lambda r: -r["steps"]):
        order += [n for n in (f"teacher-{row['steps']}", row["row"]) if n in names and n not in order]
    return image_grid(
        {
            name.replace("-", " "): [
                Image.open(run_dir / "evaluation" / name / "images" / f"{k:06d}.png") for k in range(columns)
            ]
            for name in order
        }
    )
