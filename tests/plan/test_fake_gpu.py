"""Every phase of shipped configs runs on a pretended GPU, with few layers at full width, and as it does for plans.

python -m tests.plan.test_fake_gpu     records them again
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.full_size import CARDS
from stepdistill.config.load import load_config
from stepdistill.config.saved import resolved
from tests.plan.fake_gpu import peaks

RECORD = Path(__file__).with_name("peaks.json")
CONFIGS = sorted(CARDS)  # the others run on a CPU in other tests


def update_of(name):
    """What a micro-batch depends on; configs alike in it differ only in samples per update and in kept activations."""
    settings = resolved(load_config(f"configs/{name}.yaml", ["training.memory_budget=null"]))
    del settings["name"], settings["training"]["gradient_accumulation_steps"]
    return json.dumps(settings, sort_keys=True)


DIFFERENT = {update_of(name): name for name in reversed(CONFIGS)}
"""The first config of those that are alike."""
PRETENDED = ("sd15_8gb", "sdxl_12gb", "sdxl_dmd2_24gb", "sd35_medium_24gb", "z_image_24gb")
"""One of each family and kind of update; the others differ in sizes alone, or in what the network predicts."""


def test_every_config_is_recorded():
    assert sorted(json.loads(RECORD.read_text())) == CONFIGS


def test_configs_with_the_same_micro_batch_have_the_same_record():
    recorded = json.loads(RECORD.read_text())
    for name in CONFIGS:
        assert recorded[name] == recorded[DIFFERENT[update_of(name)]], name


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETENDED)
def test_every_phase_runs_on_a_pretended_gpu_with_the_peak_of_the_meta_device(name):
    """A tensor on the wrong device, or of a dtype that does not fit, fails. Plans use the meta device."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.plan.fake_gpu", f"configs/{name}.yaml", "--shallow"],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["pretended"].keys() == found["meta"].keys() == json.loads(RECORD.read_text())[name].keys()
    for title, peak in found["pretended"].items():
        # torch computes SiLU's gradient in several steps on this device, and in one on CUDA, as on the meta device
        assert found["meta"][title] <= peak <= 1.1 * found["meta"][title], title


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
