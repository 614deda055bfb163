"""The judges on sounds whose measures are known, the evaluation's seeds, batches, rewards and voices."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from problems import tiny_policy, tiny_prompts
from torch import Tensor

from rlhf_mel.evaluation.evaluate import EvaluationResult, evaluate, voices_of
from rlhf_mel.flow.noise import item_generator
from rlhf_mel.flow.policy import rollout
from rlhf_mel.pipeline import Sampling, vocode
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.audio import MelSpec, log_mel, resample
from rlhf_mel.speech.measures import character_error_rates, dnsmos, reference_mels, signal, voice_similarity
from rlhf_mel.speech.recognizer import Recognizer
from rlhf_mel.types import Audio, Prompts, Rollout

RATE_HZ = 24_000


def as_audio(*clips: Tensor, rate_hz: int = RATE_HZ) -> Audio:
    lengths = torch.tensor([len(clip) for clip in clips])
    mel, frames = torch.zeros(len(clips), 1, 1), torch.ones(len(clips), dtype=torch.long)
    return Audio(torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True), lengths, rate_hz, mel, frames)


def tone(frequency_hz: float, duration_s: float, amplitude: float = 0.5) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * frequency_hz * torch.arange(int(duration_s * RATE_HZ)) / RATE_HZ)


def noise(duration_s: float, deviation: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return deviation * torch.randn(int(duration_s * RATE_HZ), generator=generator)


class TestSignal:
    def test_a_tone_and_trailing_silence(self) -> None:
        # 50 frames of a tone of amplitude 1/2, then 25 frames 74 dB below it.
        measured = signal(as_audio(torch.cat([tone(200, 1.0), noise(0.5, 1e-4 / math.sqrt(2))])))
        assert measured["silence_ratio"].item() == pytest.approx(25 / 75)
        assert measured["duration_s"].item() == pytest.approx(1.0)
        # 20 log10(1/2) - 3.0103: the silence does not lower the level of the speech.
        assert measured["level_dbfs"].item() == pytest.approx(-6.0206 - 3.0103, abs=1e-3)
        assert measured["f0_std_semitones"].item() == pytest.approx(0, abs=0.05)
        assert measured["clipping_ratio"].item() == 0

    def test_a_full_scale_sine_is_3_db_below_its_peak(self) -> None:
        assert signal(as_audio(tone(100, 0.5, 1.0)))["level_dbfs"].item() == pytest.approx(-3.0103, abs=1e-3)

    def test_quiet_is_relative_to_the_clip_and_40_db(self) -> None:
        # 40 dB in amplitude is 1/100: a second part 39 dB down is speech, 41 dB down is silence.
        for drop_db, expected in ((39, 0.0), (41, 0.5)):
            for gain in (1.0, 0.5):
                clip = torch.cat([tone(200, 0.5, 0.8), tone(200, 0.5, 0.8 * 10 ** (-drop_db / 20))])
                assert signal(as_audio(gain * clip))["silence_ratio"].item() == pytest.approx(expected)

    def test_a_click_does_not_make_the_rest_silent(self) -> None:
        clip = tone(200, 1.0, 0.003)
        clip[12_000:12_048] = 1.0  # 43 dB above the tone's frames: by the loudest frame, 49 of 50 would be silent
        assert signal(as_audio(clip))["silence_ratio"].item() == 0

    def test_nothing_but_a_click_is_silence(self) -> None:
        clip = noise(1.0, 1e-5)  # -100 dBFS: without the absolute limit this would be a second of speech
        clip[12_000] = 1.0
        measured = signal(as_audio(clip))
        assert measured["silence_ratio"].item() == pytest.approx(49 / 50)
        assert measured["duration_s"].item() == pytest.approx(0.02)

    def test_digital_silence(self) -> None:
        measured = signal(as_audio(torch.zeros(RATE_HZ)))
        assert measured["silence_ratio"].item() == 1 and measured["duration_s"].item() == 0
        assert measured["level_dbfs"].item() == pytest.approx(-200)
        assert math.isnan(measured["f0_std_semitones"].item())

    def test_pitch_spread_by_hand(self) -> None:
        # Half the time 150 Hz, half 200 Hz: 12 log2(4/3) = 4.98 semitones apart, deviation half of that.
        spread = signal(as_audio(torch.cat([tone(150, 1.0), tone(200, 1.0)])))["f0_std_semitones"].item()
        assert spread == pytest.approx(6 * math.log2(4 / 3), abs=0.1)

    def test_clipping_counts_samples_at_full_scale(self) -> None:
        clip = tone(200, 1.0)
        clip[:240] = torch.tensor([1.0, -1.0]).repeat(120)
        assert signal(as_audio(clip))["clipping_ratio"].item() == pytest.approx(0.01)

    def test_padding_does_not_count(self) -> None:
        long, short = tone(200, 1.0), torch.cat([tone(150, 0.3), torch.zeros(2_400)])
        together, alone = signal(as_audio(long, short)), signal(as_audio(short))
        assert {name: values[1].item() for name, values in together.items()} == {
            name: values[0].item() for name, values in alone.items()
        }

    def test_shorter_than_a_frame(self) -> None:
        with pytest.raises(ValueError, match="at least 480 samples"):
            signal(as_audio(torch.zeros(479)))


class TestDnsmos:
    # 1 s: doubled to 16 s, of which the package hears 8 windows; 9.01 s: one window; 11.5 s: windows at 0, 1 and 2 s
    @pytest.mark.parametrize("duration_s", [1.0, 4.6, 9.01, 11.5])
    def test_equals_the_package(self, duration_s: float) -> None:
        from speechmos import dnsmos as package

        generator = torch.Generator().manual_seed(0)
        seconds = torch.arange(int(duration_s * 16_000)) / 16_000
        clip = 0.5 * torch.sin(400 * math.pi * seconds) * seconds.sin() + 0.01 * torch.randn(
            len(seconds), generator=generator
        )
        expected = package.run(clip.numpy(), 16_000)
        measured = dnsmos(as_audio(clip, rate_hz=16_000))
        # float32 of a network whose scores are near 3: another order of its sums moves them by some 1e-6
        for name in ("ovrl", "sig", "bak"):
            assert measured[f"dnsmos_{name}"].item() == pytest.approx(expected[f"{name}_mos"], abs=1e-4)

    def test_clamps_what_the_package_refuses(self) -> None:
        loud = 1.5 * noise(1.0, 0.5)[:16_000]
        clamped, raw = (dnsmos(as_audio(clip, rate_hz=16_000)) for clip in (loud.clamp(-1, 1), loud))
        assert raw["dnsmos_ovrl"].item() == clamped["dnsmos_ovrl"].item()

    def test_resamples_and_ignores_padding(self) -> None:
        # A band-limited sound scores the same at both rates; a batch as its items alone.
        low = tone(200, 0.6) + tone(700, 0.6, 0.1)
        together = dnsmos(as_audio(tone(300, 0.8), low))["dnsmos_ovrl"][1].item()
        assert together == pytest.approx(dnsmos(as_audio(low))["dnsmos_ovrl"].item(), abs=1e-5)
        at_16_khz = resample(low[None], RATE_HZ, 16_000)[0]
        assert together == pytest.approx(dnsmos(as_audio(at_16_khz, rate_hz=16_000))["dnsmos_ovrl"].item(), abs=1e-5)

    @pytest.mark.parametrize("clip", [torch.zeros(0), torch.full((480,), math.nan)])
    def test_refuses_what_the_package_cannot_judge(self, clip: Tensor) -> None:
        with pytest.raises(ValueError, match="expected a finite waveform"):
            dnsmos(as_audio(clip))


def test_character_error_rates_by_hand() -> None:
    # "the cat" (7 letters): "teh cat" is two substitutions, "the" four deletions; "a" for "ab" and four insertions.
    rates = character_error_rates(["The cat!", "the cat", "ab", "It's"], ["teh cat", "the", "abcdef", "it's"])
    assert rates == pytest.approx([2 / 7, 4 / 7, 4 / 2, 0])


class Listener(Recognizer):
    """In place of a recognizer: the voice is the mean of two mel channels, the transcript is fixed."""

    def __init__(self, mel_spec: MelSpec, transcript: str = "a fig") -> None:
        super().__init__(mel_spec, Recognizer.Config(dim=1, hidden_dim=1, num_layers=1, voice_layer=1))
        self.transcript = transcript

    def transcribe(self, mel: Tensor, lengths_frames: Tensor) -> list[str]:
        return [self.transcript] * len(mel)

    def voice_embedding(self, mel: Tensor, lengths_frames: Tensor) -> Tensor:
        means = torch.stack([item[:length, :2].mean(0) for item, length in zip(mel, lengths_frames, strict=True)])
        return means / means.norm(dim=-1, keepdim=True)


def test_voice_similarity_by_hand() -> None:
    spec = MelSpec(n_mels=8, n_fft=256, hop_length=64, win_length=256)
    listener, prompts = Listener(spec), tiny_prompts()
    mel = torch.zeros(3, 4, 8)
    mel[:, :, 0] = 1.0  # the generated voice is (1, 0): the cosine is the first coordinate of the other
    heard = replace(as_audio(*torch.zeros(3, 500)), mel=mel, lengths_frames=torch.tensor([4, 4, 4]))
    expected = []
    for clip, length in zip(prompts.reference_audio, prompts.reference_lengths_samples, strict=True):
        mean = log_mel(clip[None, :length], spec)[0, :, :2].mean(0)
        expected.append((mean[0] / mean.norm()).item())
    assert voice_similarity(listener, heard, prompts).tolist() == pytest.approx(expected, abs=1e-6)


def test_reference_mels_are_those_of_the_clips_alone() -> None:
    spec = MelSpec(n_mels=8, n_fft=256, hop_length=64, win_length=256)
    prompts = tiny_prompts()
    mel, lengths_frames = reference_mels(prompts, spec)
    assert lengths_frames.tolist() == [13, 9, 13]  # 800 // 64 + 1, 560 // 64 + 1
    torch.testing.assert_close(mel[1, :9], log_mel(prompts.reference_audio[1:2, :560], spec)[0])
    half = reference_mels(replace(prompts, sample_rate_hz=12_000), spec)[1]
    assert half.tolist() == [26, 18, 26]  # at 12 kHz the clips are twice as long: 1,600 // 64 + 1, 1,120 // 64 + 1


class Hum:
    """A vocoder: the mean of each frame, held for a hop, in a band that rewards can read back."""

    differentiable = True
    mel_spec = MelSpec(n_mels=8, n_fft=256, hop_length=64, win_length=256)
    sample_rate_hz = 24_000

    def __call__(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
        return torch.tanh(mel.mean(-1)).repeat_interleave(64, dim=1)[:, 64:]


def first_sample(completions: list[np.ndarray]) -> list[float | None]:
    return [float(waveform[0]) for waveform in completions]


def loudness(audio: Audio) -> dict[str, Tensor]:
    return {"loudness": audio.waveform.abs().sum(1) / audio.lengths_samples}


def listen(prompts: Prompts, **options: Any) -> EvaluationResult:
    policy = options.pop("policy", None) or tiny_policy()
    options = {"sampling": Sampling(steps=3), "judges": [loudness], **options}
    return evaluate(policy, Hum(), Rewards([first_sample], [2.0]), prompts, **options)


def test_evaluate_means_and_names_by_hand() -> None:
    result = listen(tiny_prompts(), recognizer=Listener(Hum.mel_spec))
    lengths = [len(waveform) for waveform in result.waveforms]
    assert lengths == [16 * 64, 14 * 64, 16 * 64]  # (30 - 13 - 1) and (24 - 9 - 1) hops
    firsts = [waveform[0].item() for waveform in result.waveforms]
    loud = [waveform.abs().mean().item() for waveform in result.waveforms]
    assert result.metrics == pytest.approx(
        {
            "reward": 2 * np.mean(firsts),
            "reward_std": 2 * np.std(firsts, ddof=1),
            "rewards/first_sample/mean": np.mean(firsts),
            "rewards/first_sample/std": np.std(firsts, ddof=1),
            "loudness": np.mean(loud),
            # by hand in test_character_error_rates_by_hand
            "cer": np.mean(character_error_rates(["bad cab", "a fig", "decade"], ["a fig"] * 3)),
            "voice_similarity": np.mean(result.measures["voice_similarity"]),
            "dropped_rollouts": 0,
        },
        abs=1e-6,
    )
    assert result.items[1]["rewards/first_sample"] == pytest.approx(firsts[1])
    assert result.transcripts == ["a fig"] * 3
    json.dumps(result.metrics)


def test_noise_depends_on_seed_and_row_alone() -> None:
    prompts = tiny_prompts()
    whole, single = listen(prompts), listen(prompts, batch_size=1)
    for one, other in zip(whole.waveforms, single.waveforms, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert not torch.allclose(listen(prompts, seed=1).waveforms[0], whole.waveforms[0], atol=1e-3)
    same = listen(prompts.select([0, 0]))
    assert not torch.allclose(same.waveforms[0], same.waveforms[1], atol=1e-3)  # one prompt, two rows, two noises
    draws = {item_generator(seed, row).initial_seed() for seed in range(4) for row in range(4)}
    assert len(draws) == 16


def test_evaluate_speaks_with_the_solver_it_is_given() -> None:
    prompts, policy = tiny_prompts(), tiny_policy()
    heard = listen(prompts, policy=policy, sampling=Sampling(steps=3, method="midpoint")).waveforms
    generators = [item_generator(0, row) for row in range(len(prompts))]
    spoken = rollout(policy, prompts, steps=3, method="midpoint", grad_steps=0, generator=generators)
    by_hand = vocode(Hum(), spoken).waveform
    for row, waveform in enumerate(heard):
        torch.testing.assert_close(waveform, by_hand[row, : len(waveform)], atol=1e-6, rtol=0)
    assert not torch.allclose(listen(prompts, policy=policy).waveforms[0], heard[0], atol=1e-4)


def test_evaluate_leaves_no_trace() -> None:
    policy = tiny_policy().train()
    state = torch.get_rng_state()
    listen(tiny_prompts(), policy=policy)
    assert torch.equal(torch.get_rng_state(), state)
    assert policy.training and all(parameter.grad is None for parameter in policy.parameters())


def test_a_dropped_reward_is_counted() -> None:
    def sometimes(completions: list[np.ndarray]) -> list[float | None]:
        return [math.nan, 1.0, 3.0]

    result = evaluate(tiny_policy(), Hum(), Rewards([sometimes]), tiny_prompts(), sampling=Sampling(steps=2), judges=[])
    assert result.metrics["dropped_rollouts"] == 1 and result.metrics["reward"] == 2.0


def test_evaluate_refuses_a_recognizer_of_other_mels() -> None:
    with pytest.raises(ValueError, match="recognizer of the vocoder's mels"):
        listen(tiny_prompts(), recognizer=Listener(MelSpec()))


class TestSound:
    def test_lengths_and_padding(self) -> None:
        class Long(Hum):
            def __call__(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
                return torch.ones(len(mel), mel.shape[1] * 64)

        rollout = Rollout(torch.zeros(2, 5, 8), torch.tensor([5, 3]))
        audio = vocode(Long(), rollout)
        assert audio.lengths_samples.tolist() == [4 * 64, 2 * 64]
        assert audio.waveform.sum(1).tolist() == [4 * 64, 2 * 64]  # ones, then zeros
        assert audio.sample_rate_hz == 24_000 and audio.mel is rollout.mel

    def test_a_vocoder_that_makes_too_little(self) -> None:
        short = SimpleNamespace(mel_spec=Hum.mel_spec, sample_rate_hz=1)
        with pytest.raises((ValueError, TypeError)):
            vocode(short, Rollout(torch.zeros(1, 5, 8), torch.tensor([5])))

        class Short(Hum):
            def __call__(self, mel: Tensor, lengths_frames: Tensor | None = None) -> Tensor:
                return torch.zeros(len(mel), 100)

        with pytest.raises(ValueError, match=r"expected a waveform \[1, 256 samples\] for 5 frames, got \(1, 100\)"):
            vocode(Short(), Rollout(torch.zeros(1, 5, 8), torch.tensor([5])))

    def test_the_gradient_reaches_the_mel(self) -> None:
        mel = torch.zeros(1, 5, 8, requires_grad=True)
        vocode(Hum(), Rollout(mel, torch.tensor([5]))).waveform.sum().backward()
        # Each of 4 hops has 64 samples of tanh(mean of 8 channels): d/d channel = 64 / 8 = 8; frame 0 is cut.
        assert mel.grad[0, :, 0].tolist() == [0, 8, 8, 8, 8]


def test_voices_are_those_of_the_column_or_of_the_clips() -> None:
    clips = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 9.0], [3.0, 4.0, 0.0]])
    prompts = Prompts(["a", "b", "c"], clips, torch.tensor([2, 2, 2]), ["", "", ""])
    first, second, third = voices_of(prompts)
    assert first == second != third  # padding is no part of a clip
    named = replace(prompts, columns={"voice": ["joe", None, "joe"]})
    assert voices_of(named) == ["joe", second, "joe"]


def test_a_policy_of_few_voices_was_heard_in_all_of_them_or_not() -> None:
    policy, prompts = tiny_policy(), tiny_prompts()
    named = replace(prompts, columns={**prompts.columns, "voice": ["a", "b", "a"]})
    assert not listen(named, policy=policy).closed
    policy.voices = ("a", "b")
    assert listen(named, policy=policy).closed and not listen(named.select([0]), policy=policy).closed


def test_a_reward_that_needs_a_text_is_asked_before_anything_is_said() -> None:
    class Reading:
        name, differentiable, domain, sample_rate_hz = "reading", False, "mel", None
        needs = frozenset({"text"})
        range = (0.0, 1.0)

        def score(self, audio: Audio, prompts: Prompts) -> Tensor:
            raise AssertionError("never heard")

    silent = replace(tiny_prompts(), texts=["bad cab", " ", "decade"])
    with pytest.raises(ValueError, match="reward 'reading' needs the text of every prompt"):
        evaluate(tiny_policy(), Hum(), Rewards([Reading()]), silent)
