"""Every row drawn and measured: results.json's content."""

import copy
import logging

import numpy as np
import torch

from stepdistill.config import RunConfig
from stepdistill.demo import letters
from stepdistill.demo.reader import load_reader
from stepdistill.durable import write_json
from stepdistill.evaluation.generate import Generator, read_images, read_latents, rows_of
from stepdistill.evaluation.metrics import fid, latent_mse, prompt_accuracy
from stepdistill.models.folder import embedded_folder
from stepdistill.rng import derive_seed
from stepdistill.rungs import require_rung
from stepdistill.runtime import default_device

logger = logging.getLogger(__name__)


def evaluate(config: RunConfig) -> dict:
    """Draws what is not drawn yet, measures all rows, writes evaluation/results.json and returns it.

    Needs every rung finished and exported; ValueError otherwise.
    """
    rows = rows_of(config)
    for row in rows:
        if row.student_steps is not None:
            require_rung(config.run_dir, row.student_steps)
    count = config.evaluation.num_images
    wanted = letters.sample_triples(count, seed=derive_seed(config.seed, "evaluation prompts") % 2**32)
    prompts = [triple.caption for triple in wanted]
    generator = Generator(config, prompts, device=default_device())
    reader = load_reader(embedded_folder("reader") / "model.fp16.safetensors")
    real, other = (_renderings(wanted, config.seed, name) for name in ("real", "other real"))
    features = copy.deepcopy(reader)  # torchmetrics turns it to float64
    manifests = {}
    for row in rows:
        manifests[row.name] = generator.ensure(row)
        logger.info("drew %d images of %s", count, row.name)
    reference = read_images(generator.row_folder(rows[0]), count)
    reference_latents = read_latents(generator.row_folder(rows[0]))
    slowest = manifests[rows[0].name]["seconds_per_image"]
    measured = []
    for row in rows:
        images = read_images(generator.row_folder(row), count)
        seconds = manifests[row.name]["seconds_per_image"]
        measured.append(
            {
                "row": row.name,
                "steps": row.steps,
                "nfe": row.nfe,
                "distilled": row.student_steps is not None,
                "fid_to_real": fid(real, images, features=features),
                "fid_to_teacher": fid(reference, images, features=features),
                "prompt_accuracy": prompt_accuracy(images, wanted, reader=reader),
                "latent_mse_to_teacher": latent_mse(
                    read_latents(generator.row_folder(row)), reference_latents
                ),
                "seconds_per_image": seconds,
                "speed_up": slowest / seconds,
            }
        )
    results = {
        "num_images": count,
        "reference": rows[0].name,
        "fid_floor": fid(real, other, features=features),
        "rows": measured,
    }
    write_json(config.run_dir / "evaluation" / "results.json", results)
    return results


def _renderings(wanted: list[letters.Triple], seed: int, name: str) -> torch.Tensor:
    stream = derive_seed(seed, name) % 2**32
    pixels = [np.asarray(letters.render_at(t, seed=stream, index=i)) for i, t in enumerate(wanted)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
