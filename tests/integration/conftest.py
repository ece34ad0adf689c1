import pytest

from stepdistill import stages
from stepdistill.config_file import load_config


def tiny_config(output_dir, *overrides):
    """The letters ladder with two updates a phase and 16 images a row."""
    phases = [f"ladder.{rung}.phases.0.max_train_steps=2" for rung in range(5)]
    return load_config(
        "configs/letters.yaml",
        [
            f"output_dir={output_dir}",
            "data.num_images=40",
            "training.train_batch_size=4",
            "evaluation.num_images=16",
            "evaluation.grid_columns=4",
            *phases,
            "ladder.4.phases.1.max_train_steps=2",
            *overrides,
        ],
    )


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """One whole run of the tiny ladder: every stage in sequence."""
    config = tiny_config(tmp_path_factory.mktemp("finished"))
    stages.run_all(config)
    return config
