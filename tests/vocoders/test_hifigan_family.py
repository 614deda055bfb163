"""BigVGAN and transformers' HiFi-GANs: their packages' waveforms, finite differences, lengths to the sample, files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    FastSpeech2ConformerHifiGan,
    FastSpeech2ConformerHifiGanConfig,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from rlhf_mel.speech.audio import MelSpec, log_mel
from rlhf_mel.vocoders import Vocoder, bigvgan, load_vocoder
from rlhf_mel.vocoders.hifigan import HifiGanVocoder

pytestmark = pytest.mark.rounding

SMALL = dict(
    upsample_rates=[4, 2],
    upsample_kernel_sizes=[8, 4],
    upsample_initial_channel=8,
    resblock_kernel_sizes=[3, 5],
    resblock_dilation_sizes=[[1, 3], [1, 2]],
)
"""Eight samples a frame."""
BIGVGAN = dict(
    **{**SMALL, "resblock_dilation_sizes": [[1, 3, 5], [1, 2, 3]]},
    resblock="1",
    activation="snakebeta",
    snake_logscale=True,
    num_mels=3,
    n_fft=32,
    hop_size=8,
    win_size=32,
    sampling_rate=8000,
    fmin=0,
    fmax=None,
    use_tanh_at_final=False,
    use_bias_at_final=False,
)


def randomise(module: torch.nn.Module) -> None:
    """Published weights are far from the fresh ones, which whisper."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def small_bigvgan() -> Any:
    pytest.importorskip("bigvgan")
    generator = bigvgan.build(dict(BIGVGAN))
    randomise(generator)
    return bigvgan.BigVGANVocoder(generator.double())


def small_speecht5() -> HifiGanVocoder:
    config = SpeechT5HifiGanConfig(**SMALL, model_in_dim=3, sampling_rate=8000)
    model = SpeechT5HifiGan(config)
    randomise(model)
    model.mean.fill_(0.5)
    model.scale.fill_(2.0)
    return HifiGanVocoder(model.double(), MelSpec(**SPEC))


def small_fastspeech2() -> HifiGanVocoder:
    config = FastSpeech2ConformerHifiGanConfig(**SMALL, model_in_dim=3, sampling_rate=8000)
    model = FastSpeech2ConformerHifiGan(config)
    randomise(model)
    return HifiGanVocoder(model.double(), MelSpec(**SPEC))


SPEC: dict[str, Any] = dict(sample_rate_hz=8000, n_fft=32, hop_length=8, win_length=32, n_mels=3, kind="bigvgan")
BUILDERS = (small_bigvgan, small_speecht5, small_fastspeech2)
every_vocoder = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


def small_mel(frames: int = 7) -> Tensor:
    return torch.randn(4, frames, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@every_vocoder
def test_gradient_equals_finite_differences(build: Callable[[], Any]) -> None:
    vocoder, mel = build(), small_mel(5)[:2].requires_grad_()
    lengths = torch.tensor([5, 3])
    assert torch.autograd.gradcheck(lambda mel: vocoder(mel, lengths), mel)


@every_vocoder
def test_item_in_a_batch_is_the_item_alone_to_the_sample(build: Callable[[], Any]) -> None:
    vocoder, mel = build(), small_mel()
    lengths = torch.tensor([7, 4, 1, 0])
    for row, frames in enumerate(lengths.tolist()):
        mel[row, frames:] = torch.nan
    waveform = vocoder(mel, lengths)
    assert waveform.shape == (4, 7 * 8) and waveform.std() > 1e-3
    for row, frames in enumerate(lengths.tolist()):
        if frames:
            alone = vocoder(mel[row : row + 1, :frames])[0]
            assert alone.shape == (8 * frames,)
            torch.testing.assert_close(waveform[row, : 8 * frames], alone, atol=1e-12, rtol=0)
        assert not waveform[row, 8 * frames :].any()


@every_vocoder
def test_only_the_mel_has_a_gradient(build: Callable[[], Any]) -> None:
    vocoder, mel = build(), small_mel().requires_grad_()
    vocoder(mel, torch.tensor([7, 4, 1, 2])).square().sum().backward()
    assert mel.grad is not None and mel.grad[0].abs().min() > 0 and not mel.grad[1, 4:].any()
    assert isinstance(vocoder, Vocoder) and vocoder.differentiable and not vocoder.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in vocoder.parameters())


def test_decimal_logarithms_are_speecht5_s() -> None:
    vocoder, mel = small_speecht5(), small_mel()
    torch.testing.assert_close(vocoder(mel), vocoder.model(mel / math.log(10)))
    natural = small_fastspeech2()
    torch.testing.assert_close(natural(mel), natural.model(mel))


def test_mels_of_speecht5_are_read_off_its_config() -> None:
    spec = HifiGanVocoder(SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=16))).mel_spec
    assert spec == MelSpec(
        sample_rate_hz=16_000, n_mels=80, kind="bigvgan", f_min_hz=80.0, f_max_hz=7600.0, hop_length=256
    )


@pytest.mark.parametrize("changes", [dict(hop_length=4), dict(n_mels=4), dict(kind="vocos")])
def test_other_mels_are_refused(changes: dict[str, Any]) -> None:
    model = SpeechT5HifiGan(SpeechT5HifiGanConfig(**SMALL, model_in_dim=3, sampling_rate=8000))
    with pytest.raises(ValueError, match="HifiGanVocoder: expected"):
        HifiGanVocoder(model, MelSpec(**{**SPEC, **changes}))


def test_a_hifigan_in_a_folder(tmp_path: Path) -> None:
    model = SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=16))
    model.save_pretrained(str(tmp_path))
    loaded: Any = load_vocoder(tmp_path)
    mel = torch.randn(1, 4, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(mel), HifiGanVocoder(model)(mel))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match=r"expected a HiFi-GAN of transformers, .* got 'BertModel'"):
        load_vocoder(tmp_path)


@pytest.mark.parametrize("weight_norm", [True, False])
def test_a_bigvgan_in_a_folder(weight_norm: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bigvgan")
    generator = bigvgan.build(dict(BIGVGAN))
    if not weight_norm:
        generator.remove_weight_norm()
    generator._save_pretrained(tmp_path)  # its package's own
    capsys.readouterr()
    loaded: Any = load_vocoder(tmp_path)
    assert capsys.readouterr().out == ""
    mel = small_mel().float()
    torch.testing.assert_close(loaded(mel), generator(mel.mT)[:, 0])
    assert loaded.mel_spec == MelSpec(**SPEC)


def test_mels_of_bigvgan_are_those_of_its_package() -> None:
    """The 24 kHz model's: 100 bands up to 12 kHz, which is half the sample rate."""
    package = pytest.importorskip("bigvgan")
    config: dict[str, Any] = dict(
        sampling_rate=24_000, n_fft=1024, hop_size=256, win_size=1024, num_mels=100, fmin=0, fmax=12_000
    )
    spec = bigvgan.mel_spec_of(config)
    assert spec == MelSpec(kind="bigvgan")
    waveform = 0.3 * torch.randn(1, 24_000, generator=torch.Generator().manual_seed(0))
    theirs = package.mel_spectrogram(waveform, 1024, 100, 24_000, 256, 1024, 0, 12_000)
    torch.testing.assert_close(log_mel(waveform, spec), theirs.mT, atol=2e-4, rtol=1e-4)


def test_without_its_package_bigvgan_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bigvgan", None)
    (tmp_path / "config.json").write_text(json.dumps(BIGVGAN))
    (tmp_path / "bigvgan_generator.pt").touch()
    with pytest.raises(ImportError, match=r"pip install 'rlhf-mel\[bigvgan\]'"):
        load_vocoder(tmp_path)


def test_edges_of_the_filterbank() -> None:
    """A tone of 6 kHz is above a filterbank that ends at 4 kHz: all its bands are at the floor but for leakage."""
    waveform = 0.5 * torch.sin(2 * math.pi * 6000 * torch.arange(24_000) / 24_000)[None]
    whole, low = (log_mel(waveform, MelSpec(kind="bigvgan", f_max_hz=edge)) for edge in (None, 4000.0))
    assert whole[0, 40].max() > low[0, 40].max() + 5
