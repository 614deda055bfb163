"""Whisper's features in torch: transformers' own numbers, gain, padding, windows, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from rlhf_mel.speech.whisper_features import (
    LEVEL_RMS,
    WhisperFeatures,
    load_whisper_features,
    loud_level,
)

pytestmark = pytest.mark.rounding

RATE_HZ = 16_000
SIZES: dict[str, Any] = dict(
    d_model=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=32,
    vocab_size=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    max_target_positions=8,
)


def tiny_encoder(positions: int = 50, seed: int = 0) -> Any:
    """A random encoder whose every weight matters: transformers' own start is nearly zero."""
    encoder = WhisperEncoder(WhisperConfig(**SIZES, max_source_positions=positions)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return encoder


def speech(seed: int, samples: int) -> Tensor:
    """Noise in syllables, about -20 dBFS."""
    generator = torch.Generator().manual_seed(seed)
    envelope = torch.sin(torch.arange(samples) * (3.0 / 2000)).clamp(min=0.01)
    return 0.15 * torch.randn(samples, generator=generator) * envelope


def padded(*clips: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True), torch.tensor([len(clip) for clip in clips])


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_is_that_of_transformers(mels: int) -> None:
    # One window of 30 s. transformers says 1e-5 between its own two ways.
    encoder = WhisperEncoder(WhisperConfig(**SIZES, num_mel_bins=mels))
    clip = speech(0, 40_000)
    extractor = WhisperFeatureExtractor(feature_size=mels)
    expected = extractor(clip.numpy(), sampling_rate=RATE_HZ, return_tensors="pt").input_features[0].T
    waveform = torch.nn.functional.pad(clip, (0, 30 * RATE_HZ - len(clip)))
    torch.testing.assert_close(WhisperFeatures(encoder).log_mel(waveform[None])[0], expected, atol=2e-5, rtol=0)


def test_features_are_those_of_transformers() -> None:
    # The clip at the level that it is heard at, through the feature extractor and the encoder itself.
    encoder, clip = tiny_encoder(1500), speech(1, 20_000)
    lengths = torch.tensor([len(clip)])
    heard = clip * (LEVEL_RMS / loud_level(clip[None], lengths))
    inputs = WhisperFeatureExtractor()(heard.numpy(), sampling_rate=RATE_HZ, return_tensors="pt").input_features
    expected = encoder(inputs, output_hidden_states=True).hidden_states
    features = WhisperFeatures(encoder)
    layers, own = features(clip[None], lengths)
    assert len(layers) == len(expected) == features.num_layers and own.tolist() == [63]  # 20,000 / 320, rounded up
    for layer, reference in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer[0], reference[0, :63], atol=5e-4, rtol=1e-4)


def test_the_loud_level_by_hand() -> None:
    # Frames of 4 samples with powers 4, 1 and 0: (16 + 1 + 0) / (4 + 1 + 0) = 3.4; the fourth is beyond the clip.
    waveform = torch.tensor([[2.0, -2, 2, 2, 1, 1, -1, 1, 0, 0, 0, 0, 9, 9, 9, 9]])
    assert loud_level(waveform, torch.tensor([12]), frame=4).item() == pytest.approx(3.4**0.5)
    assert loud_level(torch.zeros(1, 8), torch.tensor([8]), frame=4).item() == pytest.approx(1e-4)


def test_a_gain_changes_nothing_and_neither_does_what_is_beyond() -> None:
    features = WhisperFeatures(tiny_encoder())
    clips = [speech(2, 15_000), speech(3, 9000), speech(4, 16_000)]
    waveform, lengths = padded(*clips)
    alone = [features(clip[None], torch.tensor([len(clip)]))[0][:, 0] for clip in clips]
    waveform[1, 9000:], waveform[0, 15_000:] = 3.0, torch.nan
    together, own = features(waveform, lengths)
    louder, _ = features(waveform * 4, lengths)
    assert own.tolist() == [47, 29, 50]
    for row, (reference, frames) in enumerate(zip(alone, own.tolist(), strict=True)):
        torch.testing.assert_close(together[:, row, :frames], reference, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(louder[:, row, :frames], reference, atol=1e-4, rtol=1e-4)


def test_a_long_clip_is_heard_in_windows() -> None:
    # A window of 1 s; of a clip of 2.5 s the second window holds its second second. Its log mel is that of the whole:
    # the frames near an edge see across it, so the encoder is asked for the same frames.
    features = WhisperFeatures(tiny_encoder())
    clip = speech(5, 40_000)
    layers, own = features(clip[None], torch.tensor([40_000]))
    assert own.tolist() == [125] and layers.shape[2] == 125
    heard = clip * (LEVEL_RMS / loud_level(clip[None], torch.tensor([40_000])))
    mel = features.log_mel(torch.nn.functional.pad(heard, (0, 8000))[None])
    expected = features.encoder(mel[:, 100:200].transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(layers[-1, 0, 50:100], expected[0], atol=1e-5, rtol=1e-5)


def test_gradient_equals_central_differences() -> None:
    # float64, h = 1e-6 along a unit direction; the maximum and the floor of the log mel are kinks, seldom crossed.
    features = WhisperFeatures(tiny_encoder()).double()
    clip, lengths = speech(6, 12_000).double(), torch.tensor([12_000])
    leaf = clip.clone().requires_grad_()

    def value(waveform: Tensor) -> Tensor:
        return features(waveform[None], lengths)[0].square().mean()

    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(12_000, generator=generator, dtype=torch.float64)
    for direction in (random / random.norm(), gradient / gradient.norm()):
        slope = (value(clip + 1e-6 * direction) - value(clip - 1e-6 * direction)).item() / 2e-6
        assert (gradient @ direction).item() == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert gradient.norm() > 1e-3
    assert abs((gradient @ clip).item()) < 1e-6 * gradient.norm().item()  # a gain changes nothing


def test_whole_models_and_encoders_alone_are_loaded(tmp_path: Path) -> None:
    model = WhisperModel(WhisperConfig(**SIZES, max_source_positions=100))
    model.save_pretrained(tmp_path / "whole")
    features = load_whisper_features(tmp_path / "whole", window_s=1.0)
    assert features.window_samples == RATE_HZ and not any(p.requires_grad for p in features.parameters())
    torch.testing.assert_close(features.encoder.conv1.weight, model.encoder.conv1.weight)
    features.encoder.save_pretrained(tmp_path / "alone")
    again = load_whisper_features(tmp_path / "alone")
    waveform, lengths = padded(speech(7, 9000))
    torch.testing.assert_close(again(waveform, lengths), features(waveform, lengths), atol=0, rtol=0)
    assert not features.train().encoder.training


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder in transformers' format .*, found none"):
        load_whisper_features(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="expected a model_type of 'whisper', got 'bert'"):
        load_whisper_features(tmp_path)
    with pytest.raises(ValueError, match=r"window_s of Whisper: expected 0.1 to 1 seconds, got 2"):
        WhisperFeatures(tiny_encoder(), window_s=2)


def test_the_filterbank_is_not_trained_and_not_saved() -> None:
    assert not any("filters" in name for name in WhisperFeatures(tiny_encoder()).state_dict())
    assert np.isclose(WhisperFeatures(tiny_encoder()).filters.shape, (201, 80)).all()
