"""Matcha-TTS as a policy: its own synthesise, finite differences, groups; the real package where it is installed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_matcha
import torch
from tiny_matcha import SPEC, to_ids
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_mel.adapters.matcha import MATCHA_MEL, MatchaPolicy, alignment
from rlhf_mel.flow.policy import Policy, rollout
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.speech.audio import log_mel
from rlhf_mel.types import Prompts

TEXTS = ["a bad cab", "fig", "a decade"]


def matcha_model(n_spks: int = 1) -> Any:
    pytest.importorskip("matcha")
    return tiny_matcha.matcha_model(n_spks)


def policy(n_spks: int = 1) -> MatchaPolicy:
    return MatchaPolicy(matcha_model(n_spks), to_ids, temperature=0.7, mel_spec=SPEC)


def prompts(texts: list[str] = TEXTS, **changes: Any) -> Prompts:
    """Matcha takes no reference; the audio is there because a prompt has one."""
    count = len(texts)
    audio = torch.zeros(count, 100)
    return Prompts(texts, audio, torch.full((count,), 100), [""] * count, 22_050, **changes)


def synthesise(model: Any, text: str, noise: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tensor:
    """Matcha's own inference with given noise [1, T, M]; log mel [T, M]."""
    monkeypatch.setattr(torch, "randn_like", lambda like: noise.transpose(1, 2).to(like))
    ids = torch.tensor([to_ids(text)])
    return model.eval().synthesise(ids, torch.tensor([ids.shape[1]]), **options)["mel"][0].T


@pytest.mark.parametrize("n_spks", [1, 3])
def test_a_rollout_is_what_synthesise_says(n_spks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = policy(n_spks)
    speakers = [2, 0, 1]
    columns = {"speaker": speakers} if n_spks > 1 else {}
    batch = prompts(columns=columns)
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    said = rollout(flow, batch, steps=5, sway_sampling_coef=None, grad_steps=0, generator=generators)
    for row, text in enumerate(TEXTS):
        alone = flow.encode(batch.select([row]))
        noise = flow.prior(alone, [torch.Generator().manual_seed(row)]) / 0.7
        spks = torch.tensor([speakers[row]]) if n_spks > 1 else None
        theirs = synthesise(flow.model, text, noise, monkeypatch, n_timesteps=5, temperature=0.7, spks=spks)
        length = int(said.lengths_frames[row])
        assert theirs.shape == (length, 8) and length > 4
        assert_close(said.mel[row, :length], theirs, rtol=1e-4, atol=1e-4)


def test_it_is_a_policy_and_its_mels_are_matcha_s() -> None:
    flow = policy()
    assert isinstance(flow, Policy)
    from matcha.utils.audio import mel_spectrogram

    waveform = 0.3 * torch.randn(1, 22_050, generator=torch.Generator().manual_seed(0))
    theirs = mel_spectrogram(waveform, 1024, 80, 22_050, 256, 1024, 0, 8000)
    assert_close(log_mel(waveform, MATCHA_MEL), theirs.mT, atol=2e-4, rtol=1e-4)


def test_gradient_agrees_with_finite_differences() -> None:
    """Central differences in float64 along the gradient and a random direction; durations are whole and constant."""
    flow = policy().double().eval()
    batch = prompts(durations_frames=torch.tensor([20, 13, 20]))

    def loss() -> Tensor:
        steps = None if torch.is_grad_enabled() else 0
        mel = rollout(flow, batch, steps=3, grad_steps=steps, generator=torch.Generator().manual_seed(0)).mel
        return (mel * torch.linspace(0.5, 1.5, mel.numel(), dtype=mel.dtype).view_as(mel)).square().mean()

    value = loss()
    value.backward()
    generator, step, checked = torch.Generator().manual_seed(3), 1e-5, 0
    for name, parameter in flow.named_parameters():
        if parameter.grad is None or parameter.grad.norm() < 1e-9:
            # rounding to whole frames stops the gradient of durations, and normed keys have no constant part
            assert "proj_w" in name or name.endswith(".bias"), name
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction = parameter.grad / parameter.grad.norm() + noise / noise.norm()
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        expected = float((parameter.grad * direction).sum())
        assert float(above - below) / (2 * step) == pytest.approx(expected, rel=1e-5), name
        checked += 1
    assert checked > 50


def test_the_reference_policy_is_a_copy() -> None:
    flow = policy()
    reference = ReferencePolicy(flow)
    copied = copy.deepcopy(flow)
    with torch.no_grad():
        flow.model.decoder.estimator.final_proj.bias += 1.0
    options: dict[str, Any] = dict(steps=2, grad_steps=0)
    before = reference.rollout(prompts(), **options, generator=torch.Generator().manual_seed(0)).mel
    kept = rollout(copied, prompts(), **options, generator=torch.Generator().manual_seed(0)).mel
    moved = rollout(flow, prompts(), **options, generator=torch.Generator().manual_seed(0)).mel
    assert_close(before, kept)
    assert (moved - kept).abs().max() > 0.1


def test_durations_do_not_depend_on_the_mode() -> None:
    flow = policy().train()
    assert torch.equal(flow.durations(prompts()), flow.durations(prompts()))
    assert all(module.training for module in flow.modules())
    assert flow.durations(prompts(durations_frames=torch.tensor([5, 6, 7]))).tolist() == [5, 6, 7]


def test_a_row_s_duration_is_that_of_the_speech_alone() -> None:
    flow = policy()
    asked = prompts(generated_frames=torch.tensor([20, 13, 20]))
    spoken = rollout(flow, asked, steps=2, grad_steps=0, generator=torch.Generator().manual_seed(0))
    assert spoken.lengths_frames.tolist() == [20, 13, 20]  # and not as much more as the clip has


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected a column 'speaker' \(0 to 2\)"):
        policy(3).durations(prompts())
    with pytest.raises(ValueError, match=r"expected prompts of one duration, got \[5, 6, 7\]"):
        policy().encode(prompts(durations_frames=torch.tensor([5, 6, 7])))
    with pytest.raises(ValueError, match="expected a model of 80 bands, as mel_spec says, got 8"):
        MatchaPolicy(matcha_model(), to_ids)


# Without the package.


def test_tokens_are_held_for_their_frames_and_stretched_alike() -> None:
    held = alignment(torch.tensor([[2.0, 1.0, 3.0]]), torch.tensor([6]), 8).int()
    assert held[0].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]
    # 3 frames in place of 6: ends at 1, 1.5 -> 2, 3
    stretched = alignment(torch.tensor([[2.0, 1.0, 3.0]]), torch.tensor([3]), 4).int()
    assert stretched[0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


class Stub(nn.Module):
    """As much of Matcha as decides layout and scale: the estimator gives the channels' numbers."""

    n_feats, n_spks = 8, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("mel_mean", torch.tensor(-5.0))
        self.register_buffer("mel_std", torch.tensor(2.0))
        self.decoder = nn.Module()
        self.decoder.estimator = lambda x, mask, mu, t, spks: mask * torch.arange(8.0)[:, None] * self.weight[:, None]

    def encoder(self, ids: Tensor, lengths: Tensor, speakers: None) -> tuple[Tensor, Tensor, Tensor]:
        mask = torch.ones(len(ids), 1, ids.shape[1])
        return torch.zeros(len(ids), 8, ids.shape[1]), torch.zeros_like(mask), mask


def test_channels_become_frames_and_normalisation_is_undone() -> None:
    """x_1 = x_0 + channel, x_0 = 0 at temperature 0; log mel = 2 channel - 5; a letter is two frames (blank first)."""
    flow = MatchaPolicy(Stub(), to_ids, temperature=0.0, mel_spec=SPEC)
    said = rollout(flow, prompts(["abc"]), steps=4)
    assert said.lengths_frames.tolist() == [6]
    assert_close(said.mel[0], (2 * torch.arange(8.0) - 5).expand(6, -1))
    said.mel.sum().backward()
    assert_close(flow.model.weight.grad, 6 * 2 * torch.arange(8.0))
