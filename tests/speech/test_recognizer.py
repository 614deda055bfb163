"""CTC against enumeration of every alignment, gradients against finite differences, a batch against its items."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.speech.recognizer import (
    ALPHABET,
    CLASSES,
    Recognizer,
    character_nll,
    encode,
    frames_needed,
    greedy,
    load_recognizer,
    normalize_text,
    save_recognizer,
)

pytestmark = pytest.mark.rounding

RECIPES = Path(__file__).parents[2] / "recipes"
SPEC = MelSpec(n_mels=5)
LENGTHS = torch.tensor([30, 17, 8])


def small_recognizer() -> Recognizer:
    """Float64, eval mode, every parameter random and large enough to matter."""
    sizes = {"dim": 6, "hidden_dim": 8, "num_layers": 2, "kernel_size": 3, "voice_layer": 1}
    recognizer = Recognizer(SPEC, Recognizer.Config(**sizes)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in recognizer.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return recognizer.eval()


def small_mel() -> Tensor:
    noise = torch.randn(3, 30, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 3 * noise - 4


def random_log_probs(batch: int, frames: int) -> Tensor:
    logits = torch.randn(batch, frames, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2 * logits).log_softmax(-1)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("train_recognizer")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Hello, World!", "hello world"),
        ("  It's   o'clock. ", "it's o'clock"),
        ("‘Don’t,’ he said", "don't he said"),
        ("'Tis the dogs' bone", "tis the dogs bone"),
        ("well-known -- café naïve", "well known cafe naive"),
        ("Yes;\nno", "yes no"),
    ],
)
def test_normalize_text(text: str, normal: str) -> None:
    assert normalize_text(text) == normal
    assert normalize_text(normal) == normal


@pytest.mark.parametrize(("text", "message"), [("3 cats", r"\['3'\]"), ("straße", "ß"), ("?!", "words"), ("", "words")])
def test_normalize_text_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize_text(text)


def test_classes_by_hand() -> None:
    # 0 blank, 1 space, 2 apostrophe, 3 a, ..., 28 z.
    assert encode("A z'b").tolist() == [3, 1, 28, 2, 4]
    assert frames_needed(encode("aab")) == 4 and frames_needed(encode("a a")) == 3 and CLASSES == 29


def brute_force_nll(log_probs: Tensor, classes: list[int]) -> float:
    """-log of the summed probability of every path of classes that collapses to `classes`."""
    total = 0.0
    for path in itertools.product(sorted({0, *classes}), repeat=len(log_probs)):
        merged = [k for k, _ in itertools.groupby(path)]
        if [k for k in merged if k > 0] == classes:
            total += math.exp(sum(log_probs[t, k].item() for t, k in enumerate(path)))
    return -math.log(total)


@pytest.mark.parametrize("text", ["a", "ab", "aa", "a a", "it's"])
def test_ctc_equals_enumeration(text: str) -> None:
    log_probs = random_log_probs(2, 6)
    expected = [brute_force_nll(log_probs[0], encode(text).tolist()), brute_force_nll(log_probs[1, :5], [3])]
    nll = character_nll(log_probs, torch.tensor([6, 5]), [text, "a"])
    torch.testing.assert_close(nll, torch.tensor([expected[0] / len(text), expected[1]], dtype=torch.float64))


def test_ctc_by_hand() -> None:
    # Two frames, p(a) = 1/2 and 1/4, blank the rest: p = 1 - p(blank, blank) = 1 - 1/2 * 3/4 = 5/8.
    probs = torch.full((1, 2, CLASSES), 1e-30)
    probs[0, :, 3] = torch.tensor([0.5, 0.25])
    probs[0, :, 0] = torch.tensor([0.5, 0.75])
    assert character_nll(probs.log(), torch.tensor([2]), ["a"]).item() == pytest.approx(math.log(8 / 5), abs=1e-5)


def test_a_text_that_does_not_fit_is_infinite_and_has_no_gradient() -> None:
    log_probs = random_log_probs(2, 3).requires_grad_()
    nll = character_nll(log_probs, torch.tensor([2, 3]), ["aa", "aa"])  # "a-a" takes three frames
    assert nll[0] == torch.inf and nll[1].isfinite()
    nll[nll.isfinite()].sum().backward()
    assert log_probs.grad is not None and not log_probs.grad[0].any() and log_probs.grad[1].isfinite().all()


def test_ctc_gradient_equals_finite_differences() -> None:
    recognizer = small_recognizer().requires_grad_(False)
    mel = small_mel()[:2, :12].requires_grad_()
    lengths = torch.tensor([12, 9])
    assert torch.autograd.gradcheck(lambda mel: recognizer.ctc_loss(mel, lengths, ["ab", "it"]), mel)


def test_voice_gradient_equals_finite_differences() -> None:
    recognizer = small_recognizer().requires_grad_(False)
    mel = small_mel()[:2, :6].requires_grad_()
    lengths = torch.tensor([6, 5])
    assert torch.autograd.gradcheck(lambda mel: recognizer.voice_embedding(mel, lengths)[:, :4], mel)


def test_greedy_by_hand() -> None:
    # " aa-ab--bb " reads "aabb" with repeats merged and blanks (-) dropped, outer spaces cut: a a b b.
    path = [1, 3, 3, 0, 3, 4, 0, 0, 4, 4, 1]
    log_probs = F.one_hot(torch.tensor([path, path]), CLASSES).float()
    assert greedy(log_probs, torch.tensor([11, 4])) == ["aabb", "a"]


def test_item_in_a_batch_equals_the_item_alone() -> None:
    recognizer = small_recognizer()
    mel = small_mel().masked_fill(~lengths_to_mask(LENGTHS, 30)[..., None], torch.nan)
    log_probs, voices, lengths = recognizer.listen(mel, LENGTHS)
    assert lengths.tolist() == [15, 9, 4]
    losses = recognizer.ctc_loss(mel, LENGTHS, ["ab", "cd", "e"])
    embeddings = recognizer.voice_embedding(mel, LENGTHS)
    for row, (frames, text) in enumerate(zip(LENGTHS.tolist(), ["ab", "cd", "e"], strict=True)):
        alone, length = mel[row : row + 1, :frames], LENGTHS[row : row + 1]
        expected, expected_lengths = recognizer(alone, length)
        assert expected.shape[1] == expected_lengths.item() == lengths[row]
        torch.testing.assert_close(log_probs[row, : lengths[row]], expected[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(losses[row], recognizer.ctc_loss(alone, length, [text])[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(voices[row], recognizer.voice_embedding(alone, length)[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(voices[row], embeddings[row], atol=1e-12, rtol=0)
        assert recognizer.transcribe(mel, LENGTHS)[row] == recognizer.transcribe(alone, length)[0]


def test_float32_item_in_a_batch_equals_the_item_alone_at_the_real_size() -> None:
    torch.manual_seed(0)
    recognizer = Recognizer().eval()
    mel = torch.randn(2, 120, 100) * 2 - 5
    log_probs, voices, _ = recognizer.listen(mel, torch.tensor([120, 71]))
    alone, voice, _ = recognizer.listen(mel[1:, :71], torch.tensor([71]))
    # float32: 6e-8 of log probabilities near 4, through all layers
    torch.testing.assert_close(log_probs[1, :36], alone[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(voices[1], voice[0], atol=1e-5, rtol=0)


def test_letters_come_from_what_is_near() -> None:
    # Places that a frame hears, each side: 1 a block of kernel 3, twice, in subsampled frames; 2 at the second
    # convolution, 2 at the first, in mel frames: 2 * 2 + 2 + 2 = 8. Frame 7 of the output is centred on mel frame 14.
    recognizer, mel = small_recognizer(), small_mel()[:1].requires_grad_()
    recognizer(mel, torch.tensor([30]))[0][0, 7].square().sum().backward()
    assert mel.grad is not None
    assert mel.grad[0].abs().sum(-1).nonzero()[:, 0].tolist() == list(range(14 - 8, 14 + 8 + 1))


def test_voice_is_the_unit_vector_of_mean_and_deviation() -> None:
    recognizer = small_recognizer()
    hidden = torch.randn(2, 7, 6, dtype=torch.float64)
    padded = ~lengths_to_mask(torch.tensor([7, 4]), 7)[..., None]
    voices = recognizer._pool(hidden, padded, torch.tensor([7, 4]))
    own = hidden[1, :4]
    statistics = torch.cat([own.mean(0), (own.var(0, correction=0) + 1e-6).sqrt()])
    expected = recognizer.voice.weight @ statistics + recognizer.voice.bias
    torch.testing.assert_close(voices[1], expected / expected.norm())
    torch.testing.assert_close(voices.norm(dim=-1), torch.ones(2, dtype=torch.float64))


def test_nothing_changes_under_autocast() -> None:
    torch.manual_seed(0)
    recognizer = Recognizer(SPEC, Recognizer.Config(dim=16, hidden_dim=16, num_layers=1, voice_layer=1)).eval()
    mel = small_mel().float()
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, voices, _ = recognizer.listen(mel, LENGTHS)
    expected = recognizer.listen(mel, LENGTHS)
    assert torch.equal(log_probs, expected[0]) and torch.equal(voices, expected[1])


def test_sizes_are_validated() -> None:
    with pytest.raises(ValueError, match="voice_layer"):
        Recognizer.Config(num_layers=2, voice_layer=3)
    with pytest.raises(ValueError, match="odd kernel_size"):
        Recognizer.Config(kernel_size=4)


def test_saved_and_loaded(tmp_path: Path) -> None:
    recognizer = Recognizer(SPEC, Recognizer.Config(dim=8, hidden_dim=8, num_layers=2, voice_layer=1))
    save_recognizer(recognizer, tmp_path, training={"steps": 7})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recognizer.json", "recognizer.safetensors"]
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "readable by whom any new file is"
    loaded = load_recognizer(tmp_path)
    assert not loaded.training and loaded.mel_spec == SPEC and loaded.config == recognizer.config
    for (name, saved), (_, read) in zip(recognizer.named_parameters(), loaded.named_parameters(), strict=True):
        assert not read.requires_grad
        torch.testing.assert_close(read, saved.detach(), rtol=2**-11, atol=2**-24, msg=name)


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 'tiny' or a folder"):
        load_recognizer("large")
    with pytest.raises(FileNotFoundError, match=r"train_recognizer\.py"):
        load_recognizer(tmp_path)
    save_recognizer(Recognizer(SPEC, Recognizer.Config(dim=8, hidden_dim=8, num_layers=1, voice_layer=1)), tmp_path)
    config = json.loads((tmp_path / "recognizer.json").read_text()) | {"alphabet": "abc"}
    (tmp_path / "recognizer.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="alphabet"):
        load_recognizer(tmp_path)


# The recipe


def toy_mels(recipe: ModuleType, lengths: tuple[int, ...] = (12, 20, 9)) -> Any:
    """Mels whose value in every band is the number of the frame in the row: 0, 1, 2, ..."""
    frames = torch.arange(sum(lengths), dtype=torch.float16)[:, None].repeat(1, 8)
    spans = [(sum(lengths[:index]), length) for index, length in enumerate(lengths)]
    return recipe.Mels(frames, spans, torch.ones(3, 4, dtype=torch.long), [4, 2, 3])


def test_tempo_is_interpolation_within_the_clip(recipe: ModuleType) -> None:
    augment = recipe.Augment(toy_mels(recipe), torch.Generator())
    mel = augment._at_rate(torch.tensor([12, 0]), torch.tensor([1.5, 0.5]), torch.tensor([13, 23]), 24)
    # Clip 1 begins at 12 and has 20 frames; frame t is 12 + 1.5 t, the last one is int(19 / 1.5) = 12: 12 + 18.
    assert mel[0, :, 0].tolist() == [12 + 1.5 * min(t, 12) for t in range(24)]
    assert mel[1, :, 3].tolist() == [0.5 * min(t, 22) for t in range(24)]


def test_batches_hold_every_clip_once_an_epoch(recipe: ModuleType) -> None:
    mels = toy_mels(recipe)
    stream = recipe.batches(mels, [0, 1, 2], 3, random.Random(0))
    taken = [next(stream) for _ in range(16)]
    rows = [row for batch in taken for row in batch.rows]
    assert sorted(rows) == [0] * 16 + [1] * 16 + [2] * 16
    for batch in taken:
        for row, rate, length in zip(batch.rows, batch.rates, batch.lengths, strict=True):
            assert (length - 1) * rate <= mels.spans[row][1] - 1 < length * rate


def test_moved_bands(recipe: ModuleType) -> None:
    augment = recipe.Augment(toy_mels(recipe), torch.Generator())
    # Three bands up: band 5 shows what band 2 held; the lowest bands repeat band 0.
    index = recipe.BAND_SHIFTS.index(3)
    assert augment.sources[index].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    assert augment.sources[recipe.BAND_SHIFTS.index(0)].tolist() == list(range(8))


def test_voice_loss_by_hand(recipe: ModuleType) -> None:
    # Cosines 1 and 0 to the two prototypes, margin 0.2: log(1 + exp(16 (0 - 0.8))).
    loss = recipe.voice_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-12.8)), abs=1e-7)
    wrong = recipe.voice_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([1]))
    assert wrong.item() == pytest.approx(19.2, abs=1e-4)


def test_voice_cosines_by_hand(recipe: ModuleType) -> None:
    embeddings = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    # a-a 0.6; a-b 0 and 0.8, each twice.
    assert recipe.voice_cosines(embeddings, ["a", "a", "b"]) == {"same_voice": 0.6, "two_voices": 0.4}


def test_the_recipe_learns_tones(tmp_path: Path, recipe: ModuleType) -> None:
    """Eight clips of letters as tones: 60 steps bring the loss from log(29) = 3.4 or more to half of that."""
    rows = []
    for index, text in enumerate(["abba", "baab", "cab", "abc", "bac", "cba", "acb", "bca"]):
        pitch = torch.tensor(["abc".index(letter) for letter in text]).repeat_interleave(2400)
        tone = 0.2 * torch.sin((0.1 + 0.15 * pitch).cumsum(0)) * torch.hann_window(2400).repeat(len(text))
        soundfile.write(tmp_path / f"{index}.wav", tone.numpy(), 24_000)
        row = {"id": str(index), "file": f"{index}.wav", "text": text, "voice": "ab"[index % 2]}
        rows.append(json.dumps(row | {"duration_s": len(tone) / 24_000}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    torch.manual_seed(0)
    recognizer = Recognizer(config=Recognizer.Config(dim=32, hidden_dim=64, num_layers=2, voice_layer=1))
    corpus = recipe.load_corpus(tmp_path, "cpu")
    trainer = recipe.Trainer(recognizer, corpus, SimpleNamespace(seed=0, voice_weight=0.1, lr=5e-3))
    stream = recipe.batches(trainer.mels, list(range(8)), 8, random.Random(0))
    losses = torch.stack([trainer.step(next(stream)) for _ in range(60)])[:, 0]
    assert losses[0] > 3 and losses[-10:].mean() < 1.5


@pytest.fixture
def tiny() -> Recognizer:
    return load_recognizer("tiny")


def test_tiny_item_in_a_batch_equals_the_item_alone(tiny: Recognizer) -> None:
    mel = torch.randn(2, 100, 100, generator=torch.Generator().manual_seed(0)) * 2 - 5
    log_probs, voices, _ = tiny.listen(mel, torch.tensor([100, 61]))
    alone, voice, _ = tiny.listen(mel[1:, :61], torch.tensor([61]))
    torch.testing.assert_close(log_probs[1, :31], alone[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(voices[1], voice[0], atol=1e-5, rtol=0)


def test_tiny_hears_nothing_in_silence(tiny: Recognizer) -> None:
    silence = torch.full((1, 100, 100), math.log(1e-5))
    assert len(tiny.transcribe(silence, torch.tensor([100]))[0]) <= 2
    assert set(tiny.transcribe(silence, torch.tensor([100]))[0]) <= set(ALPHABET)
