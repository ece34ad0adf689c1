"""Training on pictures that may not leave their sites: rounds of training and merging, against pooled data and one site.

    python eval/sites.py [--sites 4] [--rounds 4] [--seeds 20 21 22] [--updates 1.0] [key=value ...]

Each site has pictures of its own letters of the alphabet, none of which another site has. Every rung is trained in rounds:
each site begins with the LoRA that the last round merged, trains on its own pictures, and `stepdistill merge` averages what
the sites' LoRAs change. The merged rung is the next rung's teacher. A site makes as many updates in all rounds together as
the pooled training makes, times --updates; so the sites take the time of the pooled training if they train at once, and as
many times its passes as there are sites.

All rows draw the same captions of the whole alphabet, which are held out everywhere.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from side_by_side import MAIN, STEPS, Table, arguments, base_config, by_steps, measure, summary, write

from stepdistill import stages
from stepdistill.config import LoraRow, RunConfig
from stepdistill.config.load import parse_config
from stepdistill.config.saved import resolved
from stepdistill.data.held_out import is_held_out
from stepdistill.demo.letters import LETTERS
from stepdistill.demo.world import WORLDS
from stepdistill.evaluation.check import check_evaluation
from stepdistill.run.rungs import rung_folder
from stepdistill.runtime import source_commit

METHODS = ("pooled", "merged", "one-site")


def letters_of(site: int, sites: int) -> str:
    """The letters of a site: neighbours in the alphabet."""
    return LETTERS[site * len(LETTERS) // sites : (site + 1) * len(LETTERS) // sites]


def write_pictures(folder: Path, letters: str, count: int, *, seed: int, held_out: float) -> None:
    """Writes `count` captioned PNGs of these letters, of captions that are not held out."""
    if folder.exists():
        return
    world, partial = WORLDS["letters"], folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    ours = [c for c in world.captions() if c.split()[3].upper() in letters and not is_held_out(c, held_out)]
    for index, caption in enumerate(world.sample(count, seed=seed, among=ours)):
        world.image(caption, seed=seed, index=index).save(partial / f"{index:05d}.png")
        (partial / f"{index:05d}.txt").write_text(caption)
    partial.rename(folder)


def on_data(config: RunConfig, name: str, source: Path) -> RunConfig:
    """The config as a run of this name on a folder of pictures."""
    data = {**resolved(config)["data"], "source": str(source), "num_images": None, "held_out": 0.0}
    evaluation = {**resolved(config)["evaluation"], "features": "reader"}
    changes = {"name": f"{name}-s{config.seed}", "data": data, "evaluation": evaluation}
    return parse_config(resolved(config) | changes)


def train(config: RunConfig, cache_of: RunConfig | None = None) -> None:
    """Trains and exports a run, with the latents of another run of the same data if one is given."""
    if cache_of is not None and not (config.run_dir / "cache").exists():
        stages.open_run(config)
        shutil.copytree(cache_of.run_dir / "cache", config.run_dir / "cache")
    stages.prepare(config)
    stages.distill(config)
    stages.export(config)


def one_round(config: RunConfig, rung: int, number: int, merged: Path, share: float) -> RunConfig:
    """A site's run of one round of a rung.

    Args:
        config: the site's.
        rung: the rung's index in the ladder.
        number: of the round, from 0.
        merged: the folder of what earlier rounds merged: <steps>-<round>, and finished rungs in rungs/<steps>.
        share: of the config's updates that this round makes.
    """
    raw = resolved(config)
    raw["ladder"] = raw["ladder"][: rung + 1]
    last = raw["ladder"][-1]
    steps = last["student_steps"]
    for phase in last["phases"]:
        phase["max_train_steps"] = max(1, round(phase["max_train_steps"] * share))
    if number:
        last["init"] = str(merged / f"{steps}-{number - 1}")
    if rung:
        raw["start_from"] = str(merged / "rungs" / str(raw["ladder"][-2]["student_steps"]))
    # another round has another seed, so that it does not draw the samples of the last one
    raw |= {"name": f"{config.name}-{steps}-{number}", "seed": config.seed + 1000 * number}
    return parse_config(raw)


def train_in_rounds(sites: Sequence[RunConfig], merged: Path, rounds: int, updates: float) -> None:
    """Trains every rung in rounds; merged/rungs/<steps> is the merged rung of the last one."""
    for rung, of in enumerate(sites[0].ladder):
        finished = merged / "rungs" / str(of.student_steps)
        for number in range(rounds):
            target = finished if number == rounds - 1 else merged / f"{of.student_steps}-{number}"
            if target.exists():
                continue
            local = [one_round(site, rung, number, merged, updates / rounds) for site in sites]
            for site, config in zip(sites, local, strict=True):
                train(config, site)
            stages.merge([rung_folder(c.run_dir, of.student_steps) for c in local], output=target)
            for (
                config
            ) in local:  # what a site keeps is its pictures; the latents are in the first run of each
                shutil.rmtree(config.run_dir / "cache")


def compared(args: argparse.Namespace, seed: int) -> Table:
    """One seed's table of the three ways."""
    base = base_config(args, seed)
    place = Path(base.output_dir) / f"sites-s{seed}"
    held_out, count = base.data.held_out or 0.0, base.data.num_images or WORLDS["letters"].num_images
    sites = []
    for site in range(args.sites):
        folder, letters = place / f"pictures-{site}", letters_of(site, args.sites)
        write_pictures(folder, letters, count // args.sites, seed=seed + 100 * site, held_out=held_out)
        sites.append(on_data(base, f"site{site}", folder))
    pooled = on_data(base, "pooled", pooled_pictures(place, args.sites))
    train(pooled)
    alone = sites[0]
    train(alone)
    for site in sites[1:]:
        stages.prepare(site)
    train_in_rounds(sites, place / "merged", args.rounds, args.updates)
    folders = {"pooled": pooled.run_dir, "merged": place / "merged", "one-site": alone.run_dir}
    rows = [
        LoraRow(name=f"{name}-{n}", path=str(rung_folder(folder, n)), steps=n)
        for name, folder in folders.items()
        for n in STEPS
    ]
    return measure(base, f"table-s{seed}", rows)


def pooled_pictures(place: Path, sites: int) -> Path:
    """A folder with the pictures of all sites."""
    pooled = place / "pictures"
    if not pooled.exists():
        partial = place / ".pictures.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for site in range(sites):
            for file in (place / f"pictures-{site}").iterdir():
                shutil.copyfile(file, partial / f"{site}-{file.name}")
        partial.rename(pooled)
    return pooled


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares rounds of merging with pooled data and one site.")
    arguments(parser, output="eval/results/sites", output_dir="runs/sites", seeds=(20, 21, 22))
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--updates", type=float, default=1.0, help="of a site, as a share of the pooled training's"
    )
    args = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    made_at = source_commit()
    check_evaluation(base_config(args, 0))
    tables = [compared(args, seed) for seed in args.seeds]
    first = base_config(args, 0)
    rows = [f"teacher-{max(first.evaluation.teacher_steps)}"]
    full, entries = summary(tables, [*rows, *(f"{name}-{n}" for n in STEPS for name in METHODS)])
    parts = [by_steps(entries, METHODS, measure_name) for measure_name in MAIN]
    text = "\n\n".join([*parts, full])
    payload = {"commit": made_at, "config": args.config, "seeds": args.seeds, "table": entries}
    payload |= {"sites": args.sites, "rounds": args.rounds, "updates": args.updates}
    write(args.output, text, tables, payload | {"num_images": first.evaluation.num_images})
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
