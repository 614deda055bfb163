"""Rollouts: each item what it would be alone, with exact gradients; reference policies and LoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from problems import (
    AVERAGE,
    MEL,
    TINY_MMDIT,
    TINY_UNETT,
    V0,
    V1,
    VOCABULARY,
    LinearGaussianFlow,
    reinitialise,
    tiny_cfm,
    tiny_policy,
    tiny_prompts,
)
from torch import Tensor
from torch.testing import assert_close

from rlhf_mel.f5.backbones.mmdit import MMDiT
from rlhf_mel.f5.backbones.unett import UNetT
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.flow.lora import add_lora
from rlhf_mel.flow.noise import item_generators
from rlhf_mel.flow.ode import timesteps
from rlhf_mel.flow.policy import rollout, rows_together
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.speech.text import CharTokenizer, load_tokenizer
from rlhf_mel.types import Prompts, Rollout

pytestmark = pytest.mark.rounding

REFERENCE_FRAMES = [13, 9, 13]


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + item) for item in range(count)]


def speak(policy: Any, prompts: Prompts | None = None, **options: Any) -> Rollout:
    prompts = tiny_prompts() if prompts is None else prompts
    return rollout(policy, prompts, **{"steps": 3, "generator": generators(len(prompts)), **options})


def gradients(policy: CFM, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    policy.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


# One item is what it is alone.


def small_policy(backbone: str, flags: dict) -> CFM:
    """A policy of random weights that read prompts, on any backbone, in float64."""
    if backbone == "DiT":
        return tiny_policy(flags).double()
    build, sizes = {"UNetT": (UNetT, TINY_UNETT), "MMDiT": (MMDiT, TINY_MMDIT)}[backbone]
    network = build(**{**sizes, **flags})
    reinitialise(network)
    options = dict(mel_spec_kwargs=MEL, vocab_char_map=dict(VOCABULARY), tokenizer=load_tokenizer("char"))
    return CFM(network, **options).double()


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize(
    ("backbone", "flags"),
    [
        ("DiT", V1),
        ("DiT", V0),
        ("DiT", {**V1, **AVERAGE}),
        ("DiT", {**V1, "attn_mask_enabled": True}),
        ("UNetT", {}),
        ("UNetT", {"conv_layers": 2, "text_mask_padding": False}),
        ("MMDiT", {}),
        ("MMDiT", {"text_mask_padding": False}),
    ],
    ids=str,
)
def test_a_batch_gives_each_item_what_it_gives_alone(backbone: str, flags: dict, guidance: float) -> None:
    """Values and gradients, for unequal references, texts and durations, all solved together."""
    policy, prompts = small_policy(backbone, flags), tiny_prompts()
    policy.mix_durations = True
    assert len(rows_together(policy, prompts)) == 1
    say = partial(speak, cfg_strength=guidance)
    together = say(policy)
    assert together.lengths_frames.tolist() == [17, 15, 17]
    assert together.mel.shape == (3, 17, 8) and together.mel[1, 15:].abs().max() == 0
    summed = gradients(policy, lambda: say(policy).mel.square().sum())
    alone: dict[str, Tensor] = {}
    for row in range(3):
        single = say(policy, prompts.select([row]), generator=[generators(3)[row]])
        length = int(together.lengths_frames[row])
        assert_close(together.mel[row, :length], single.mel[0], rtol=1e-12, atol=1e-12)

        def loss(row: int = row) -> Tensor:
            return say(policy, prompts.select([row]), generator=[generators(3)[row]]).mel.square().sum()

        for name, gradient in gradients(policy, loss).items():
            alone[name] = alone.get(name, 0) + gradient
    for name, gradient in summed.items():
        assert (gradient - alone[name]).norm() <= 1e-12 * gradient.norm(), name


def test_what_is_solved_together_has_little_padding() -> None:
    """Longest first, a frame of padding for five of speech: 10 for 170, but with 25 frames more 45 for 195."""
    frames = [22, 60, 50, 25, 60, 12]
    prompts = tiny_prompts().select([0, 1, 2, 0, 1, 2])
    prompts = replace(prompts, durations_frames=torch.tensor(frames))
    policy = tiny_policy()
    assert sorted(rows_together(policy, prompts)) == [[0], [1, 4], [2], [3], [5]]
    policy.mix_durations = True
    assert rows_together(policy, prompts) == [[1, 4, 2], [3, 0], [5]]
    assert sorted(rows_together(policy, prompts, "dopri5")) == [[0], [1, 4], [2], [3], [5]]
    assert sorted(rows_together(policy.speed_up(compiled=False), prompts)) == [[0], [1, 4], [2], [3], [5]]


def test_a_rollout_is_the_generated_part_of_a_sample() -> None:
    policy, prompts = tiny_policy(), tiny_prompts()
    spoken = speak(policy, cfg_strength=2.0, sway_sampling_coef=-1.0, grad_steps=0)
    for row, length in enumerate(prompts.reference_lengths_samples.tolist()):
        out, _ = policy.sample(
            prompts.reference_audio[row : row + 1, :length],
            [f"{prompts.reference_texts[row]} {prompts.texts[row]}"],
            int(prompts.durations_frames[row]),
            steps=3,
            cfg_strength=2.0,
            sway_sampling_coef=-1.0,
            generator=[generators(3)[row]],
        )
        generated = out[0, REFERENCE_FRAMES[row] :]
        assert_close(spoken.mel[row, : len(generated)], generated, rtol=1e-5, atol=1e-5)


def test_the_trajectory_runs_from_noise_to_the_mel() -> None:
    spoken = speak(tiny_policy(), return_trajectory=True)
    assert spoken.trajectory is not None and spoken.trajectory.shape == (4, 3, 30, 8)
    noise = torch.randn(24, 8, generator=generators(3)[1])
    assert torch.equal(spoken.trajectory[0, 1, :24], noise)
    assert spoken.trajectory[:, 1, 24:].abs().max() == 0
    assert torch.equal(spoken.trajectory[-1, 1, 9:24], spoken.mel[1, :15])
    assert speak(tiny_policy()).trajectory is None


class GaussianCondition(NamedTuple):
    generated: Tensor


class GaussianPolicy:
    """No module, no network: the flow of problems.py behind the protocol, 2 frames of it the reference's."""

    flow = LinearGaussianFlow()
    tokenizer = None
    voices: tuple[str, ...] = ()

    def durations(self, prompts: Prompts) -> Tensor:
        return torch.tensor([5, 4, 5])[: len(prompts)]

    def encode(self, prompts: Prompts, *, cfg_strength: float = 2.0) -> GaussianCondition:
        assert prompts.durations_frames is not None
        frames = int(prompts.durations_frames[0])
        return GaussianCondition((torch.arange(frames) >= 2).expand(len(prompts), -1))

    def prior(self, cond: GaussianCondition, generator: Any = None) -> Tensor:
        items = item_generators(generator, len(cond.generated)) or []
        return torch.stack([torch.randn(cond.generated.shape[1], 3, generator=item) for item in items])

    def velocity(self, x: Tensor, t: Tensor, cond: GaussianCondition) -> Tensor:
        return self.flow.velocity(x, t)

    def timesteps(self, steps: int, *, sway_sampling_coef: float | None = None) -> Tensor:
        return timesteps(steps, sway_sampling_coef=sway_sampling_coef)

    def finalize(self, x1: Tensor, cond: GaussianCondition) -> Tensor:
        return x1


def test_any_flow_behind_the_protocol_is_a_policy() -> None:
    """x_1 = mean + deviation x_0, so the numbers are known."""
    spoken = speak(GaussianPolicy(), steps=64, method="midpoint")
    assert spoken.lengths_frames.tolist() == [3, 2, 3]
    for row, frames in enumerate([5, 4, 5]):
        noise = torch.randn(frames, 3, generator=generators(3)[row])
        assert_close(spoken.mel[row, : frames - 2], 0.7 + 0.4 * noise[2:], rtol=1e-3, atol=1e-3)


# Noise.


def test_noise_differs_between_items_and_leaves_the_global_generator_alone() -> None:
    policy, prompts = tiny_policy(), tiny_prompts().select([0, 0, 1, 0])
    before = torch.get_rng_state()
    spoken = speak(policy, prompts, generator=torch.Generator().manual_seed(1), grad_steps=0)
    again = speak(policy, prompts, generator=torch.Generator().manual_seed(1), grad_steps=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(spoken.mel, again.mel)
    assert not torch.allclose(spoken.mel[0], spoken.mel[1], atol=0.1)
    assert not torch.allclose(spoken.mel[0], spoken.mel[3], atol=0.1)


def test_noise_of_an_item_does_not_depend_on_the_durations_of_others() -> None:
    """One generator seeds the items in the order of the prompts, before they are grouped."""
    policy, prompts = tiny_policy(), tiny_prompts()
    other = replace(prompts, durations_frames=torch.tensor([30, 30, 30]))
    spoken, regrouped = (
        speak(policy, batch, generator=torch.Generator().manual_seed(1), grad_steps=0) for batch in (prompts, other)
    )
    assert_close(spoken.mel[[0, 2]], regrouped.mel[[0, 2], :17], rtol=1e-5, atol=1e-5)


def test_successive_rollouts_of_one_generator_differ() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (speak(tiny_policy(), generator=generator, grad_steps=0) for _ in range(2))
    assert not torch.allclose(first.mel, second.mel, atol=0.1)


# Gradients and modes.


def test_a_silent_loss_of_gradients_raises() -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            with pytest.raises(RuntimeError, match=r"rollout: expected gradients .* pass grad_steps=0"):
                speak(tiny_policy())
            assert not speak(tiny_policy(), grad_steps=0).mel.requires_grad


@pytest.mark.parametrize(
    ("grad_steps", "has_gradient"), [(None, True), (1, True), ({0}, True), (0, False), ((), False)]
)
def test_gradients_flow_where_asked(grad_steps: Any, has_gradient: bool) -> None:
    assert speak(tiny_policy(), grad_steps=grad_steps).mel.requires_grad is has_gradient
    assert torch.is_grad_enabled()


def test_dropout_is_off_forward_and_backward_and_the_mode_comes_back() -> None:
    policy = tiny_policy().double().eval()
    expected = gradients(policy, lambda: speak(policy).mel.square().sum())
    policy.train()
    policy.transformer.proj_out.eval()  # a mixture of modes is kept as well

    def loss() -> Tensor:
        mel = speak(policy).mel
        assert policy.training and policy.transformer.training and not policy.transformer.proj_out.training
        return mel.square().sum()

    found = gradients(policy, loss)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_mode_and_grad_state_come_back_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy().train()

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(policy, "finalize", fail)
    for grad_steps in (None, 0):
        with pytest.raises(KeyboardInterrupt):
            speak(policy, grad_steps=grad_steps)
        assert torch.is_grad_enabled() and all(module.training for module in policy.modules())


# Prompts.


def test_duration_rule() -> None:
    """Frames of the reference times (1 + bytes of text / bytes of reference text), rounded down: 13 / 9 is 1."""
    prompts = tiny_prompts(
        durations_frames=None, texts=["bad cab", "a fig", "a"], reference_texts=["feed me", "jam", "abcd abcd"]
    )
    assert tiny_policy().durations(prompts).tolist() == [13 + 13, 9 + 15, 13 + 1]
    assert tiny_policy().durations(tiny_prompts()).tolist() == [30, 24, 30]
    asked = tiny_prompts(durations_frames=None, generated_frames=torch.tensor([17, 15, 20]))
    assert tiny_policy().durations(asked).tolist() == [13 + 17, 9 + 15, 13 + 20]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sample_rate_hz=16_000), "reference_audio: expected 24000 Hz, got 16000 Hz; resample"),
        (dict(texts=["bad", "caf?", "x"]), r"tokens outside the vocabulary: got \['\?', 'x'\]"),
        (dict(texts=["bad", " ", "a"]), r"^texts: expected words, got nothing to say in rows \[1\]"),
        (dict(reference_texts=["bad", "a", ""]), r"reference_texts: expected words, got nothing to say in rows \[2\]"),
        (dict(texts=["a" * 40, "b", "a"]), r"expected at least \[48, 10, 14\], .* got \[30, 24, 30\]; shorten"),
        (
            dict(durations_frames=torch.tensor([30, 9, 30])),
            r"expected at least \[15, 10, 14\], more than the reference .* got \[30, 9, 30\]",
        ),
        (dict(reference_lengths_samples=torch.tensor([800, 0, 800])), r"expected 256 .* to 800 .* got \[800, 0, 800\]"),
        (dict(reference_lengths_samples=torch.tensor([801, 800, 800])), r"expected 256 .* to 800 .* got \[801,"),
    ],
)
def test_bad_prompts_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speak(tiny_policy(), tiny_prompts(**changes))


def test_encode_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"one total duration after speed_up, got \[30, 24, 30\] .* policy.rollout"):
        tiny_policy().speed_up(compiled=False).encode(tiny_prompts())
    with pytest.raises(ValueError, match=r"expected a tokenizer to read prompts with, got none"):
        tiny_cfm().encode(tiny_prompts().select([0]))
    policy, prompts = tiny_policy(), tiny_prompts().select([0])
    with pytest.raises(ValueError, match=r"x: expected \[1, 30, 8\] as encoded, got \[1, 29, 8\]"):
        policy.velocity(torch.zeros(1, 29, 8), torch.tensor(0.5), policy.encode(prompts))


def test_one_time_an_item() -> None:
    """velocity(x, t [B], cond): what flow-matching losses call; each row is as at its own scalar time."""
    policy, prompts = tiny_policy().eval(), tiny_prompts().select([0, 2])
    cond, x, t = policy.encode(prompts), torch.ones(2, 30, 8), torch.tensor([0.2, 0.9])
    rows = [policy.velocity(x, time, cond)[row] for row, time in enumerate(t)]
    assert_close(policy.velocity(x, t, cond), torch.stack(rows), rtol=1e-5, atol=1e-5)


# Reference policies and LoRA.


def velocities(policy: Any) -> Tensor:
    prompts = tiny_prompts().select([0, 2])
    x = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(3))
    return policy.velocity(x, torch.tensor(0.4), policy.encode(prompts))


def disturb(policy: CFM) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "lora", [None, {}, {"use_dora": True}, {"modules_to_save": ["proj_out"]}, {"bias": "lora_only"}]
)
def test_the_reference_stays_where_training_began(lora: dict[str, Any] | None) -> None:
    policy = tiny_policy()
    before = velocities(policy.eval()).detach()
    policy = policy.train() if lora is None else add_lora(policy.train(), LoraConfig(**lora))
    reference = ReferencePolicy(policy)
    trainable = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    disturb(policy)
    assert_close(velocities(reference), before, rtol=0, atol=0)
    assert not velocities(reference).requires_grad
    assert all(module.training for module in policy.modules())
    assert [name for name, parameter in policy.named_parameters() if parameter.requires_grad] == trainable
    assert not torch.allclose(velocities(policy.eval()), before, atol=1e-2)  # the policy itself has moved
    assert torch.equal(
        reference.rollout(tiny_prompts(), steps=3, generator=generators(3)).mel, speak(tiny_policy(), grad_steps=0).mel
    )


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_differentiated_by_the_state_only(lora: bool) -> None:
    policy = tiny_policy()
    policy = add_lora(policy) if lora else policy
    reference, prompts = ReferencePolicy(policy), tiny_prompts().select([0])
    x = torch.ones(1, 30, 8, requires_grad=True)
    v = reference.velocity(x, torch.tensor(0.4), reference.encode(prompts))
    v.sum().backward()
    assert x.grad is not None and x.grad.norm() > 0
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_lora_begins_as_the_policy_and_trains_nothing_else() -> None:
    policy = tiny_policy().double().eval()
    before = speak(policy, grad_steps=0).mel
    add_lora(policy)
    assert_close(speak(policy, grad_steps=0).mel, before, rtol=1e-12, atol=1e-12)
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    layers = {name.rsplit(".lora_", 1)[0] for name in trainable}
    expected = {
        f"transformer.transformer_blocks.{block}.{layer}"
        for block in range(2)
        for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.ff.0.0", "ff.ff.2")
    }
    assert layers == expected and len(trainable) == 2 * 12
    disturb(policy)
    found = gradients(policy, lambda: speak(policy).mel.square().sum())
    assert set(found) == trainable and all(gradient.norm() > 0 for gradient in found.values())


def test_lora_goes_where_its_config_says() -> None:
    config = LoraConfig(r=2, target_modules=["to_q"])
    policy = add_lora(tiny_policy(), config)
    adapted = [name for name, _ in policy.named_parameters() if "lora_A" in name]
    assert len(adapted) == 2 and all("to_q" in name for name in adapted)
    untouched = LoraConfig(r=2)
    add_lora(tiny_policy(), untouched)
    assert untouched.target_modules is None


def test_tokenizers_are_told_the_frames_of_reference_and_whole() -> None:
    """What the phoneme tokenizer lays its tokens over; as asked for, and by the rule."""
    asked: list[tuple[Any, ...]] = []

    class Spy(CharTokenizer):
        def prompt(self, reference_text: str, text: str, reference_frames: int, frames: int) -> list[str]:
            asked.append((reference_text, text, reference_frames, frames))
            return super().prompt(reference_text, text, reference_frames, frames)

        def __call__(self, text: str, frames: int | None = None) -> list[str]:
            asked.append((text, frames))
            return super().__call__(text, frames)

    policy = tiny_cfm(tokenizer=Spy())
    policy.encode(tiny_prompts().select([1]))
    assert asked[-1] == ("jam", "a fig", 9, 24)
    policy.encode(tiny_prompts(durations_frames=None).select([1]))
    assert asked[-1] == ("jam", "a fig", 9, 9 + 9 * 5 // 3)  # 5 bytes after 3, at the reference's pace
    policy.sample(torch.zeros(2, 13, 8), ["abc", "de"], torch.tensor([20, 30]), steps=1)
    assert asked[-2:] == [("abc", 20), ("de", 30)]
