"""Trains the ladder: the rungs in order, the phases of each, what they share, and the files they leave."""

from stepdistill.ladder.rung_files import read_lora_file as read_lora_file
from stepdistill.ladder.rung_files import read_rung_lora as read_rung_lora
from stepdistill.ladder.rung_files import save_lora as save_lora
from stepdistill.ladder.shared import Shared as Shared
from stepdistill.ladder.shared import load_shared as load_shared
from stepdistill.ladder.speed import seconds_per_forward as seconds_per_forward
from stepdistill.ladder.train import distill as distill
from stepdistill.ladder.train import rungs_of as rungs_of
from stepdistill.ladder.train import rungs_to_copy as rungs_to_copy
