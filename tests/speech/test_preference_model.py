"""The preference network: level, padding, gradients, members, files; what it learns against the best there is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.integrate
import scipy.stats
import torch
from test_whisper_features import RATE_HZ, speech, tiny_encoder
from torch import Tensor

from rlhf_mel.rewards.bradley_terry import preference_loss
from rlhf_mel.speech.audio import MEL_FLOOR, MelSpec, log_mel
from rlhf_mel.speech.preference_model import (
    LEVEL_TOLERANCE,
    AttentivePooling,
    PreferenceModel,
    level_free,
    load_preference_model,
    save_preference_model,
)
from rlhf_mel.speech.whisper_features import WhisperFeatures
from rlhf_mel.storage import ASSETS
from rlhf_mel.types import Audio

pytestmark = pytest.mark.rounding

SMALL = PreferenceModel.Config(num_members=2, dim=16, num_layers=2)
SPEC = MelSpec()


def of_mels(*mels: Tensor) -> Audio:
    lengths = torch.tensor([len(mel) for mel in mels])
    mel = torch.nn.utils.rnn.pad_sequence(list(mels), batch_first=True)
    return Audio(torch.zeros(len(mels), 256), torch.full((len(mels),), 256), 24_000, mel, lengths)


def of_waveforms(*clips: Tensor, rate_hz: int = RATE_HZ) -> Audio:
    lengths = torch.tensor([len(clip) for clip in clips])
    waveform = torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True)
    return Audio(waveform, lengths, rate_hz, torch.zeros(len(clips), 1, 100), torch.ones(len(clips), dtype=torch.long))


def noise_mel(frames: int, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(frames, 100, generator=torch.Generator().manual_seed(seed)) - 2


def model(body: str = "mel", seed: int = 0) -> PreferenceModel:
    """Random weights with every part alive."""
    encoder = WhisperFeatures(tiny_encoder()) if body == "whisper" else None
    made = PreferenceModel(replace(SMALL, body=body), encoder=encoder, seed=seed).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in made.members.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def test_the_level_by_hand() -> None:
    # Frames of magnitudes (4, 0) and (1, 1), means 2 and 1: L = (4 + 1) / (2 + 1) = 5/3. What is 9 nats below L is cut.
    mel = torch.tensor([[[4.0, 1e-5], [1.0, 1.0], [7.0, 7.0]]]).log()
    free = level_free(mel, torch.tensor([2]))
    # 4 + 1e-5 in the first frame: 2.000005, so L differs from 5/3 in the sixth digit
    expected = torch.tensor([[4.0, 5 / 3 * math.exp(-9)], [1.0, 1.0]]).log() - math.log(5 / 3)
    torch.testing.assert_close(free[0, :2], expected, atol=1e-5, rtol=0)


def test_silence_has_no_part_in_the_level() -> None:
    mel = noise_mel(40)
    silence = torch.full((30, 100), math.log(MEL_FLOOR))
    alone = level_free(mel[None], torch.tensor([40]))[0]
    longer = level_free(torch.cat([silence, mel])[None], torch.tensor([70]))[0]
    # 30 frames at 1e-5 beside 40 at about 0.4: their squares are 1e-9 of the sum, their magnitudes 2e-5
    torch.testing.assert_close(longer[30:], alone, atol=1e-4, rtol=0)
    quiet = level_free(silence[None], torch.tensor([30]))
    torch.testing.assert_close(quiet, torch.full_like(quiet, -9.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("gain_db", [-12.0, 6.0, 12.0])
def test_a_louder_clip_scores_the_same(gain_db: float) -> None:
    # Real clips at -20 dBFS through the real mel with its floor; 12 dB down is -32, above the -50 that is promised.
    from rlhf_mel.speech.audio import load_audio

    network = model()
    for path in sorted((ASSETS / "prompts/references").glob("*.flac"))[::6]:
        clip = load_audio(path)[None]
        length = torch.tensor([clip.shape[1] // SPEC.hop_length + 1])
        scores = [
            network(replace(of_mels(noise_mel(3)), mel=log_mel(gain * clip, SPEC), lengths_frames=length))
            for gain in (1.0, 10 ** (gain_db / 20))
        ]
        torch.testing.assert_close(scores[1], scores[0], atol=LEVEL_TOLERANCE, rtol=0)


def test_attentive_pooling_by_hand() -> None:
    # No attention: weights 1/2 for the two frames of its own. Mean of (1, 3) is 2, deviation 1; the third is padding.
    pool = AttentivePooling(2)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.zero_()
    hidden = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [math.nan, 9.0]]])
    padded = torch.tensor([[[False], [False], [True]]])
    torch.testing.assert_close(pool(hidden, padded), torch.tensor([[2.0, 5.0, 1.0, 1e-3]]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("body", ["mel", "whisper"])
def test_batch_equals_single_whatever_the_order_and_the_padding(body: str) -> None:
    network = model(body)
    if body == "mel":
        clips = [noise_mel(80), noise_mel(51, 1), noise_mel(3, 2)]
        as_audio: Any = of_mels
    else:
        clips = [speech(0, 15_000), speech(1, 9000), speech(2, 20_000)]
        as_audio = of_waveforms
    alone = torch.cat([network(as_audio(clip)) for clip in clips])
    torch.testing.assert_close(network(as_audio(*clips)), alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(network(as_audio(*clips[::-1])).flip(0), alone, atol=1e-5, rtol=1e-5)
    longer = as_audio(*clips)
    if body == "mel":
        mel = torch.nn.functional.pad(longer.mel, (0, 0, 0, 33))
        mel[0, 80:], mel[1, 51:], mel[2, 3:] = math.nan, 7.0, -math.inf
        longer = replace(longer, mel=mel)
    else:
        longer = replace(longer, waveform=torch.nn.functional.pad(longer.waveform, (0, 5000), value=0.7))
    torch.testing.assert_close(network(longer), alone, atol=1e-5, rtol=1e-5)
    assert (alone.std(0) > 1e-3).all() and (alone[:, 0] - alone[:, 1]).abs().max() > 1e-3  # clips and members differ


@pytest.mark.parametrize("body", ["mel", "whisper"])
def test_gradient_equals_central_differences(body: str) -> None:
    # float64, h = 1e-6 along unit directions: an error of h^2 times a third derivative, and 1e-16 / h.
    network = model(body).double()
    heard = noise_mel(30).double() if body == "mel" else speech(3, 9000).double()
    as_audio: Any = of_mels if body == "mel" else of_waveforms

    def value(given: Tensor) -> Tensor:
        return network(as_audio(given)).mean()

    leaf = heard.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    random = torch.randn(heard.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for direction in (random / random.norm(), gradient / gradient.norm()):
        slope = (value(heard + 1e-6 * direction) - value(heard - 1e-6 * direction)).item() / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
    assert gradient.norm() > 1e-3
    gain = torch.ones_like(heard) if body == "mel" else heard
    assert abs((gradient * gain).sum().item()) < 1e-9 + 1e-6 * gradient.norm().item()  # a gain changes nothing


@pytest.mark.parametrize("body", ["mel", "whisper"])
def test_what_is_saved_scores_the_same(body: str, tmp_path: Path) -> None:
    network = model(body, seed=3)
    heard = of_mels(noise_mel(40)) if body == "mel" else of_waveforms(speech(4, 9000))
    uncentred = network(heard)
    network.centre += torch.tensor([0.5, -0.25])
    torch.testing.assert_close(network(heard), uncentred - torch.tensor([[0.5, -0.25]]))
    save_preference_model(network, tmp_path, note="mine")
    loaded = load_preference_model(tmp_path)
    torch.testing.assert_close(loaded(heard), network(heard), atol=0, rtol=0)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert json.loads((tmp_path / "config.json").read_text())["note"] == "mine"
    assert (tmp_path / "encoder").is_dir() == (body == "whisper")


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: expected a preference model's config and weights"):
        load_preference_model(tmp_path)
    save_preference_model(model(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"reward_model": "mos"}, 'expected "reward_model": "preference", got \'mos\''),
        ({"arch": {**values["arch"], "num_layers": 3}}, r"got others: \['members\.0\.blocks\.2"),
        ({"arch": {**values["arch"], "dim": 18}}, r"expected the tensors of config\.json, got others"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            load_preference_model(tmp_path)


def test_other_mels_are_refused() -> None:
    with pytest.raises(ValueError, match="expected mels of 100 channels, got 80; train one on the policy's mels"):
        model()(of_mels(noise_mel(10)[:, :80]))


def test_the_seed_decides_the_first_weights_and_the_global_generator_stays() -> None:
    before = torch.get_rng_state()
    first, again, other = (PreferenceModel(SMALL, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    heard = of_mels(noise_mel(20))
    for network in (first, again, other):
        network.eval()
    assert torch.equal(first(heard), again(heard)) and not torch.allclose(first(heard), other(heard))


def tilted(tilt: Tensor, frames: int, seed: int) -> Tensor:
    """Mels whose bands rise by `tilt` [n] nats from the lowest to the highest, over noise: [n, frames, 100]."""
    noise = torch.randn(len(tilt), frames, 100, generator=torch.Generator().manual_seed(seed))
    return 0.5 * noise - 2 + tilt[:, None, None] * torch.linspace(-0.5, 0.5, 100)


def test_it_learns_as_much_as_there_is_to_learn() -> None:
    # A clip's worth is s z, z its tilt, a standard normal; labels are drawn from Bradley-Terry. No one can predict a
    # label better than by the sign of the difference D = s (z1 - z2), a normal of deviation s sqrt(2), and so is right
    # in E sigma(|D|) of the cases. 400 pairs to learn from, 1000 others to be judged by.
    scale, pairs, held_out = 3.0, 400, 1000
    bayes = scipy.integrate.quad(
        lambda d: 2 * scipy.stats.norm.pdf(d, scale=scale * 2**0.5) / (1 + math.exp(-d)), 0, 60
    )[0]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, pairs + held_out, generator=generator)
    won = torch.rand(pairs + held_out, generator=generator) < (scale * (z[0] - z[1])).sigmoid()
    tilts = torch.stack([z[0].where(won, z[1]), z[1].where(won, z[0])])  # chosen, rejected
    network = PreferenceModel(PreferenceModel.Config(dim=16, num_layers=1, dropout=0.0), seed=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    sides = [tilted(side, 12, seed) for seed, side in enumerate(tilts)]

    def scores(rows: Tensor) -> tuple[Tensor, Tensor]:
        both = network(of_mels(*sides[0][rows], *sides[1][rows]))
        return both[: len(rows)], both[len(rows) :]

    for _ in range(5):
        for rows in torch.randperm(pairs, generator=generator).split(50):
            ones, none = torch.ones(len(rows)), torch.zeros(len(rows))
            loss = preference_loss(*scores(rows), soft_labels=ones, margins=none, weights=ones)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        chosen, rejected = scores(torch.arange(pairs, pairs + held_out))
    accuracy = (chosen > rejected).double().mean().item()
    # four deviations of a share of 1000, and 0.02 for learning from 400 noisy labels
    spread = 4 * math.sqrt(bayes * (1 - bayes) / held_out)
    assert bayes == pytest.approx(0.878, abs=1e-3)
    assert bayes - spread - 0.02 < accuracy < bayes + spread
