"""Intelligibility: the sum over all alignments, finite differences, a batch against its items, rows without a score."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reward_models.intelligibility import Intelligibility
from rlhf_mel.data.prompts import load_prompts
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.recognizer import ALPHABET
from rlhf_mel.types import Audio, Prompts

pytestmark = pytest.mark.rounding


def as_audio(mels: list[Tensor]) -> Audio:
    """Mels as sounds; the waveform is not listened to."""
    lengths = torch.tensor([len(mel) for mel in mels])
    silence = torch.zeros(len(mels), 256)
    mel = torch.nn.utils.rnn.pad_sequence(mels, batch_first=True)
    return Audio(silence, torch.full((len(mels),), 256), 24_000, mel, lengths)


def asking_for(*texts: str) -> Prompts:
    return Prompts(list(texts), torch.zeros(len(texts), 1), torch.ones(len(texts), dtype=torch.long), list(texts))


def noise_mel(frames: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(frames, 100, generator=torch.Generator().manual_seed(seed)) - 4


@pytest.fixture(scope="module")
def reward() -> Intelligibility:
    return Intelligibility()


@pytest.mark.parametrize("text", ["a", "No", "oo"])
def test_equals_the_sum_over_all_alignments(reward: Intelligibility, text: str) -> None:
    # Ten mel frames are five of the recognizer's. Every path of the text's letters and blanks, merged as CTC does.
    mel = noise_mel(10)
    with torch.no_grad():
        probs = reward.recognizer(mel[None], torch.tensor([10]))[0][0].exp().double()
    letters = [ALPHABET.index(letter) + 1 for letter in text.lower()]
    total = 0.0
    for path in itertools.product(sorted({0, *letters}), repeat=5):
        merged = [k for k, _ in itertools.groupby(path)]
        if [k for k in merged if k] == letters:
            total += math.prod(probs[t, k].item() for t, k in enumerate(path))
    score = reward.score(as_audio([mel]), asking_for(text))
    assert score.item() == pytest.approx(math.log(total) / len(text), rel=1e-5)


def test_a_sentence_scores_as_torch_counts(reward: Intelligibility) -> None:
    # torch divides by the target's length itself with reduction="mean" over a batch of one.
    mel, said = noise_mel(120, seed=1), "It's so."
    log_probs, lengths = reward.recognizer(mel[None], torch.tensor([120]))
    targets = torch.tensor([[ALPHABET.index(letter) + 1 for letter in "it's so"]])
    expected = -F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, torch.tensor([7])).item()
    assert reward.score(as_audio([mel]), asking_for(said)).item() == pytest.approx(expected, rel=1e-5)


def test_a_voice_is_understood_by_its_own_words_only() -> None:
    # A reference clip of the bundled prompts, which the recognizer transcribes nearly without error.
    from rlhf_mel.speech.measures import reference_mels

    rewards, prompts = Rewards(["intelligibility"]), load_prompts("tiny", split="heldout")
    batch = prompts.collate([prompts[0]])
    mels, lengths = reference_mels(batch, rewards.models[0].recognizer.mel_spec)  # type: ignore[attr-defined]
    heard = as_audio([mels[0, : int(lengths[0])]])
    own, other = (rewards(heard, asking_for(text)).total.item() for text in (batch.reference_texts[0], batch.texts[0]))
    assert -0.3 < own <= 0 and other < -2


def test_gradient_equals_central_differences() -> None:
    # In float64 with h = 1e-6: the error is h^2 times a third derivative of order one, and 1e-16 / h = 1e-10.
    reward = Intelligibility().double()
    mel, asked = noise_mel(40).double(), asking_for("hello")
    leaf = mel.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(as_audio([leaf]), asked).sum(), leaf)
    generator = torch.Generator().manual_seed(0)
    for direction in (torch.randn(mel.shape, generator=generator, dtype=torch.float64), gradient):
        step = 1e-6 * direction / direction.norm()
        up, down = (reward.score(as_audio([mel + sign * step]), asked).item() for sign in (1, -1))
        assert (gradient * direction).sum().item() / direction.norm().item() == pytest.approx(
            (up - down) / 2e-6, rel=1e-6, abs=1e-8
        )
    assert gradient.norm() > 0.01  # the comparison is of numbers, not of zeros


def test_batch_equals_single_and_padding_does_not_count(reward: Intelligibility) -> None:
    mels, texts = [noise_mel(80), noise_mel(51, seed=1), noise_mel(20, seed=2)], ["Hello there.", "No!", "Ah"]
    alone = torch.cat([reward.score(as_audio([mel]), asking_for(text)) for mel, text in zip(mels, texts, strict=True)])
    both = as_audio(mels)
    both.mel[1, 51:], both.mel[2, 20:] = math.nan, 5.0  # what lies beyond is never heard
    torch.testing.assert_close(reward.score(both, asking_for(*texts)), alone, atol=1e-5, rtol=1e-5)


def test_a_text_longer_than_its_sound_leaves_the_row_without_a_reward() -> None:
    # "aa" needs a blank in between: three frames of the recognizer, so five of the mel; "ab" two, so three of the mel.
    rewards = Rewards(["intelligibility"])
    leaf = noise_mel(4).requires_grad_()
    scores = rewards(as_audio([leaf, noise_mel(4), noise_mel(5)]), asking_for("aa", "ab", "aa"))
    own = scores.breakdown["intelligibility"][0]
    assert own.item() == -math.inf and scores.total[0].isnan()
    assert scores.total[1:].isfinite().all()
    (gradient,) = torch.autograd.grad(own, leaf)
    assert not gradient.any()


def test_it_stays_in_evaluation_mode(reward: Intelligibility) -> None:
    assert not reward.train().recognizer.training and not any(p.requires_grad for p in reward.parameters())


def test_mels_of_another_kind_are_refused(reward: Intelligibility) -> None:
    with pytest.raises(ValueError, match="expected mels of 100 channels, got 80"):
        reward.score(as_audio([noise_mel(10)[:, :80]]), asking_for("a"))


def test_a_recognizer_in_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train_recognizer"):
        Intelligibility(Intelligibility.Config(recognizer=tmp_path))
