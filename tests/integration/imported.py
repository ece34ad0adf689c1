"""Imports what commands of training and evaluation import, for the process that is forked in tests."""

import importlib

for name in (
    "accelerate.commands.launch",
    "diffusers",
    "peft",
    "torch.distributed.run",
    "torchmetrics.image.fid",
    "transformers",
    "stepdistill.cli",
    "stepdistill.evaluation.evaluate",
    "stepdistill.ladder.phases",
):
    importlib.import_module(name)
