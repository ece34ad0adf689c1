"""The pairs world, its reader, and the training of its teacher."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from stepdistill.config.data import WORLDS as config_worlds
from stepdistill.demo import letters, pairs, pairs_teacher
from stepdistill.demo.reader import OF_LETTERS, OF_PAIRS, Reader, load_reader, save_reader, shipped_reader
from stepdistill.demo.teacher import Updates, build_scheduler, target_of, train_vae
from stepdistill.demo.train import RECIPES, train_world
from stepdistill.demo.world import WORLDS, world_of_captions
from stepdistill.evaluation.measure.features import build_extractor
from stepdistill.teacher.examine import examine_pipeline
from stepdistill.teacher.folder import EMBEDDED, embedded_folder, missing_parts, unsupported


def test_captions_read_back():
    every = pairs.all_pairs()
    assert len(every) == len(set(every)) == 135_200
    assert pairs.Pair(0, 0, 10, 2, 0, 3).caption == "a red letter a left of a blue letter k on gray"
    assert [pairs.parse_caption(pair.caption) for pair in every[::53]] == every[::53]
    for wrong in ("a red letter a on white", "a red letter a below a blue letter k on gray", ""):
        with pytest.raises(ValueError, match="not a caption of the pairs world"):
            pairs.parse_caption(wrong)


def test_an_image_depends_only_on_seed_and_index():
    pair = pairs.Pair(0, 0, 10, 2, 0, 3)
    first, again, other = (
        np.asarray(pairs.render_at(pair, seed=s, index=i)) for s, i in ((1, 7), (1, 7), (1, 8))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("place", range(len(pairs.PLACES)))
def test_each_letter_has_its_ink_at_its_place_on_the_paper(place):
    middle = pairs.IMAGE_SIZE // 2
    for index, paper in enumerate(letters.PAPERS.values()):
        pair = pairs.Pair(1 + index, 0, 14, 2, place, index)  # red, then blue
        pixels = np.asarray(pairs.render_at(pair, seed=4, index=index)).astype(int)
        assert (np.abs(pixels - np.array(paper)).sum(2) < 6).mean() > 0.5
        halves = (
            (pixels[:, :middle], pixels[:, middle:]) if place == 0 else (pixels[:middle], pixels[middle:])
        )
        for half, ink, other in zip(halves, ("red", "blue"), ("blue", "red"), strict=True):
            near = [np.abs(half - np.array(letters.INKS[name])).sum(2) < 90 for name in (ink, other)]
            assert near[0].sum() > 10
            assert near[1].sum() <= 0.1 * near[0].sum()


@pytest.mark.parametrize("place", range(len(pairs.PLACES)))
def test_wide_letters_neither_touch_the_border_nor_each_other(place):
    wide = ("M", "W", "Q", "O")
    middle = pairs.IMAGE_SIZE // 2
    for index in range(60):
        one, other = (letters.LETTERS.index(wide[(index + k) % 4]) for k in (0, 1))
        drawn = pairs.render_at(pairs.Pair(one, 3, other, 3, place, 0), seed=2, index=index)  # black on white
        darkness = 255 - np.asarray(drawn).astype(int).min(axis=2)
        across = darkness if place == 0 else darkness.T  # letters side by side
        assert max(across[0].max(), across[-1].max(), across[:, 0].max(), across[:, -1].max()) < 40
        assert across[:, middle - 1 : middle + 1].min(axis=1).max() < 128, (
            "no dark line from one to the other"
        )


def test_the_tokenizer_makes_a_token_of_each_word():
    tokenizer = pairs_teacher.build_tokenizer()
    for pair in pairs.all_pairs()[::991]:
        assert (
            len(tokenizer(pair.caption).input_ids)
            == len(pair.caption.split()) + 2
            <= pairs_teacher.MAX_TOKENS
        )


def test_a_reader_of_pairs_answers_six_questions_and_keeps_its_weights(tmp_path):
    torch.manual_seed(0)
    reader = Reader(OF_PAIRS).eval()
    images = pairs_teacher.rendered_batch(3, seed=1)[0]
    assert reader.features(images).shape == (3, 96)
    assert [logits.shape[1] for logits in reader.logits(images)] == list(pairs.CHOICES)
    (read, *_) = reader.read(images)
    assert isinstance(read, pairs.Pair)
    save_reader(reader.half().float(), tmp_path / "reader.safetensors")
    loaded = load_reader(tmp_path / "reader.safetensors", OF_PAIRS)
    assert torch.equal(loaded.features(images), reader.features(images))
    with pytest.raises(
        ValueError, match="not hold the weights of a reader of images of 32 pixels with 3 answers"
    ):
        load_reader(tmp_path / "reader.safetensors", OF_LETTERS)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_is_that_of_diffusers(prediction_type):
    torch.manual_seed(0)
    original, noise = torch.randn(2, 5, 4, 3, 3)
    timesteps = torch.tensor([0, 100, 499, 750, 999])
    scheduler = build_scheduler(prediction_type)
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(original, noise, timesteps)
    alpha_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    assert torch.allclose(target_of(prediction_type, original, noise, alpha_bar), expected, atol=1e-6)


@pytest.mark.slow
def test_the_teacher_is_trained_with_the_text_that_the_pipeline_gives_it(tmp_path):
    """An empty prompt is zeros; a prompt is the hidden states and the pooled embedding of diffusers' own encoding."""
    images, labels = pairs_teacher.rendered_batch(70, seed=0)
    captions = [pairs.Pair(*row).caption for row in labels.tolist()]
    vae = train_vae(images, steps=2, seed=0)
    pipeline = pairs_teacher.train_pipeline(vae, images, captions, updates=Updates(2, seed=0))
    pipeline.set_progress_bar_config(disable=True)
    encode = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = pipeline.tokenizer([captions[0], ""], **encode).input_ids
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    predict = pairs_teacher.denoiser(*parts, empty=ids[1])
    noisy, timesteps = torch.randn(2, 4, 12, 12), torch.tensor([500, 500])
    with torch.no_grad():
        found = predict(noisy, timesteps, ids)
        text, none, pooled, no_pooled = pipeline.encode_prompt(captions[0], do_classifier_free_guidance=True)
        added = {
            "text_embeds": torch.cat([pooled, no_pooled]),
            "time_ids": torch.tensor([pairs_teacher.TIME_IDS, pairs_teacher.TIME_IDS]),
        }
        expected = pipeline.unet(noisy, timesteps, torch.cat([text, none]), added_cond_kwargs=added).sample
    assert torch.allclose(found, expected, atol=1e-5)
    size = {"height": pairs.IMAGE_SIZE, "width": pairs.IMAGE_SIZE}
    drawn = pipeline(captions[:2], num_inference_steps=2, guidance_scale=3.0, **size).images
    assert [image.size for image in drawn] == [(48, 48)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_teacher_is_trained_to_a_folder_that_diffusers_loads(tmp_path, name):
    few = dataclasses.replace(RECIPES[name], images=70, reader_steps=2, vae_steps=2, unet_steps=2)
    train_world(name, few, tmp_path)
    assert missing_parts(tmp_path / "teacher") == []
    assert [*unsupported(tmp_path / "teacher"), *examine_pipeline(tmp_path / "teacher")] == []
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    network = pipeline.components.get("unet") or pipeline.transformer
    assert network.config.sample_size == {"letters": 8, "letters_sd3": 8, "pairs": 12}[name]
    assert "70" in (tmp_path / "teacher" / "README.md").read_text()
    questions = {"letters": OF_LETTERS, "pairs": OF_PAIRS}.get(name)
    if questions is not None:
        load_reader(tmp_path / "reader" / "model.fp16.safetensors", questions)


def test_the_worlds_are_those_that_a_config_can_name():
    assert tuple(WORLDS) == config_worlds
    assert set(WORLDS) < set(EMBEDDED)


def test_a_world_knows_its_own_captions_only():
    world = WORLDS["pairs"]
    captions = world.sample(5, seed=0, among=world.captions()[::1000])
    assert world_of_captions(captions) is world
    assert world_of_captions([*captions, "a red letter a on white"]) is None
    assert world_of_captions(["a red letter a on white"]) is WORLDS["letters"]
    assert world.image(captions[0], seed=1, index=0).size == (48, 48)


def test_the_shipped_reader_reads_new_renderings_and_finds_what_is_wrong():
    images, labels = pairs_teacher.rendered_batch(200, seed=9)
    captions = [pairs.Pair(*row).caption for row in labels.tolist()]
    world = WORLDS["pairs"]
    assert world.accuracy([images], captions) >= 0.98
    assert world.accuracy([images], [*captions[1:], captions[0]]) <= 0.01
    assert world.readings([images[:3]]) == captions[:3]
    assert shipped_reader("pairs_reader").questions is OF_PAIRS


def test_features_of_pairs_are_of_images_of_48_pixels():
    extractor = build_extractor("pairs_reader")
    assert (extractor.name, extractor.input_size, extractor.num_features) == ("pairs_reader", 48, 96)
    assert extractor(torch.zeros(2, 3, 48, 48)).shape == (2, 96)
    with pytest.raises(ValueError, match="pairs_reader takes 48 x 48 images, got 32 x 32"):
        extractor(torch.zeros(2, 3, 32, 32))


def test_the_shipped_teacher_is_complete_and_small():
    folder = embedded_folder(EMBEDDED["pairs"])
    assert missing_parts(folder) == []
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 10 * 2**20
