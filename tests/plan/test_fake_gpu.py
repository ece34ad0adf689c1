"""Every phase of every shipped config runs at full size on a pretended GPU, with the peaks that were recorded.

python -m tests.plan.test_fake_gpu     records them again
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stepdistill.config.load import load_config
from stepdistill.config.saved import resolved
from tests.plan.fake_gpu import peaks

RECORD = Path(__file__).with_name("peaks.json")
# The letters and `small` run on a CPU in other tests.
CONFIGS = sorted(p.stem for p in Path("configs").glob("sd*.yaml"))


def update_of(name):
    """What a micro-batch depends on; configs alike in it differ only in samples per update and in kept activations."""
    settings = resolved(load_config(f"configs/{name}.yaml", ["training.memory_budget=null"]))
    del settings["name"], settings["training"]["gradient_accumulation_steps"]
    return json.dumps(settings, sort_keys=True)


DIFFERENT = {update_of(name): name for name in reversed(CONFIGS)}
"""The first config of those that are alike."""


def test_every_config_is_recorded():
    assert sorted(json.loads(RECORD.read_text())) == CONFIGS


def test_configs_with_the_same_micro_batch_have_the_same_record():
    recorded = json.loads(RECORD.read_text())
    for name in CONFIGS:
        assert recorded[name] == recorded[DIFFERENT[update_of(name)]], name


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DIFFERENT.values()))
def test_every_phase_runs_on_a_pretended_gpu_with_the_recorded_peak(name):
    """A tensor on the wrong device, or of a dtype that does not fit, fails. The record is of the meta device, like plans."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.plan.fake_gpu", f"configs/{name}.yaml"],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, recorded = json.loads(done.stdout), json.loads(RECORD.read_text())[name]
    assert found.keys() == recorded.keys()
    for title, peak in found.items():
        # torch computes SiLU's gradient in several steps on this device, and in one on CUDA, as on the meta device
        assert recorded[title] <= peak <= 1.06 * recorded[title], title


@pytest.mark.slow
def test_a_tensor_on_the_cpu_is_noticed(tmp_path):
    code = (
        "import torch\n"
        "from tests.plan.fake_gpu import NAME, pretended_gpu\n"
        "with pretended_gpu():\n"
        "    torch.ones(2, 2, device=NAME) @ torch.ones(2, 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "DeviceMismatch" in done.stderr


def record():
    """Writes the peaks that the meta device has now."""
    found = {name: peaks(load_config(f"configs/{name}.yaml"), device="meta") for name in CONFIGS}
    RECORD.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    record()
