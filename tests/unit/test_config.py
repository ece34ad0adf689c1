"""Configs: mistakes are named, overrides apply, saved configs read back; the plan counts their forwards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stepdistill.config import ConfigError
from stepdistill.config.ladder_checks import often_used_targets, unused_settings
from stepdistill.config.load import load_config, parse_config
from stepdistill.config.saved import read_run_config, resolved
from stepdistill.config.shipped import shipped_configs
from stepdistill.plan import describe, evaluation_forwards, phase_forwards
from stepdistill.stages import check_run, open_run

CONFIG = "configs/letters.yaml"


def several(objectives):
    """An override that gives the demo's second rung one phase with these objectives."""
    return f"ladder.1.phases=[{{objectives: {objectives}}}]"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "ladder.1.student_steps=12",
            [
                "ladder.1.student_steps",
                "got 12, which is no proper divisor of 32 teacher",
                "allowed: 1, 2, 4, 8, 16",
                "nearest: 8",
            ],
        ),
        (
            "max_train_step=4",
            [
                "max_train_step",
                "nearest: ladder.N.phases.N.max_train_steps or shrink.max_train_steps; allowed: data",
            ],
        ),
        (
            "learning_rate=1",
            ["nearest: ladder.N.phases.N.learning_rate or ladder.N.phases.N.discriminator.learning_rate"],
        ),
        (
            "ladder.0.phases.0.taps=[middle]",
            [
                "phases.0.taps: got ['middle'], a key of one objective; allowed: objectives=[{kind: NAME, taps:"
            ],
        ),
        ("ladder=[]", ["ladder: got []", "allowed: a list with at least one entry"]),
        ("training=5", ["training: got 5 (int)", "allowed: a section: a mapping of keys to values"]),
        ("name=-x", ["name: got '-x'", "allowed: letters, digits and . _ -, of which the first"]),
        ("trainig.x=3", ["trainig", "nearest: training", "allowed: data"]),
        ("training.train_batchsize=4", ["training.train_batchsize", "got", "nearest: train_batch_size"]),
        ("ladder.0.phases.0.learning_rat=4", ["ladder.0.phases.0.learning_rat", "nearest: learning_rate"]),
        (
            "teacher.loras=[{path: x, wieght: 1}]",
            ["teacher.loras.0.wieght", "nearest: weight; allowed: path, weight"],
        ),
        (
            "evaluation.loras=[{name: x, path: x, steps: 4, guidance_scal: 1}]",
            ["evaluation.loras.0.guidance_scal", "nearest: guidance_scale", "timesteps"],
        ),
        (
            "ladder.1.phases.1.discriminator.trunc=full",
            ["phases.1.discriminator.trunc", "nearest: trunk", "allowed: head_width, heads"],
        ),
        ("export.format=[onnx]", ["export.format", "nearest: formats", "allowed: base_model"]),
        ("training.train_batch_size=1.5", ["training.train_batch_size", "1.5", "allowed: a whole number"]),
        ("lora.rank=9999", ["lora.rank", "9999", "or less"]),
        ("evaluation.teacher_steps=8", ["evaluation.teacher_steps", "allowed: a list, such as [a, b]"]),
        (
            "shrink.remove=[lvl.1]",
            ["shrink.remove.0", "'lvl.1'", "allowed: middle, middle.end, or level.L with"],
        ),
        (
            "ladder.1.phases.0={objectives: [{kind: l2, taps: [0down]}]}",
            ["ladder.1.phases.0.objectives.0.taps.0", "'0down'", "of which the first is no digit"],
        ),
        ("training.train_batch_size=abc", ["training.train_batch_size", "'abc'", "allowed: a whole number"]),
        ("training.train_batch_size=0", ["training.train_batch_size", "got 0", "allowed: above 0"]),
        ("teacher.guidance_scale=0.5", ["teacher.guidance_scale", "got 0.5", "allowed: 1 or more"]),
        ("preview.prompts=[]", ["preview.prompts", "got []", "at least one entry"]),
        ("ladder.2.teacher_steps=16", ["ladder.2.teacher_steps", "got 16", "allowed: 8"]),
        ("ladder.9.student_steps=1", ["'9'", "allowed: 0 to 4"]),
        ("ladder.3.phases.0.teacher_steps=5", ["ladder.3.phases.0.teacher_steps", "got 5", "32, 8, 4"]),
        ("ladder.3.node_steps=3", ["ladder.3.node_steps", "multiples of student_steps 2"]),
        (
            "ladder.0.phases=[{objective: convert}]",
            ["ladder.0.phases.0.objective", "prediction_type: sample"],
        ),
        (
            "ladder.4={teacher_steps: 2, student_steps: 1, prediction_type: sample, "
            "phases: [{objective: mse}, {objective: convert}]}",
            ["ladder.4.phases.1.objective", 'got "convert" after "mse"', "allowed: as the first phase"],
        ),
        ("ladder.2.start_timestep=499", ["ladder.2.start_timestep", "got 499", "1 student step"]),
        ("ladder.4.node_steps=4", ["ladder.4.start_timestep", "got 499", "without node_steps"]),
        ("ladder.4.start_timestep=1000", ["ladder.4.start_timestep", "got 1000", "allowed: below 1000"]),
        ("ladder.0.phases.0.objective=gan", ["ladder.0.phases.0.objective", "'gan'", "mse, convert"]),
        (
            "ladder.0.phases.0.objective=null",
            ["ladder.0.phases.0.objective", "got nothing", "allowed: mse, convert"],
        ),
        (
            "ladder.0.phases.0.objectives=[{kind: single}]",
            ["ladder.0.phases.0.objectives", "beside objective: mse"],
        ),
        (several("[{kind: mse}, {kind: mse}]"), ["ladder.1.phases.0.objectives", "got mse twice"]),
        (several("[{kind: paired}, {kind: single}]"), ["ladder.1.phases.0.objectives", "one discriminator"]),
        (
            several("[{kind: convert}, {kind: mse}]"),
            ["ladder.1.phases.0.objectives", "allowed: convert alone"],
        ),
        (
            several("[{kind: mse, weight: 0}]"),
            ["ladder.1.phases.0.objectives.0.weight", "a final_weight above 0"],
        ),
        (
            several("[{kind: mse, weight: -1}]"),
            ["ladder.1.phases.0.objectives.0.weight", "allowed: 0 or more"],
        ),
        ("ladder.0.phases.0.teacher=ema", ["ladder.0.phases.0.teacher", "got ema on the first rung"]),
        (
            "ladder.1.phases.0={objective: mse, teacher: ema, cached_updates: 2}",
            ["ladder.1.phases.0.teacher", "which needs a teacher that stays as it is"],
        ),
        ("ladder.0.phases.0.balance=gradient", ["ladder.0.phases.0.balance", "mse is alone"]),
        (
            several("[{kind: mse}, {kind: single}], cached_updates: 2"),
            ["cached_updates", "this is mse+single"],
        ),
        (
            "ladder.0.phases.0.discriminator.start=carried",
            ["ladder.0.phases.0.discriminator.start", "got carried", "paired or single phase", "this is mse"],
        ),
        (
            "ladder.1.phases.1.discriminator.start=carried",
            [
                "ladder.1.phases.1.discriminator.start",
                "allowed: fresh",
                "first adversarial phase of its rung",
            ],
        ),
        ("name=../x", ["name", "'../x'"]),
        ("no_equals_sign", ["key=value"]),
    ],
)
def test_mistakes_name_key_value_and_what_is_allowed(override, parts):
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def adversarial_rung(*phases):
    """The rung 32 -> 8 with these phases, each given as (objective, discriminator options)."""
    entries = [{"objective": o, "max_train_steps": 2, "discriminator": options} for o, options in phases]
    return load_config(CONFIG, [f"ladder.1.phases={json.dumps(entries)}"]).ladder[1]


def test_a_carried_discriminator_must_fit_its_phase():
    carried = {"start": "carried", "trunk": "full"}
    rung = adversarial_rung(("paired", {"trunk": "full"}), ("mse", {}), ("single", carried))
    assert [p.discriminator.start for p in rung.phases] == ["fresh", "fresh", "carried"]
    with pytest.raises(
        ConfigError, match=r"phases\.1\.discriminator\.start: .*before, which has lora; this has full"
    ):
        adversarial_rung(("paired", {}), ("single", carried))
    frozen = {"trunk": "frozen"}
    adversarial_rung(("single", frozen), ("single", frozen | {"start": "carried"}))
    with pytest.raises(ConfigError, match=r"frozen trunk learns nothing.*\(paired, mid\).*\(single, mid\)"):
        adversarial_rung(("paired", frozen), ("single", frozen | {"start": "carried"}))


def test_settings_that_no_objective_of_a_phase_reads_are_named():
    phases = [
        {"objective": "mse", "discriminator": {"heads": "multi", "perturbation_weights": [5, 1, 1, 1]}},
        {"objective": "single", "loss_space": "sample", "discriminator": {"heads": "multi"}},
        {"objectives": [{"kind": "mse"}, {"kind": "single"}], "loss_space": "sample"},
    ]
    config = load_config("letters", [f"ladder.3.phases={json.dumps(phases)}"])
    assert [about.split(" changes ")[0] for about, _ in unused_settings(config.ladder)] == [
        "ladder.3.phases.0.discriminator.heads",
        "ladder.3.phases.0.discriminator.perturbation_weights",
        "ladder.3.phases.1.loss_space",
    ]


def test_targets_that_are_used_many_times_are_named():
    assert list(often_used_targets(load_config("letters", []).ladder)) == []
    ((about, remedy),) = often_used_targets(
        load_config("letters", ["ladder.1.phases.0.max_train_steps=501"]).ladder
    )
    assert about.startswith("ladder.1.phases.0.cached_updates: 501 updates use each target 8.35 times")
    assert remedy == "ladder.1.phases.0.cached_updates=251"


@pytest.mark.parametrize("name", shipped_configs())
def test_each_setting_of_a_shipped_ladder_is_read(name):
    assert list(unused_settings(load_config(name, []).ladder)) == []


def test_a_shipped_config_goes_by_its_name_from_any_folder(tmp_path, monkeypatch):
    by_file = {path.stem: load_config(path) for path in Path("configs").glob("*.yaml")}
    monkeypatch.chdir(tmp_path)
    assert {name: load_config(name) for name in shipped_configs()} == by_file
    (tmp_path / "small").mkdir()  # a folder that is not a run
    assert load_config("small") == by_file["small"]


def test_an_installed_package_has_the_shipped_configs(tmp_path):
    """The build that `pip install .` runs, without its network."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    subprocess.run(command, check=True, capture_output=True)
    built = sorted((tmp_path / "build").glob("lib*/stepdistill/configs/*.yaml"))
    assert [(path.name, path.read_text()) for path in built] == [
        (path.name, path.read_text()) for path in sorted(Path("configs").glob("*.yaml"))
    ]


def test_a_missing_key_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ConfigError, match="ladder: got nothing"):
        parse_config({"name": "x", "preview": {"prompts": ["a"]}})
    with pytest.raises(ConfigError, match="did you mean letters, which ships"):
        load_config("letter.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="mapping"):
        load_config(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(broken)


def test_the_home_folder_is_expanded_where_files_are_written_and_read(monkeypatch):
    """A folder with the name ~ would be removed together with the home folder by whoever removes it in a shell."""
    monkeypatch.setenv("HOME", "/home/somebody")
    words = ["output_dir=~/runs", "evaluation.prompts=~/prompts.txt", "evaluation.features=clip:~/clip"]
    config = load_config("configs/letters.yaml", words)
    assert str(config.run_dir) == "/home/somebody/runs/letters"
    assert config.evaluation.prompts == "/home/somebody/prompts.txt"
    assert config.evaluation.features == "clip:/home/somebody/clip"


def test_an_override_of_a_text_field_is_text():
    """A commit such as 7112e88 is also a number in scientific notation."""
    config = load_config(CONFIG, ["teacher.revision=7112e88", "name=1e5"])
    assert (config.teacher.revision, config.name) == ("7112e88", "1e5")


def test_overrides_reach_lists_and_numbers_like_1e_3():
    config = load_config(CONFIG, ["ladder.0.phases.0.learning_rate=1e-3", "seed=7", "ladder.3.node_steps=4"])
    assert config.ladder[0].phases[0].learning_rate == 1e-3
    assert config.seed == 7
    assert config.ladder[3].node_steps == 4


def test_the_resolved_config_reads_back_as_itself(tmp_path):
    config = load_config(CONFIG, [f"output_dir={tmp_path}"])
    assert parse_config(yaml.safe_load(yaml.safe_dump(resolved(config)))) == config


def test_the_folder_of_another_run_is_refused_and_left_unchanged(tmp_path):
    first = load_config(CONFIG, [f"output_dir={tmp_path}"])
    open_run(first)
    (first.run_dir / "cache").mkdir()
    before = (first.run_dir / "config.yaml").read_bytes()
    for free in ("evaluation.num_images=64", "data.max_bad_fraction=0.5", "data.on_bad.image_animated=error"):
        check_run(load_config(CONFIG, [f"output_dir={tmp_path}", free]))
    with pytest.raises(ConfigError, match=r"lora\.rank: got 8.*started with lora\.rank=32; .*another name"):
        check_run(load_config(CONFIG, [f"output_dir={tmp_path}", "lora.rank=8"]))
    assert (first.run_dir / "config.yaml").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="no run's"):
        check_run(load_config(CONFIG, [f"output_dir={tmp_path}", "name=mine"]))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_run_that_ended_before_it_made_anything_may_be_started_with_other_settings(tmp_path):
    first = load_config(CONFIG, [f"output_dir={tmp_path}"])
    open_run(first)
    for name in ("teacher_parts.json", "environment.json"):
        (first.run_dir / name).write_text("{}")
    open_run(load_config(CONFIG, [f"output_dir={tmp_path}", "lora.rank=8"]))
    assert (first.run_dir / "teacher_parts.json").exists()
    other = load_config(CONFIG, [f"output_dir={tmp_path}", "teacher.path=pairs", "data.source=pairs"])
    open_run(other)
    assert read_run_config(first.run_dir) == other
    assert not (first.run_dir / "teacher_parts.json").exists(), "the hashes are those of another teacher"


def test_a_run_of_a_version_without_some_keys_resumes(tmp_path):
    config = load_config(CONFIG, [f"output_dir={tmp_path}"])
    open_run(config)
    saved = yaml.safe_load((config.run_dir / "config.yaml").read_text())
    del saved["data"]["held_out"], saved["training"]["ema_decay"]
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(saved))
    (config.run_dir / "cache").mkdir()
    check_run(config)
    with pytest.raises(ConfigError, match=r"held_out: got 0\.1"):
        check_run(load_config(CONFIG, [f"output_dir={tmp_path}", "data.held_out=0.1"]))


def test_the_config_of_a_moved_run_folder_can_be_read(tmp_path):
    config = load_config(CONFIG, [f"output_dir={tmp_path / 'a'}"])
    open_run(config)
    (tmp_path / "a" / "letters").rename(tmp_path / "moved")
    moved = read_run_config(tmp_path / "moved")
    assert moved.run_dir == tmp_path / "moved"
    assert moved.ladder == config.ladder
    with pytest.raises(ConfigError, match="not the folder of a run"):
        read_run_config(tmp_path)


@pytest.mark.parametrize(
    "missing", ["model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors"]
)
def test_an_incomplete_teacher_is_refused_with_the_missing_part(tmp_path, missing):
    import shutil

    from stepdistill.teacher.folder import embedded_folder, missing_parts

    folder = tmp_path / "teacher"
    shutil.copytree(embedded_folder("teacher"), folder)
    assert missing_parts(folder) == []
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=r"teacher\.path") as caught:
        check_run(load_config(CONFIG, [f"teacher.path={folder}", f"output_dir={tmp_path}"]))
    assert missing in str(caught.value)


def test_the_plan_counts_the_recipes_forwards():
    """10.35 forwards for 128 -> 32 from the base model, then 4 and 2 teacher forwards with a LoRA; the table by its NFE."""
    config = load_config(CONFIG, ["ladder.0.teacher_steps=128", "ladder.0.phases.0.cached_updates=null"])
    first = config.ladder[0]
    assert phase_forwards(config, first, first.phases[0]) == pytest.approx(10.35, abs=0.01)
    paired = first.phases[0].model_copy(update={"objective": "paired"})
    single = first.phases[0].model_copy(update={"objective": "single"})
    assert phase_forwards(config, config.ladder[1], paired) == pytest.approx(11.93, abs=0.01)
    assert phase_forwards(config, config.ladder[1], single) == pytest.approx(10.23, abs=0.01)
    assert phase_forwards(config, config.ladder[2], paired) == pytest.approx(9.77, abs=0.01)
    on_data = single.model_copy(
        update={"discriminator": single.discriminator.model_copy(update={"real": "data"})}
    )
    assert phase_forwards(config, config.ladder[1], on_data) == pytest.approx(5.9, abs=0.01)
    per_image = 2 * (32 + 8 + 4 + 2 + 1) + 32 + 8 + 4 + 2 + 1
    plain = [
        f"evaluation.{key}"
        for key in ("floor=false", "diversity_prompts=0", "lora_scales=[]", "matrix=false")
    ]
    plain.append("evaluation.cost_batch_sizes=[]")
    assert evaluation_forwards(load_config(CONFIG, plain)) == config.evaluation.num_images * per_image
    seeds, sweep, matrix, cost = 32 * (64 + 47), 4 * (3 * 47 + 64), 4 * 5 * 47, 2 * per_image
    expected = config.evaluation.num_images * (per_image + 64) + seeds + sweep + matrix + cost
    assert evaluation_forwards(config) == expected
    assert "32 -> 8" in describe(config)


def test_a_first_rung_of_equal_steps_learns_guidance_with_two_teacher_forwards():
    config = load_config(CONFIG, ["ladder.0.phases.0.cached_updates=null"])
    first = config.ladder[0]
    assert phase_forwards(config, first, first.phases[0]) == pytest.approx(2 + 2.351, abs=0.01)
    with pytest.raises(ConfigError, match=r"ladder\.1\.student_steps: got 32"):
        load_config(CONFIG, ["ladder.1.student_steps=32"])


def test_a_single_objective_can_be_written_in_short_form():
    short, listed = (
        load_config(CONFIG, [f"ladder.1.phases=[{{{form}, max_train_steps: 5}}]"]).ladder[1].phases[0]
        for form in ("objective: single", "objectives: [{kind: single}]")
    )
    assert short.weighted == listed.weighted
    assert (short.title, short.adversary) == (listed.title, listed.adversary) == ("single", "single")
    both = (
        load_config(CONFIG, [several("[{kind: mse, weight: 2}, {kind: paired, weight: 0.1}]")])
        .ladder[1]
        .phases[0]
    )
    assert (both.title, both.adversary) == ("mse+paired", "paired")
    assert [objective.weight for objective in both.weighted] == [2.0, 0.1]
