"""A run's YAML file: its sections, the checks that they fit together, errors that name the wrong key. No torch."""

from stepdistill.config.data import Data as Data
from stepdistill.config.evaluation import Evaluation as Evaluation
from stepdistill.config.evaluation import LoraRow as LoraRow
from stepdistill.config.ladder import DiscriminatorOptions as DiscriminatorOptions
from stepdistill.config.ladder import Phase as Phase
from stepdistill.config.ladder import Rung as Rung
from stepdistill.config.section import ConfigError as ConfigError
from stepdistill.config.section import Section as Section
from stepdistill.config.sections import Expert as Expert
from stepdistill.config.sections import Export as Export
from stepdistill.config.sections import RunConfig as RunConfig
from stepdistill.config.sections import Teacher as Teacher
from stepdistill.config.sections import Training as Training
