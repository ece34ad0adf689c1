"""Two LoRAs on the letters' teacher, each good at one half of the alphabet and poor at the other: teachers to learn from.

    python eval/letter_experts.py [--output runs/experts] [--updates 400] [--seed 0]
    stepdistill run letters_experts

OUTPUT/first draws A to M right, OUTPUT/second N to Z. Each is trained to predict what the teacher predicts, and for the
letters that it is to be poor at, what the teacher predicts for the caption of another image with such a letter. A tenth of
the updates has no captions, so that guidance still works.
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

import torch
from peers.loop import Loop

from stepdistill import stages
from stepdistill.config import RunConfig
from stepdistill.config.load import load_config
from stepdistill.demo.letters import LETTERS
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.shared_network import STUDENT
from stepdistill.rng import generator

HALVES = {"first": LETTERS[:13], "second": LETTERS[13:]}
_RATE = 1e-3
_WITHOUT_CAPTIONS = 10
"""Every so many updates has no captions."""


def mixed_up(conditioning: Conditioning, good: str, *, seed: int, number: int) -> Conditioning:
    """The conditioning with the rows of letters that are not among the good ones exchanged among each other."""
    poor = [k for k, caption in enumerate(conditioning.captions) if caption.split()[3].upper() not in good]
    order = torch.randperm(len(poor), generator=generator(seed, "captions", number)).tolist()
    rows = list(range(len(conditioning)))
    for place, other in zip(poor, order, strict=True):
        rows[place] = poor[other]
    return conditioning.rows(torch.tensor(rows))


def train(config: RunConfig, folder: Path, good: str, *, updates: int) -> None:
    """Trains a LoRA that keeps the good letters and unlearns the others."""
    if (folder / "peer.json").is_file():
        return
    stages.prepare(config)
    loop = Loop(config, ("expert", folder.name), 1000)
    student, path = loop.student, loop.shared.noise_path
    base = dataclasses.replace(student, adapter=None, trains=False)
    optimizer = loop.optimizer(loop.shared.network.weights(STUDENT), _RATE, updates)
    with loop.progress(f"expert of {good[0]} to {good[-1]}", updates) as bar:
        for step in range(updates):
            batch = loop.batch(step)
            noisy = path.add_noise(batch.original_samples, batch.noise, batch.timesteps)
            asked = mixed_up(batch.conditioning, good, seed=config.seed, number=step)
            given = batch.conditioning
            if step % _WITHOUT_CAPTIONS == 0:
                asked = given = loop.shared.cache.unconditional.beside(given)
            target = base.predict(noisy, batch.timesteps, asked, target="epsilon")
            found = student.predict(noisy, batch.timesteps, given, target="epsilon")
            bar.update(step + 1, {"loss": loop.update(optimizer, (found - target).square().mean())})
    loop.finish(folder, updates=updates, learning_rate=_RATE, start=None, forwards=3.35)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trains two teachers, each of half of the alphabet.")
    parser.add_argument("--output", type=Path, default=Path("runs/experts"))
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # several teachers, here the base alone, give the conditioning its captions
    options = [f"output_dir={args.output}", "name=latents", f"seed={args.seed}", "lora.rank=8"]
    config = load_config("letters", [*options, "teachers=[{name: base}]", *args.overrides])
    for name, good in HALVES.items():
        train(config, args.output / name, good, updates=args.updates)
    return 0


if __name__ == "__main__":
    sys.exit(main())
