"""Several teachers: which prompt is whose, and that their answers are those of the models they stand for."""

import dataclasses

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stepdistill.config import ConfigError, Expert, Phase
from stepdistill.config.load import load_config
from stepdistill.models.denoiser import Denoiser
from stepdistill.models.experts import Experts, with_experts
from stepdistill.models.lora_file import Lora, read_lora, weighted_sum, write_lora
from stepdistill.models.network.conditioning import Conditioning
from stepdistill.models.network.kind import load_network
from stepdistill.models.shared_network import STUDENT, SharedNetwork
from stepdistill.teacher.experts import main_expert, shares_of, teachers_key
from stepdistill.teacher.folder import embedded_folder
from tests.conftest import make_conditioning, randn
from tests.integration.exported import random_student
from tests.unit.test_gradients import BATCH, make_batch, make_pair
from tests.unit.test_rank import random_layer

LETTERS = "configs/letters.yaml"
CAPTIONS = ("a red letter a on white", "a blue letter q on pink", "a green letter b on gray")
HALVES = (
    Expert(name="first", prompts="letter [a-m] "),
    Expert(name="second", prompts="letter [n-z] ", weight=3.0),
)


def test_a_prompt_belongs_to_the_teachers_whose_pattern_it_has():
    assert [shares_of(HALVES, caption) for caption in CAPTIONS] == [(1.0, 0.0), (0.0, 1.0), (1.0, 0.0)]
    both = (*HALVES, Expert(name="all"))
    assert shares_of(both, CAPTIONS[0]) == (0.5, 0.0, 0.5)
    assert shares_of(both, CAPTIONS[1].upper()) == (0.0, 0.75, 0.25)
    assert [main_expert(both, caption) for caption in CAPTIONS] == [0, 1, 0]


def test_a_prompt_without_a_teacher_is_named():
    with pytest.raises(
        ConfigError, match=r"no teacher's prompts \('letter \[a-m\] ', 'letter \[n-z\] '\) match 'a cat'"
    ):
        shares_of(HALVES, "a cat")


def with_captions(conditioning, captions=CAPTIONS):
    return dataclasses.replace(conditioning, captions=captions)


def experts_of(pair, noise_path, teachers=HALVES):
    """Two members on one network: the student's adapter and the teacher's."""
    members = (dataclasses.replace(pair.student, trains=False), pair.teacher)
    return Experts(pair.network, None, noise_path, "epsilon", members=members, teachers=teachers)


def test_each_row_is_answered_by_its_teacher(noise_path):
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    conditioning = with_captions(make_conditioning(BATCH))
    experts = experts_of(pair, noise_path)
    answers = [m.output(batch.noise, batch.timesteps, conditioning) for m in experts.members]
    found = experts.output(batch.noise, batch.timesteps, conditioning)
    expected = torch.stack([answers[0][0], answers[1][1], answers[0][2]])
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(answers[0], answers[1], atol=1e-2)


def test_several_teachers_of_a_prompt_answer_with_their_weighted_mean(noise_path):
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    conditioning = with_captions(make_conditioning(BATCH))
    experts = experts_of(pair, noise_path, (Expert(name="a", weight=1.0), Expert(name="b", weight=3.0)))
    first, second = (m.output(batch.noise, batch.timesteps, conditioning) for m in experts.members)
    found = experts.output(batch.noise, batch.timesteps, conditioning)
    assert torch.allclose(found, 0.25 * first + 0.75 * second, atol=1e-5)


def test_a_rollout_of_rows_that_arrive_at_different_times_is_that_of_each_alone(noise_path):
    """Rows that have arrived are left out, with their captions."""
    pair, batch = make_pair(noise_path), make_batch(noise_path)
    conditioning = with_captions(make_conditioning(BATCH))
    experts = experts_of(pair, noise_path)
    together = experts.rollout(batch.noise, batch.teacher_moves, conditioning)
    for row in range(BATCH):
        moves = noise_path.substeps(
            batch.timesteps[row : row + 1].tolist(), batch.prev_timesteps[row : row + 1].tolist(), 8
        )
        alone = conditioning.rows(torch.tensor([row]))
        member = experts.members[main_expert(HALVES, CAPTIONS[row])]
        assert torch.allclose(
            together[row : row + 1], member.rollout(batch.noise[row : row + 1], moves, alone), atol=1e-5
        )


def test_captions_stay_with_their_rows():
    conditioning = with_captions(make_conditioning(BATCH))
    assert conditioning.rows(torch.tensor([2, 0])).captions == (CAPTIONS[2], CAPTIONS[0])
    assert Conditioning.concat(conditioning, conditioning).captions == CAPTIONS * 2
    assert conditioning.to("cpu", torch.bfloat16).captions == CAPTIONS
    assert conditioning.changed(torch.clone).captions == CAPTIONS
    assert make_conditioning(1).beside(conditioning).captions == CAPTIONS
    assert make_conditioning(BATCH).rows(torch.tensor([1])).captions == ()


def write_expert(folder, seed, *, rank=4, alpha=8):
    folder.mkdir()
    network = random_student(embedded_folder("teacher"), rank=rank, seed=seed)
    write_lora(
        folder, network.adapter_state(STUDENT), {"r": rank, "lora_alpha": alpha, "target_modules": ["to_q"]}
    )
    return folder


def test_a_teacher_of_loras_is_the_base_with_them_loaded_by_diffusers(tmp_path, noise_path):
    """Two LoRAs at their weights, with an alpha other than the rank; the base's weights stay in memory once."""
    paths = [write_expert(tmp_path / name, seed) for seed, name in enumerate(["one", "two"])]
    loras = ", ".join(
        f"{{path: {path}, weight: {weight}}}" for path, weight in zip(paths, (0.7, -0.4), strict=True)
    )
    config = load_config(
        LETTERS, [f"teachers=[{{name: both, loras: [{loras}]}}, {{name: base, prompts: zebra}}]"]
    )
    network = SharedNetwork.with_student_and_teacher(load_network(embedded_folder("teacher")), rank=2, seed=0)
    own = sum(p.numel() for name, p in network.model.named_parameters() if "lora_" not in name)
    experts = with_experts(Denoiser(network, None, noise_path, "epsilon"), config)
    assert sum(p.numel() for name, p in network.model.named_parameters() if "lora_" not in name) == own
    pipeline = StableDiffusionPipeline.from_pretrained(embedded_folder("teacher"), torch_dtype=torch.float32)
    for name, path in zip("ab", paths, strict=True):
        pipeline.load_lora_weights(path, adapter_name=name)
    pipeline.set_adapters(["a", "b"], [0.7, -0.4])
    sample, times = randn(2, 4, 8, 8), torch.tensor([499, 249])
    text = randn(2, network.model.config.sample_size, network.model.config.cross_attention_dim, seed=5)
    conditioning = Conditioning(text, captions=CAPTIONS[:2])
    with torch.no_grad():
        expected = pipeline.unet(sample, times, text).sample
        base = load_network(embedded_folder("teacher"))(sample, times, text).sample
    found = experts.output(sample, times, conditioning)
    assert torch.allclose(found, expected, atol=1e-4)
    assert (expected - base).norm() > 0.01 * base.norm()
    zebra = dataclasses.replace(conditioning, captions=("a zebra", "a zebra"))
    mean = experts.output(sample, times, zebra)
    assert torch.allclose(mean, (expected + base) / 2, atol=1e-4)


def test_a_weighted_sum_of_loras_is_exact():
    first = Lora({"a": random_layer(6, 5, 2, scale=0.5), "b": random_layer(4, 4, 2)}, {})
    second = Lora({"a": random_layer(6, 5, 3, seed=1)}, {})
    both = weighted_sum([first, second], [2.0, -1.0])
    expected = 2 * first.layers["a"].delta() - second.layers["a"].delta()
    assert torch.allclose(both.layers["a"].delta(), expected, atol=1e-5)
    assert torch.allclose(both.layers["b"].delta(), 2 * first.layers["b"].delta(), atol=1e-5)
    assert [both.layers[name].rank for name in "ab"] == [5, 2]


def test_another_weight_pattern_or_file_is_another_teacher(tmp_path):
    one, two = (write_expert(tmp_path / name, seed) for seed, name in enumerate(["one", "two"]))

    def key(teachers):
        return teachers_key(load_config(LETTERS, [f"teachers={teachers}"]))

    first = key(f"[{{name: a, loras: [{{path: {one}}}]}}]")
    assert key(f"[{{name: other, loras: [{{path: {one}}}]}}]") == first
    assert key(f"[{{name: a, loras: [{{path: {two}}}]}}]") != first
    assert key(f"[{{name: a, weight: 2, loras: [{{path: {one}}}]}}]") != first
    assert key(f"[{{name: a, prompts: x, loras: [{{path: {one}}}]}}]") != first
    assert teachers_key(load_config(LETTERS)) is None
    assert read_lora(one).rank == 4


@pytest.mark.parametrize(
    ("teachers", "expected"),
    [
        ("[{name: a, path: x, loras: [{path: y}]}]", "teachers.0: got loras beside path: x"),
        ("[{name: a}, {name: A}]", "teachers.1.name: got 'A' twice"),
        ("[{name: a, weight: 0}]", "teachers.0.weight: got 0"),
        ("[{name: a, prompts: '['}]", "teachers.0.prompts: got '[' (str); allowed: a regular expression"),
    ],
)
def test_teachers_that_make_no_sense_are_refused(teachers, expected):
    with pytest.raises(ConfigError) as error:
        load_config(LETTERS, [f"teachers={teachers}"])
    assert expected in str(error.value)


def test_features_of_several_teachers_are_not_compared():
    phases = "ladder.0.phases=[{objectives: [{kind: mse}, {kind: l2}]}]"
    with pytest.raises(ConfigError, match=r"ladder\.0\.phases\.0\.objectives: got mse\+l2 beside teachers"):
        load_config(LETTERS, ["teachers=[{name: a}]", phases])
    assert Phase(objective="mse").taps == ()
