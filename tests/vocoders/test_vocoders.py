"""Vocos against the `vocos` package, torch.istft and finite differences; Griffin-Lim against the mel it was given."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import librosa
import pytest
import soundfile
import torch
from problems import reference_of
from torch import Tensor
from vocos import Vocos

from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.speech.audio import MelSpec, frames_to_samples, load_audio, log_mel
from rlhf_mel.vocoders import Vocoder, load_vocoder
from rlhf_mel.vocoders.griffin_lim import GriffinLim
from rlhf_mel.vocoders.vocos import VocosVocoder, save

pytestmark = pytest.mark.rounding

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = MelSpec(sample_rate_hz=8000, n_fft=16, hop_length=4, win_length=16, n_mels=3)
LENGTHS = torch.tensor([12, 7, 1, 2])


def small_vocoder(seed: int = 0) -> VocosVocoder:
    """Frozen float64, every parameter random: fresh weights of 0.02 would hide mistakes."""
    vocoder = VocosVocoder.trainable(SMALL, dim=6, intermediate_dim=8, num_layers=2).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in vocoder.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return vocoder.eval().requires_grad_(False)


def small_mel(batch: int = 4, frames: int = 12) -> Tensor:
    return torch.randn(batch, frames, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("train_vocoder")


def test_waveform_equals_that_of_the_vocos_package() -> None:
    vocoder, mel = small_vocoder(), small_mel()
    expected = Vocos(None, vocoder.backbone, vocoder.head).decode(mel.mT)
    assert expected.std() > 0.01
    torch.testing.assert_close(vocoder(mel), expected, atol=1e-12, rtol=1e-10)


def test_item_in_a_batch_equals_the_item_alone() -> None:
    vocoder, mel = small_vocoder(), small_mel()
    mel = mel.masked_fill(~lengths_to_mask(LENGTHS, 12)[..., None], torch.nan)
    waveform = vocoder(mel, LENGTHS)
    assert waveform.shape == (4, 44)
    for row, frames in enumerate(LENGTHS.tolist()):
        samples = (frames - 1) * 4
        alone = vocoder(mel[row : row + 1, :frames])[0]
        assert alone.shape == (samples,)
        torch.testing.assert_close(waveform[row, :samples], alone, atol=1e-12, rtol=0)
        assert not waveform[row, samples:].any()


def test_float32_item_in_a_batch_equals_the_item_alone_at_the_real_size() -> None:
    torch.manual_seed(0)
    vocoder = VocosVocoder.trainable(MelSpec(), dim=224, intermediate_dim=672, num_layers=8).requires_grad_(False)
    vocoder.head.out.bias[:513] += 2  # log magnitude: fresh weights whisper
    mel = torch.randn(2, 60, 100) * 2 - 5
    waveform = vocoder(mel, torch.tensor([60, 41]))
    assert waveform.std() > 0.05
    # float32: 6e-8 of samples up to 1, through eight blocks and sums of 1,024 terms; a padded frame moves them by 1e-2
    torch.testing.assert_close(waveform[1, : 40 * 256], vocoder(mel[1:, :41])[0], atol=1e-5, rtol=0)


def test_gradient_equals_finite_differences() -> None:
    vocoder = small_vocoder()
    mel = small_mel(2, 6).requires_grad_()
    lengths = torch.tensor([6, 4])
    assert torch.autograd.gradcheck(lambda mel: vocoder(mel, lengths), mel)


def test_gradient_reaches_the_mel_and_nothing_else() -> None:
    vocoder, mel = small_vocoder(), small_mel().requires_grad_()
    vocoder(mel, LENGTHS).square().sum().backward()
    assert mel.grad is not None and mel.grad[0].abs().min() > 0
    for row, frames in enumerate(LENGTHS.tolist()):
        assert not mel.grad[row, frames:].any()
    assert all(parameter.grad is None for parameter in vocoder.parameters())


def test_overlap_add_equals_torch_istft() -> None:
    # The spectrum of 12 frames, of which an item owns 7: torch's inverse of the 7 alone is the answer.
    vocoder = small_vocoder()
    window = torch.hann_window(16, dtype=torch.float64)
    signal = torch.randn(1, 44, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spectrum = torch.stft(signal, 16, 4, window=window, return_complex=True)
    padded = (torch.arange(12) >= 7)[None, None]
    added = vocoder._overlap_add(spectrum.masked_fill(padded, 0), padded, torch.tensor([24]))
    expected = torch.istft(spectrum[..., :7], 16, 4, window=window)
    torch.testing.assert_close(added[:, :24], expected, atol=1e-6, rtol=0)  # the stored window is float32
    whole = vocoder._overlap_add(spectrum, torch.zeros(1, 1, 12, dtype=torch.bool), torch.tensor([44]))
    torch.testing.assert_close(whole, signal, atol=1e-6, rtol=0)


def test_waveform_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    vocoder = VocosVocoder.trainable(MelSpec(), dim=16, intermediate_dim=16, num_layers=1)
    mel = torch.randn(1, 20, 100)
    with torch.autocast("cpu", torch.bfloat16):
        waveform = vocoder(mel)
    assert torch.equal(waveform, vocoder(mel))


def test_saved_and_loaded(tmp_path: Path) -> None:
    vocoder = VocosVocoder.trainable(MelSpec(), dim=16, intermediate_dim=24, num_layers=3)
    save(vocoder, tmp_path, training={"steps": 7})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vocoder.json", "vocoder.safetensors"]
    config = json.loads((tmp_path / "vocoder.json").read_text())
    assert config["arch"] == {"dim": 16, "intermediate_dim": 24, "num_layers": 3}
    assert config["training"] == {"steps": 7}
    loaded: Any = load_vocoder(tmp_path)
    assert not loaded.training and loaded.mel_spec == MelSpec() and loaded.sample_rate_hz == 24_000
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for (name, saved), (_, read) in zip(vocoder.named_parameters(), loaded.named_parameters(), strict=True):
        # float16 keeps 11 bits: half a unit in the last place is 2^-12 of the next power of two, at most 2^-11.
        torch.testing.assert_close(read, saved.detach(), rtol=2**-11, atol=2**-24, msg=name)
    assert torch.equal(loaded.head.istft.window, vocoder.head.istft.window)


VOCOS_CONFIG = """
feature_extractor:
  class_path: vocos.feature_extractors.MelSpectrogramFeatures
  init_args: {sample_rate: 24000, n_fft: 1024, hop_length: 256, n_mels: 100, padding: center}
backbone:
  class_path: vocos.models.VocosBackbone
  init_args: {input_channels: 100, dim: 16, intermediate_dim: 24, num_layers: 1}
head:
  class_path: vocos.heads.ISTFTHead
  init_args: {dim: 16, n_fft: 1024, hop_length: 256, padding: center}
"""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as charactr/vocos-mel-24khz is, and as f5-tts's is_local=True reads it."""
    (tmp_path / "config.yaml").write_text(VOCOS_CONFIG)
    torch.manual_seed(0)
    torch.save(Vocos.from_hparams(str(tmp_path / "config.yaml")).state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


def assert_loaded(vocoder: Any, folder: Path) -> None:
    theirs = Vocos.from_hparams(str(folder / "config.yaml")).eval()
    theirs.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True))
    assert vocoder.mel_spec == MelSpec()
    waveform = torch.sin(torch.arange(24_000) / 20)[None] / 2
    mel = theirs.feature_extractor(waveform).clamp(min=math.log(1e-5))
    assert torch.equal(log_mel(waveform), mel.mT)
    torch.testing.assert_close(vocoder(mel.mT), theirs.decode(mel))
    assert not any(parameter.requires_grad for parameter in vocoder.parameters())


def test_vocos_of_the_hub(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, filename: str, *, remedy: str) -> Path:
        assert hub_id == "charactr/vocos-mel-24khz"
        return published / filename

    monkeypatch.setattr("rlhf_mel.vocoders.vocos.download", download)
    assert_loaded(load_vocoder("charactr/vocos-mel-24khz"), published)


def test_vocos_of_a_folder(published: Path) -> None:
    assert_loaded(load_vocoder(published), published)


def test_a_config_that_calls_other_code_is_refused(published: Path) -> None:
    text = VOCOS_CONFIG.replace("vocos.heads.ISTFTHead", "os.mkdir")
    (published / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"expected classes of the vocos package, got \['os\.mkdir'\]"):
        load_vocoder(published)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("melgan", ValueError, r"\['bigvgan', 'griffin_lim', .*'vocos'.*package.module:Class"),
        ("hifigan", ValueError, "expected weights"),
        ("bigvgan", ValueError, "expected weights"),
        ("vocos", ValueError, "expected weights"),
        ("./nowhere", ValueError, "unknown vocoder"),
    ],
)
def test_unknown_names(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_vocoder(name)


def test_folders_that_lack_something(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train_vocoder\.py"):
        load_vocoder(tmp_path)
    save(VocosVocoder.trainable(MelSpec(), dim=8, intermediate_dim=8, num_layers=1), tmp_path)
    (tmp_path / "vocoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights"):
        load_vocoder(tmp_path)


def test_own_class_by_path() -> None:
    assert isinstance(load_vocoder("rlhf_mel.vocoders.griffin_lim:GriffinLim"), GriffinLim)


@pytest.mark.parametrize("kind", ["bigvgan"])
def test_other_mels_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="'vocos' mels"):
        GriffinLim(MelSpec(kind=kind))
    with pytest.raises(ValueError, match="'vocos' mels"):
        VocosVocoder.trainable(MelSpec(kind=kind), dim=8, intermediate_dim=8, num_layers=1)


def chirp(samples: int = 23_808) -> Tensor:
    return 0.3 * torch.sin(torch.linspace(0.02, 0.4, samples).cumsum(0))[None]


def test_griffin_lim_gives_back_the_mel_as_well_as_librosa() -> None:
    # Over the loud part of the mel. librosa solves for non-negative magnitudes and starts from random phases.
    mel = log_mel(chirp())
    magnitudes = librosa.feature.inverse.mel_to_stft(
        mel[0].exp().T.numpy(), sr=24_000, n_fft=1024, power=1, htk=True, norm=None
    )
    inverted = librosa.griffinlim(magnitudes, n_iter=32, hop_length=256, n_fft=1024, length=23_808, random_state=0)

    def distance(waveform: Tensor) -> float:
        return (log_mel(waveform) - mel)[mel > mel.amax() - 5].abs().mean().item()

    ours = distance(load_vocoder("griffin_lim")(mel))
    assert ours < 1.25 * distance(torch.from_numpy(inverted)[None].float())
    assert ours < 0.25 * distance(GriffinLim(iterations=0)(mel))


def test_griffin_lim_item_in_a_batch_equals_the_item_alone() -> None:
    griffin_lim = load_vocoder("griffin_lim")
    mel = log_mel(chirp()).expand(3, -1, -1)
    waveform = griffin_lim(mel, torch.tensor([94, 50, 1]))
    assert torch.equal(waveform[1, : 49 * 256], griffin_lim(mel[:1, :50])[0])
    assert waveform.shape == (3, 93 * 256) and not waveform[1, 49 * 256 :].any() and not waveform[2].any()


def test_griffin_lim_says_that_it_has_no_gradient() -> None:
    griffin_lim = load_vocoder("griffin_lim")
    assert not griffin_lim.differentiable
    assert not griffin_lim(log_mel(chirp()).requires_grad_()).requires_grad


@pytest.fixture
def tiny() -> Vocoder:
    return load_vocoder("tiny")


@pytest.mark.parametrize("voice", ["joe", "slt", "rms"])
def test_tiny_gives_back_the_mel(tiny: Vocoder, voice: str) -> None:
    # Speech of each voice: a mean error of 0.5 is 4.3 dB. Random weights are over 2 away, trained ones at 0.25 to 0.28.
    clip = load_audio(reference_of(voice))
    mel = log_mel(clip[None])
    waveform = tiny(mel)
    assert waveform.shape == (1, frames_to_samples(mel.shape[1]))
    loud = mel > mel.amax() - 5
    assert (log_mel(waveform) - mel)[loud].abs().mean() < 0.5


def test_tiny_item_in_a_batch_equals_the_item_alone(tiny: Vocoder) -> None:
    mel = log_mel(chirp()).expand(2, -1, -1)
    waveform = tiny(mel, torch.tensor([94, 33]))
    torch.testing.assert_close(waveform[1, : 32 * 256], tiny(mel[:1, :33])[0], atol=1e-5, rtol=0)


def toy_corpus(folder: Path) -> Path:
    """Twelve tones of 0.5 to 0.8 s by two 'voices', as wav."""
    rows = []
    for index in range(12):
        samples = 12_000 + 600 * index
        tone = 0.1 * torch.sin(torch.arange(samples) * (0.02 + 0.01 * index))
        soundfile.write(folder / f"{index}.wav", tone.numpy(), 24_000)
        row = {"id": str(index), "file": f"{index}.wav", "text": f"tone {'abcdefghijkl'[index]}"}
        rows.append(json.dumps(row | {"voice": "ab"[index % 2], "duration_s": samples / 24_000}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_crops_are_cuts_of_one_clip_and_all_as_likely(recipe: ModuleType) -> None:
    # Ten samples 0..9 in clips 0-2, 3-6, 7-9 and a clip that is left out. Crops of 3 begin at 0, 3, 4 or 7.
    spans = ((0, 3), (3, 4), (7, 3), (10, 5))
    corpus = recipe.Corpus(
        samples=torch.arange(15, dtype=torch.int16), starts=torch.tensor([0, 3, 7, 10]),
        lengths=torch.tensor([3, 4, 3, 5]), spans=spans, ids=("",) * 4, texts=("",) * 4, voices=("",) * 4,
        held_out=(False,) * 4, labels=({},) * 4, sample_rate_hz=24_000,
    )  # fmt: skip
    crops = recipe.Crops(corpus, [0, 1, 2], 3).draw(4000, torch.Generator().manual_seed(0)) * 32768
    begins, counts = crops[:, 0].unique(return_counts=True)
    assert begins.tolist() == [0, 3, 4, 7]
    assert (crops - crops[:, :1]).unique(dim=0).tolist() == [[0, 1, 2]]
    assert (counts - 1000).abs().max() < 120  # standard deviation 27
    with pytest.raises(ValueError, match="crop shorter"):
        recipe.Crops(corpus, [0, 1, 2], 5)


def test_corpus_keeps_clips_in_order(tmp_path: Path, recipe: ModuleType) -> None:
    corpus = recipe.load_corpus(toy_corpus(tmp_path), "cpu")
    assert len(corpus) == 12 and corpus.voice_names == ["a", "b"] and corpus.texts[3] == "tone d"
    assert corpus.lengths.tolist() == [12_000 + 600 * index for index in range(12)]
    expected = 0.1 * torch.sin(torch.arange(13_800) * 0.05)
    torch.testing.assert_close(corpus.clip(3), expected, atol=1.01 / 32768, rtol=0)  # twice rounded to 16 bits
    assert [row for row in range(12) if row in corpus.rows(held_out=False, max_duration_s=0.55)] == [0, 1, 2]


def test_held_out_texts_are_three_in_a_hundred(recipe: ModuleType) -> None:
    held_out = sys.modules["corpus_data"].is_held_out
    count = sum(held_out(f"sentence {'abcdefghij'[n % 10] * (n // 10)}") for n in range(4000))
    assert abs(count - 120) < 40  # standard deviation 10.8
    assert held_out("Well, then!") == held_out("well then")


def test_average_is_the_moving_average(recipe: ModuleType) -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    average = recipe.Average(module, decay=0.25)
    module.weight.data.fill_(2.0)
    average.update()  # decay min(0.25, 2/11): 2/11 of 1 and 9/11 of 2
    module.weight.data.fill_(4.0)
    average.update()  # decay min(0.25, 3/12)
    average.swap()
    assert module.weight.item() == pytest.approx(0.25 * (2 / 11 + 18 / 11) + 0.75 * 4)
    average.swap()
    assert module.weight.item() == 4.0


def test_cosine_schedule(recipe: ModuleType) -> None:
    # Up to 1 at a tenth; halfway down after that (0.55) it is floor + (1 - floor) / 2.
    values = [recipe.cosine(fraction, warmup=0.1, floor=0.2) for fraction in (0.05, 0.1, 0.55, 1.0, 1.5)]
    assert values == pytest.approx([0.5, 1.0, 0.6, 0.2, 0.2])


def test_mel_distance_of_a_gain_is_the_gain(recipe: ModuleType) -> None:
    # A factor of two moves every band above the floor by ln 2: 0.69 at each resolution.
    noise = 0.3 * torch.randn(2, 8192, generator=torch.Generator().manual_seed(0))
    distance = recipe.MelDistance(24_000)(noise, 2 * noise)
    assert distance.item() == pytest.approx(math.log(2), abs=1e-3)


def test_discriminator_gradients_stay_on_their_side(recipe: ModuleType) -> None:
    """One adversarial update moves both players; the vocoder's loss leaves no gradient in the discriminators."""
    torch.manual_seed(0)
    vocoder = VocosVocoder.trainable(MelSpec(), dim=8, intermediate_dim=8, num_layers=1)
    trainer = recipe.Trainer(vocoder, recipe.Discriminators(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in trainer.discriminators.parameters()]
    mine = vocoder.head.out.weight.detach().clone()
    real = chirp(2304)
    losses = trainer.compete(real, torch.zeros(1, 10, 100), torch.zeros(1, 1, 1))
    assert losses.isfinite().all()
    # Hinge of scores near zero is 1 + 1 a family: 2 + 0.1 * 2.
    assert losses[2].item() == pytest.approx(2.2, abs=0.1)
    assert not torch.equal(mine, vocoder.head.out.weight)
    after = list(trainer.discriminators.parameters())
    # AdamW's first step moves a weight by lr (1e-3) and decay; a second, from the vocoder's loss, would double it.
    moves = torch.cat([(new - old).abs().flatten() for new, old in zip(after, before, strict=True)])
    assert 5e-4 < moves.median() < 1.5e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_step_equals_the_step(recipe: ModuleType) -> None:
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        vocoder = VocosVocoder.trainable(MelSpec(), dim=32, intermediate_dim=32, num_layers=1).cuda()
        trainer = recipe.Trainer(vocoder, recipe.Discriminators().cuda(), lr=1e-3)
        inputs = (chirp(8192).cuda(), torch.zeros(1, 33, 100).cuda(), torch.zeros(1, 1, 1).cuda())
        # Captured spends three updates on warming up.
        step = recipe.Captured(trainer.reconstruct, inputs) if captured else trainer.reconstruct
        for _ in range(2 if captured else 5):
            distance = step(*inputs)
        results.append(distance.item())
    assert results[0] == pytest.approx(results[1], rel=1e-3)
