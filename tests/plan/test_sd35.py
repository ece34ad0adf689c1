"""The memory of SD3.5-medium at 1024 px, counted on the meta device, before any of its files is on this disk."""

import pytest

from stepdistill.config.load import load_config
from stepdistill.plan.cards import GIB, card_of
from stepdistill.plan.dry_update import DryRun
from stepdistill.plan.other_stages import OtherStages
from stepdistill.teacher.families import plannable_facts


@pytest.mark.slow
def test_an_update_of_sd35_medium_fits_20_gib_and_its_texts_are_encoded_in_less():
    config = load_config("configs/sd35_medium_24gb.yaml", ["training.memory_budget=null"])
    facts, card = plannable_facts(config), card_of("24GB")
    rung = config.ladder[1]
    dry = DryRun(config, facts, card)
    mse, adversarial = (dry.update(rung, phase) for phase in rung.phases)
    assert mse.peak < adversarial.peak < 20 * GIB
    stored = [t for name, t in dry.network.model.state_dict().items() if "lora_" not in name]
    assert sum(t.numel() for t in stored) == pytest.approx(2.47e9, rel=0.01)  # 4.94 GB in half precision
    half = OtherStages(config, facts, card).prepare_bytes()
    whole = load_config("configs/sd35_medium_24gb.yaml", ["data.text_dtype=float32"])
    assert half < 18 * GIB < OtherStages(whole, facts, card).prepare_bytes()
