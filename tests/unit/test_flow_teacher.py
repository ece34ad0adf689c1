"""The training of the letters' teacher of SD3's classes."""

import pytest
import torch

from pipelines import train_teacher
from stepdistill.demo import flow_teacher, teacher
from stepdistill.diffusion.rectified_flow import RectifiedFlow
from stepdistill.models.network.sd3 import SD3Kind
from stepdistill.teacher.examine import examine_pipeline
from stepdistill.teacher.folder import EMBEDDED, embedded_folder, missing_parts, unsupported
from tests.conftest import randn

CAPTIONS = ["a red letter a on white", "a green letter q on yellow"]


def test_the_target_is_the_velocity_at_times_with_normal_logits():
    original, noise = randn(4000, 1, 2, 2), randn(4000, 1, 2, 2, seed=1)
    noisy, times, target = flow_teacher.noised_by_flow(original, noise, torch.Generator().manual_seed(0))
    sigma = (times / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(noisy, (1 - sigma) * original + sigma * noise, atol=1e-5)
    assert torch.equal(target, noise - original)
    logits = (times / 1000).logit()
    assert (logits.mean().item(), logits.std().item()) == (
        pytest.approx(0, abs=0.05),
        pytest.approx(1, abs=0.05),
    )


def test_the_tokenizer_makes_a_token_of_each_word_and_reads_any_text():
    tokenizer = flow_teacher.build_sentence_pieces()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a red letter k on white").input_ids)
    assert tokens == ["▁a", "▁red", "▁letter", "▁k", "▁on", "▁white", "</s>"]
    assert tokenizer.unk_token_id not in tokenizer("Something else, 12!").input_ids


def test_the_shipped_teacher_is_complete_and_small():
    folder = embedded_folder(EMBEDDED["letters_sd3"])
    assert missing_parts(folder) == []
    assert [*unsupported(folder), *examine_pipeline(folder)] == []
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6 * 2**20


def test_the_stage_script_takes_its_numbers_and_names_what_does_not_fit(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(train_teacher, "train_world", lambda *given: asked.append(given))
    assert train_teacher.main([str(tmp_path), "--family", "sd3", "--unet-steps", "7", "--seed", "3"]) == 0
    (name, training, output) = asked[0]
    assert (name, training.unet_steps, training.seed, output) == ("letters_sd3", 7, 3, tmp_path)
    with pytest.raises(SystemExit):
        train_teacher.main([str(tmp_path), "--family", "sd3", "--world", "pairs"])
    assert "--family: got sd3 with --world pairs; allowed: only with letters" in capsys.readouterr().err


def test_the_teacher_is_trained_with_the_text_that_the_pipeline_gives_it():
    vae = teacher.build_vae()
    vae.register_to_config(scaling_factor=0.5)
    images, _ = teacher.rendered_batch(70, seed=0)
    pipeline = flow_teacher.train_pipeline(vae, images, CAPTIONS * 35, updates=teacher.Updates(2, seed=0))
    pipeline.set_progress_bar_config(disable=True)
    options = {"padding": "max_length", "truncation": True, "max_length": 10, "return_tensors": "pt"}
    texts = [*CAPTIONS, ""]
    ids = [t(texts, **options).input_ids for t in (pipeline.tokenizer, pipeline.tokenizer_3)]
    encoders = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3
    predict = flow_teacher.denoiser(pipeline.transformer, *encoders)
    noisy, times = randn(3, 4, 8, 8), RectifiedFlow().network_times(torch.tensor([999, 500, 3]))
    with torch.no_grad():
        found = predict(noisy, times, torch.cat(ids, dim=1))
        conditioning = SD3Kind().encode(pipeline, texts, image_size=(32, 32))
        expected = SD3Kind().ask(pipeline.transformer, noisy, times, conditioning)
    assert conditioning.encoder_hidden_states.shape == (3, 20, 128)
    assert torch.allclose(found, expected, atol=1e-5)
    drawn = pipeline(CAPTIONS, num_inference_steps=2, guidance_scale=3.0, max_sequence_length=10).images
    assert [image.size for image in drawn] == [(32, 32)] * 2
