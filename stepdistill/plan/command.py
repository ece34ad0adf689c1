"""What `stepdistill plan` prints."""

import logging

from stepdistill.config import ConfigError, RunConfig
from stepdistill.plan.budget import kept_modules
from stepdistill.plan.cards import Card, card_of
from stepdistill.plan.disk_need import DiskNeed, disk_need
from stepdistill.plan.real_update import measured_phases
from stepdistill.plan.smaller import smaller_run
from stepdistill.plan.taps import check_taps
from stepdistill.plan.text import Costs, measured_line, measured_title, plan_text, verdict
from stepdistill.plan.whole_run import card_here, plan_run
from stepdistill.runtime import default_device
from stepdistill.teacher.facts import TeacherFacts

logger = logging.getLogger(__name__)
_USUAL = "24GB"


def print_plan(
    config: RunConfig,
    facts: TeacherFacts,
    *,
    card: Card | None,
    cards: int = 1,
    price: float | None,
    measure: bool,
) -> None:
    """Prints the plan; ConfigError after it if the run does not fit the card.

    Args:
        config: the run.
        facts: the teacher's configs.
        card: the card to plan for; default: the GPU of this machine, or one of 24 GB.
        cards: how many of them train together, each with the config's micro-batches.
        price: of an hour of one card.
        measure: also make two updates of every kind of phase on this machine's device, with random weights.
    """
    check_taps(config, facts)
    keeps = kept_modules(config, facts)
    card = card or card_here()
    if card is None:
        logger.info("plan: no GPU here and none named, so for one of %s; --gpu names another", _USUAL)
        card = card_of(_USUAL)
    planned = plan_run(config, facts, card, keeps=keeps)
    changes = None if planned.fits else smaller_run(config, facts, planned)
    costs = Costs(cards, price)
    print(plan_text(planned, disk=_disk(config, facts), changes=changes, costs=costs), flush=True)
    if not planned.fits:
        raise ConfigError(verdict(planned))
    if measure:
        device = default_device()
        print("\n" + measured_title(device), flush=True)
        for cost, measured in measured_phases(config, facts, planned, keeps):
            print(measured_line(cost, measured, device), flush=True)


def _disk(config: RunConfig, facts: TeacherFacts) -> DiskNeed | None:
    try:
        return disk_need(config, facts)
    except (ValueError, OSError):  # the data are not here yet
        return None
