"""A trained preference model as a reward: found by its folder, an ensemble less its uncertainty, its declarations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from reward_models.preference import Preference
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.rewards.load import find_reward, load_reward, options_of
from rlhf_mel.rewards.options import check_options
from rlhf_mel.speech.audio import MelSpec, log_mel, resample
from rlhf_mel.speech.preference_model import PreferenceModel, save_preference_model
from rlhf_mel.speech.whisper_features import WhisperFeatures
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.types import Audio, Prompts

pytestmark = pytest.mark.rounding

SIZES = PreferenceModel.Config(num_members=3, dim=16, num_layers=1)


def clips(*lengths: int, rate_hz: int = 24_000) -> Audio:
    """Noise of those numbers of samples, with its mels."""
    generator = torch.Generator().manual_seed(0)
    waveforms = [0.1 * torch.randn(length, generator=generator) for length in lengths]
    mels = [log_mel(waveform[None])[0] for waveform in waveforms]
    pad = torch.nn.utils.rnn.pad_sequence
    frames = torch.tensor([len(mel) for mel in mels])
    return Audio(pad(waveforms, batch_first=True), torch.tensor(lengths), rate_hz, pad(mels, batch_first=True), frames)


def asking(count: int) -> Prompts:
    return Prompts(["hello"] * count, torch.zeros(count, 1), torch.ones(count, dtype=torch.long), [""] * count)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_preference_model(PreferenceModel(SIZES, seed=5), tmp_path / "mine")
    return tmp_path / "mine"


def test_a_folder_is_a_reward_by_its_path(folder: Path) -> None:
    rewards = Rewards([str(folder), "mos"], options={str(folder): {"uncertainty_penalty": 0.5}})
    assert rewards.names == ["preference", "mos"] and rewards.differentiable
    reward: Any = rewards.models[0]
    assert reward.config == Preference.Config(folder=str(folder), uncertainty_penalty=0.5)
    config = RLHFConfig(output_dir="unused", reward_models=[str(folder)])
    assert isinstance(load_reward(config.reward_models[0]), Preference)
    with pytest.raises(ValueError, match=r"expected options beside its folder, got 'folder' too; remove it"):
        load_reward(str(folder), {"folder": "elsewhere"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"expected a folder with config\.json, as recipes/reward_model\.py writes it"),
        ({"model_type": "bert"}, r"to say \"reward_model\": one of .*'preference', .*\], got None"),
        ({"reward_model": "os:system"}, r"one of .*, got 'os:system'"),
    ],
)
def test_other_folders_are_refused_before_a_model_is_loaded(content: Any, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        RLHFConfig(output_dir="unused", reward_models=[str(tmp_path)])
    with pytest.raises(
        ValueError, match=r"unknown reward '.*absent': expected one of .* or the folder of a trained one"
    ):
        RLHFConfig(output_dir="unused", reward_models=[str(tmp_path / "absent")])


def test_a_name_of_reward_models_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_reward("mos").__name__ == "Mos" and options_of("mos", {}) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"expected a value of \['folder'\], got none"),
        ({"folder": "no/such"}, "expected a folder with config.json, got 'no/such'; train one"),
        ({"uncertainty_penalty": -1}, "expected a number of at least 0, got -1"),
        ({"uncertainty_penalty": True}, "expected a number of at least 0, got True"),
        ({"hears": "sound"}, "expected 'mel' or 'waveform', got 'sound'"),
        ({"name": " "}, "expected a name, got ' '"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, folder: Path) -> None:
    given = {"folder": str(folder), **options} if options else {}
    with pytest.raises(ValueError, match=message):
        check_options(Preference, given, name="preference")


def test_an_ensemble_scores_its_mean_less_its_uncertainty(folder: Path) -> None:
    audio = clips(6000, 9000)
    with torch.no_grad():
        members = load_reward(str(folder)).scores(audio)  # type: ignore[attr-defined]
        mean = load_reward(str(folder)).score(audio, asking(2))
        careful = load_reward(str(folder), {"uncertainty_penalty": 2}).score(audio, asking(2))
    for row in range(2):
        values = members[row].tolist()
        centre = sum(values) / 3
        deviation = math.sqrt(sum((value - centre) ** 2 for value in values) / 2)  # of three members
        assert mean[row].item() == pytest.approx(centre, abs=1e-6)
        assert careful[row].item() == pytest.approx(centre - 2 * deviation, abs=1e-5)
        assert deviation > 1e-3


def test_one_member_has_no_uncertainty(tmp_path: Path) -> None:
    save_preference_model(PreferenceModel(replace(SIZES, num_members=1)), tmp_path)
    with pytest.raises(ValueError, match="expected an ensemble, got one member"):
        load_reward(str(tmp_path), {"uncertainty_penalty": 1.0})


def test_members_that_agree_have_a_finite_gradient(folder: Path, tmp_path: Path) -> None:
    network = PreferenceModel(SIZES, seed=5)
    for member in network.members[1:]:
        member.load_state_dict(network.members[0].state_dict())
    save_preference_model(network, tmp_path / "agreed")
    audio = clips(6000)
    leaf = audio.mel.clone().requires_grad_()
    reward = load_reward(str(tmp_path / "agreed"), {"uncertainty_penalty": 1.0})
    (gradient,) = torch.autograd.grad(reward.score(replace(audio, mel=leaf), asking(1)).sum(), leaf)
    assert gradient.isfinite().all() and gradient.any()


def gradient_of(rewards: Rewards, audio: Audio, of: str) -> Tensor:
    leaf = getattr(audio, of).clone().requires_grad_()
    total = rewards(replace(audio, **{of: leaf}), asking(len(leaf))).total
    if not total.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(total.sum(), leaf)
    return gradient


def test_the_gradient_arrives_where_the_domain_says(folder: Path) -> None:
    audio = clips(6000, 4000)
    on_mel = Rewards([str(folder)])
    assert gradient_of(on_mel, audio, "mel").any() and not gradient_of(on_mel, audio, "waveform").any()
    on_sound = Rewards([str(folder)], options={str(folder): {"hears": "waveform"}})
    assert on_sound.models[0].domain == "waveform" and on_sound.models[0].sample_rate_hz == 24_000
    gradient = gradient_of(on_sound, audio, "waveform")
    assert gradient[1, :4000].any() and not gradient[1, 4000:].any() and not gradient_of(on_sound, audio, "mel").any()


def test_the_mel_of_the_sound_scores_as_the_mel_it_was_made_from(folder: Path) -> None:
    audio = clips(6000, 4000)
    on_mel, on_sound = Rewards([str(folder)]), Rewards([str(folder)], options={str(folder): {"hears": "waveform"}})
    torch.testing.assert_close(on_sound(audio, asking(2)).total, on_mel(audio, asking(2)).total, atol=1e-5, rtol=1e-5)


def test_a_model_on_whisper_hears_16_khz(tmp_path: Path) -> None:
    sizes: Any = dict(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32)
    encoder = WhisperFeatures(WhisperEncoder(WhisperConfig(**sizes, max_source_positions=50)))
    network = PreferenceModel(replace(SIZES, body="whisper"), encoder=encoder)
    save_preference_model(network, tmp_path)
    rewards, audio = Rewards([str(tmp_path)]), clips(12_000, 8000)
    reward = rewards.models[0]
    assert (reward.domain, reward.sample_rate_hz, reward.differentiable) == ("waveform", 16_000, True)
    lengths = torch.tensor([8000, 5334])
    at_16_khz = resample(audio.waveform, 24_000, 16_000)
    at_16_khz[1, 5334:] = 0
    expected = network.eval()(replace(audio, waveform=at_16_khz, lengths_samples=lengths, sample_rate_hz=16_000))
    torch.testing.assert_close(rewards(audio, asking(2)).total, expected.mean(1), atol=1e-5, rtol=1e-5)
    assert gradient_of(rewards, audio, "waveform").any()


def test_it_stays_in_evaluation_mode_and_frozen(folder: Path) -> None:
    reward: Any = load_reward(str(folder))
    assert not reward.train().network.training and not any(p.requires_grad for p in reward.parameters())
    assert MelSpec() == reward.network.mel_spec
