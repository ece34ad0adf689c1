"""What a run will do and what it costs, before it starts: passes, memory, time and disk."""

from stepdistill.plan.passes import STAGES as STAGES
from stepdistill.plan.passes import describe as describe
from stepdistill.plan.passes import evaluation_forwards as evaluation_forwards
from stepdistill.plan.passes import measured_seconds_per_pass as measured_seconds_per_pass
from stepdistill.plan.passes import phase_forwards as phase_forwards
from stepdistill.plan.passes import preparation_forwards as preparation_forwards
from stepdistill.plan.passes import shrink_forwards as shrink_forwards
from stepdistill.plan.passes import training_forwards as training_forwards
