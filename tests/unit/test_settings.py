"""Which settings may change after a run has started, and which a checkpoint depends on."""

import pytest

from stepdistill.config import ConfigError, RunConfig, Section
from stepdistill.config.load import load_config
from stepdistill.config.saved import resolved
from stepdistill.config.schema import affects, field_affects, section_in
from stepdistill.config.section import Affects
from stepdistill.run.rungs import rung_folder
from stepdistill.run.settings import config_hash, differences, flat, settings_behind
from stepdistill.stages import check_run, open_run

CONFIG = "configs/letters.yaml"


def sections(section=RunConfig):
    """RunConfig and every section below it."""
    yield section
    for field in section.model_fields.values():
        inner = section_in(field.annotation)
        if inner is not None:
            yield from sections(inner)


def below(section):
    """All subclasses."""
    for inner in section.__subclasses__():
        yield inner
        yield from below(inner)


def test_every_field_of_the_config_is_classified_once():
    """Either by its own annotation or by its section's class, and never by both with the same word."""
    every = set(sections())
    assert set(below(Section)) == every
    for section in every:
        assert isinstance(section.affects, Affects), section
        for name, field in section.model_fields.items():
            marks = [part for part in field.metadata if isinstance(part, Affects)]
            assert len(marks) <= 1, (section, name)
            assert field_affects(field) is not section.affects, f"{section.__name__}.{name} says it twice"
            assert not (marks and section_in(field.annotation)), f"the class of {name} says it"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("seed", "EVERY_RUNG"),
        ("lora.rank", "EVERY_RUNG"),
        ("teacher.loras.0.weight", "EVERY_RUNG"),
        ("shrink.objectives.0.kind", "EVERY_RUNG"),
        ("training.train_batch_size", "SPLIT"),
        ("training.checkpoint.keep", "NOTHING"),
        ("training.gradient_checkpointing", "NOTHING"),
        ("ladder.1.phases.0.discriminator.trunk", "ITS_RUNG"),
        ("ladder.1.phases.0.objectives.1.weight", "ITS_RUNG"),
        ("data.on_bad.image_missing", "NOTHING"),
        ("evaluation.loras.0.scheduler_options.eta", "NOTHING"),
        ("a_key_of_a_later_version", "EVERY_RUNG"),
    ],
)
def test_what_a_setting_affects(key, expected):
    assert affects(key) is Affects[expected]


def changed(folder, *overrides):
    return load_config(CONFIG, [f"output_dir={folder}", *overrides])


@pytest.fixture
def run_with_a_finished_rung(tmp_path):
    """The folder of a run whose first rung is finished, as far as the check of settings sees it."""
    config = changed(tmp_path)
    open_run(config)
    rung_folder(config.run_dir, config.ladder[0].student_steps).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    "allowed",
    [
        "ladder.1.phases.0.learning_rate=1e-5",
        "ladder.2.node_steps=8",
        "training.train_batch_size=16",
        "training.gradient_checkpointing=true",
        "training.max_minutes=3.5",
        "export.dtype=float32",
    ],
)
def test_settings_that_no_finished_rung_depends_on_may_change(run_with_a_finished_rung, allowed):
    config = changed(run_with_a_finished_rung, allowed)
    open_run(config)
    key, _, value = allowed.partition("=")
    assert str(flat(resolved(load_config(config.run_dir)))[key]).lower() in (value, "1e-05")


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (
            "ladder.0.phases.0.learning_rate=1e-5",
            r"ladder\.0\.phases\.0\.learning_rate: got 1e-05, but .* with ladder\.0\.phases\.0\.learning_rate=0\.\d+",
        ),
        (
            "training.max_grad_norm=7",
            r"training\.max_grad_norm: got 7\.0, but .* was started with training\.max_grad_norm=1\.0; fix: use ",
        ),
        (
            "seed=3",
            r"; fix: use seed=0, or `stepdistill run .*/letters` to continue that run as it was, or ",
        ),
        (
            "data.resolution=64",
            r"resolution: got 64, but .* with the default; fix: leave data\.resolution out, or ",
        ),
    ],
)
def test_settings_that_a_finished_rung_depends_on_may_not(run_with_a_finished_rung, refused, says):
    with pytest.raises(ConfigError, match=says):
        check_run(changed(run_with_a_finished_rung, refused))


def test_all_differences_are_listed_with_both_values(run_with_a_finished_rung):
    with pytest.raises(ConfigError) as caught:
        check_run(changed(run_with_a_finished_rung, "seed=3", "lora.rank=4", "training.ema_decay=0.5"))
    assert "seed: got 3" in str(caught.value)
    assert "(also other: lora.rank: " in str(caught.value)
    assert " -> 4, training.ema_decay: 0.0 -> 0.5)" in str(caught.value)


def test_a_rung_may_be_added_after_the_finished_ones(run_with_a_finished_rung):
    config = changed(run_with_a_finished_rung)
    shorter = config.model_copy(update={"ladder": config.ladder[:2]})
    open_run(shorter)
    check_run(config)


def test_a_state_depends_on_its_phase_and_those_before_but_on_no_later_setting():
    config = load_config(CONFIG)
    position = next(i for i, rung in enumerate(config.ladder) if len(rung.phases) > 1)
    key = f"ladder.{position}.phases.1.learning_rate"
    other = load_config(CONFIG, [f"{key}=1e-5"])
    for step, expected in ((0, []), (3, [key])):
        behind = [settings_behind(c, position=position, phase=1, step=step) for c in (config, other)]
        assert [changed for changed, _, _ in differences(*behind)] == expected
    elsewhere = load_config(CONFIG, [f"ladder.{position + 1}.phases.0.learning_rate=1e-5", "name=other"])
    behind = [settings_behind(c, position=position, phase=1, step=3) for c in (config, elsewhere)]
    assert behind[0] == behind[1]


def test_the_hash_of_the_config_ignores_where_the_run_lies(tmp_path):
    assert config_hash(changed(tmp_path, "name=other")) == config_hash(load_config(CONFIG))
    assert config_hash(changed(tmp_path, "seed=5")) != config_hash(load_config(CONFIG))
