"""A run folder as the stages leave it, with small random images and made-up numbers."""

import json
import random
from pathlib import Path

import yaml
from PIL import Image

from stepdistill.config.load import load_config
from stepdistill.disk.durable import write_sealed

HOSTILE = (
    "<script>alert(1)</script>",
    "../../x",
    ("\u202eright to left \u200f& \"quoted\" 'text' " * 200)[:4000],
    "a {{ 7 * 7 }} {% raw %} letter",
)
METRICS = {
    "fid_to_real": {"title": "FID to real", "format": ".1f", "better": "lower", "about": "To real images."},
    "fid_to_teacher": {
        "title": "FID to teacher",
        "format": ".2f",
        "better": "lower",
        "about": "To its images.",
    },
    "fid_to_teacher_std": {
        "title": "its standard error",
        "format": ".2g",
        "better": "",
        "about": "By a jackknife.",
    },
    "paired_fid_to_teacher": {
        "title": "paired FID to teacher",
        "format": ".2f",
        "better": "lower",
        "about": "At equal noise.",
    },
    "kid_to_teacher": {"title": "KID to teacher", "format": ".4f", "better": "lower", "about": "Kernel."},
    "kid_to_teacher_std": {"title": "its deviation", "format": ".2g", "better": "", "about": "Over subsets."},
    "prompt_accuracy": {
        "title": "prompt accuracy",
        "format": ".3f",
        "better": "higher",
        "about": "Read right.",
    },
    "diversity": {"title": "diversity", "format": ".2f", "better": "one", "about": "Over seeds."},
    "latent_mse_to_teacher": {
        "title": "latent MSE",
        "format": ".4f",
        "better": "lower",
        "about": "At equal noise.",
    },
    "sharpness_drift": {
        "title": "sharpness",
        "format": "+.3f",
        "better": "zero",
        "about": "Below 0 is blur.",
    },
}
TEACHERS, STUDENTS = (32, 8, 4, 2, 1), (32, 8, 4, 2, 1)
SCALES = (0.0, 0.5, 1.0)


def make_run(folder, *, config="configs/letters.yaml", size=32, prompts=HOSTILE, columns=4):
    """A finished run: training, then the results."""
    write_training(folder, config=config)
    write_results(folder, size=size, prompts=prompts, columns=columns)
    return folder


def write_training(folder, *, config="configs/letters.yaml", updates=None, finished=STUDENTS):
    """config.yaml, environment.json, log.jsonl of the first `updates` updates, and the finished rungs."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved = load_config(config, []).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu", "torch": "2.9.0", "commit": "abc"}))
    lines = [
        record(rung["student_steps"], place, phase["objective"], step)
        for rung in resolved["ladder"]
        for place, phase in enumerate(rung["phases"])
        for step in range(phase["max_train_steps"])
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:updates]))
    for steps in finished:
        rung = folder / "rungs" / str(steps)
        (rung / "previews").mkdir(parents=True)
        (rung / "rung.json").write_text(json.dumps({"student_steps": steps, "training_seconds": 61.5}))
        image(steps, (140, 70)).save(rung / "previews" / "phase0-mse-end.png")
    for rung in resolved["ladder"]:
        for place, phase in enumerate(rung["phases"]):
            if rung["student_steps"] in finished:
                write_looks(folder, rung["student_steps"], place, phase["objective"])


def write_looks(folder, steps, place, objective, *, data=None, noise=0.02, **drift):
    """Writes the looks of the images at a phase's end.

    drift: sharpness, contrast and colour drift of the student; data: the same drifts of the training data; noise: how much
    single images scatter."""
    scatter = random.Random(steps * 10 + place)
    per_image = {
        whose: {
            look: [
                (k + 1.0) * (1 + drifts.get(look, 0.0) + scatter.gauss(0, spread))
                if look != "colour"
                else abs(drifts.get(look, 0.0) + 10 * scatter.gauss(0, spread))
                for k in range(8)
            ]
            for look in ("sharpness", "contrast", "colour")
        }
        for whose, drifts, spread in (("student", drift, noise), ("teacher", {}, 0), ("data", data or {}, 0))
    }
    about = {"images": 8, "seed": 0, "teacher_steps": 32, "guidance_scale": 3.0}
    path = folder / "rungs" / str(steps) / "previews" / f"phase{place}-{objective}-end.json"
    write_sealed(path, {"compared_with": about, "per_image": per_image})


def record(rung, phase, objective, step):
    line = {"rung": rung, "phase": phase, "objective": objective, "step": step}
    line["student_loss"] = 0.5 / (step + 5)
    if objective in ("paired", "single"):
        line |= {"discriminator_loss": 0.6, "mse": 0.1, "discriminator_accuracy_real": 0.7}
        line["discriminator_accuracy_student"] = 0.75
    return line


def image(seed, size):
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def write_images(folder, count, size):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for k in range(count):
        image(k, (size, size)).save(folder / "images" / f"{k:06d}.png")


def row(name, kind, steps, *, worse):
    return {
        "row": name,
        "kind": kind,
        "steps": steps,
        "nfe": 2 * steps if kind == "teacher" else steps,
        "guidance_scale": 3.0 if kind == "teacher" else 1.0,
        "distilled": kind != "teacher",
        "fid_to_real": 20 + worse,
        "fid_to_teacher": 0.8 + worse,
        "fid_to_teacher_std": 0.1,
        "paired_fid_to_teacher": 0.5 * worse,
        "kid_to_teacher": 0.001 * worse,
        "kid_to_teacher_std": 0.0002,
        "prompt_accuracy": 0.99,
        "diversity": 0.97,
        "latent_mse_to_teacher": 0.01 * worse,
        "sharpness_drift": 0.01,
        "seconds_per_image": 0.002 * steps,
        "speed_up": 32 / steps,
        "cost": {
            "seconds_at_batch_1": 0.01 * steps,
            "images_per_second": 500 / steps,
            "best_batch": 32,
            "peak_memory_mib": 812.0,
            "smallest_batch": 1,
        },
    }


def replicates(fid, *, error=0.1):
    """FIDs with one of 8 groups left out each, whose jackknife standard error is `error`, alike in all rows."""
    step = error / 7**0.5
    return [fid + step * (1 if k % 2 else -1) for k in range(8)]


def results_of(prompts):
    rows = [row(f"teacher-{n}", "teacher", n, worse=100 / n) for n in TEACHERS]
    rows += [row(f"student-{n}", "student", n, worse=2 + 1 / n) for n in STUDENTS]
    rows.append(row("lcm-lora", "lora", 4, worse=9))
    few = ["teacher-32", *(f"student-{n}" for n in STUDENTS)]
    return {
        "num_images": 500,
        "reference": "teacher-32",
        "prompts": list(prompts),
        "protocol": {
            "teacher_images": "other seeds",
            "prompts_sha256": "ab",
            "num_images": 500,
            "seed": 1,
            "resize": {"mode": "none"},
        },
        "floor": {"fid_to_real": 5.8, "fid_to_teacher": 2.6},
        "other_noise": {"paired_fid_to_teacher": 2.6, "latent_mse_to_teacher": 0.9},
        "warnings": ["500 images: below 5,000 a Frechet distance is mostly bias"],
        "metrics": METRICS,
        "rows": rows,
        "replicates": {r["row"]: {"fid_to_teacher": replicates(r["fid_to_teacher"])} for r in rows},
        "diversity_grid": {"prompts": list(prompts)[:2], "seeds": 3, "rows": few},
        "scale_sweep": {
            "scales": list(SCALES),
            "images": 2,
            "cells": [
                {"row": name, "scale": s, "latent_mse_to_teacher": 0.1 + abs(s - 1)}
                for name in few[1:]
                for s in SCALES
            ],
        },
        "matrix": {
            "images": 2,
            "cells": [
                {"adapter": a, "steps": b, "latent_mse_to_teacher": 0.1 + abs(a - b)}
                for a in STUDENTS
                for b in STUDENTS
            ],
        },
    }


def write_results(folder, *, size, prompts, columns):
    """Writes evaluation/: results.json and every image that it names."""
    evaluation, results = folder / "evaluation", results_of(prompts)
    for one in results["rows"]:
        write_images(evaluation / one["row"], columns, size)
    for name in results["diversity_grid"]["rows"]:
        write_images(evaluation / "seeds" / name, 6, size)
    for cell in results["scale_sweep"]["cells"]:
        write_images(evaluation / "scales" / f"{cell['row']}@{cell['scale']:g}", 2, size)
    for cell in results["matrix"]["cells"]:
        write_images(evaluation / "matrix" / f"{cell['adapter']}@{cell['steps']}", 2, size)
    save(folder, results)


def load(folder):
    return json.loads((Path(folder) / "evaluation" / "results.json").read_text())


def save(folder, results):
    (folder / "evaluation" / "results.json").write_text(json.dumps(results))
