import pytest

from stepdistill import stages
from stepdistill.config_file import load_config


def tiny_config(output_dir, *overrides):
    """The letters ladder with two updates a phase, the last rung converted to x0, and 16 images a row."""
    phases = [f"ladder.{rung}.phases.0.max_train_steps=2" for rung in range(5)]
    return load_config(
        "configs/letters.yaml",
        [
            f"output_dir={output_dir}",
            "data.num_images=40",
            "training.train_batch_size=4",
            "evaluation.num_images=16",
            "evaluation.grid_columns=4",
            "evaluation.diversity_prompts=2",
            "evaluation.diversity_seeds=2",
            "evaluation.lora_scales=[0.5]",
            "evaluation.study_images=1",
            "evaluation.cost_batch_sizes=[2]",
            *phases,
            "ladder.4.prediction_type=sample",
            "ladder.4.phases=[{objective: convert, max_train_steps: 2}, {objective: mse, max_train_steps: 2}]",
            *overrides,
        ],
    )


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """The tiny ladder climbed and exported, not evaluated."""
    config = tiny_config(tmp_path_factory.mktemp("finished"))
    stages.prepare(config)
    stages.distill(config)
    stages.export(config)
    return config


@pytest.fixture(scope="session")
def finished_run(trained_run):
    """One whole run of the tiny ladder: every stage in sequence."""
    stages.run_all(trained_run)
    return trained_run
