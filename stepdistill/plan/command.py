"""What `stepdistill plan` prints."""

from stepdistill.config import ConfigError, RunConfig
from stepdistill.plan.budget import Keeps, kept_modules
from stepdistill.plan.cards import Card, card_of
from stepdistill.plan.disk_need import DiskNeed, disk_need
from stepdistill.plan.real_update import RealRun
from stepdistill.plan.text import measured_line, measured_title, plan_text, verdict
from stepdistill.plan.whole_run import RunPlan, card_here, distinct_phases, plan_run, smaller_run
from stepdistill.teacher.facts import TeacherFacts

_USUAL = "24GB"


def print_plan(
    config: RunConfig, facts: TeacherFacts, *, card: Card | None, price: float | None, measure: bool
) -> None:
    """Prints the plan; ConfigError after it if the run does not fit the card.

    Args:
        config: the run.
        facts: the teacher's configs.
        card: the card to plan for; default: the GPU of this machine, or one of 24 GB.
        price: of an hour of the card.
        measure: also make two updates of every kind of phase on this machine's device, with random weights.
    """
    card = card or card_here() or card_of(_USUAL)
    keeps = kept_modules(config, facts)
    planned = plan_run(config, facts, card, keeps=keeps)
    changes = None if planned.fits else smaller_run(config, facts, card)
    print(plan_text(planned, disk=_disk(config, facts), changes=changes, price=price), flush=True)
    if measure:
        _print_measured(config, facts, planned, keeps)
    if not planned.fits:
        raise ConfigError(verdict(planned))


def _disk(config: RunConfig, facts: TeacherFacts) -> DiskNeed | None:
    try:
        return disk_need(config, facts)
    except (ValueError, OSError):  # the data are not here yet
        return None


def _print_measured(config: RunConfig, facts: TeacherFacts, planned: RunPlan, keeps: Keeps) -> None:
    real = RealRun(config, facts)
    print("\n" + measured_title(real.device), flush=True)
    for number, cost in distinct_phases(planned):
        kept = keeps.get((cost.rung.student_steps, number), ())
        print(measured_line(cost, real.update(cost.rung, cost.phase, keeps=kept)), flush=True)
