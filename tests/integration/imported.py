"""Imports what commands of training and evaluation import, for the process that is forked in tests."""

import accelerate.commands.launch
import diffusers
import peft
import torch.distributed.run
import torchmetrics.image.fid
import transformers

import stepdistill.cli
import stepdistill.evaluation.evaluate
import stepdistill.ladder.phases
