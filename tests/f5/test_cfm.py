"""CFM: the numbers of f5-tts 1.1.22 (tests/make_fixtures.py), and gradients through sampling that are exact."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import (
    AVERAGE,
    IN_FLOAT64,
    MEL,
    SAMPLE_CASES,
    TINY,
    TRAINING_CASES,
    UNEQUAL,
    V0,
    V1,
    VOCABULARY,
    call_sample,
    peak_bytes,
    tiny_cfm,
    with_weights,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_mel.f5.backbones.dit import DiT
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.speech.text import load_tokenizer

pytestmark = pytest.mark.rounding

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORDED = load_file(FIXTURES / "f5_tts.safetensors")
WEIGHTS = load_file(FIXTURES / "f5_tts_weights.safetensors")
INPUTS = {name.removeprefix("input/"): value for name, value in RECORDED.items() if name.startswith("input/")}


def f5_cfm(flags: Any, options: Any) -> CFM:
    options = {"mel_spec_kwargs": MEL, "vocab_char_map": dict(VOCABULARY), **options}
    return CFM(with_weights(DiT(**{**TINY, **flags}), WEIGHTS), **options)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", SAMPLE_CASES)
def test_sample_is_that_of_f5_tts(name: str) -> None:
    flags, options, call = SAMPLE_CASES[name]
    cfm = f5_cfm(flags, options)
    out, trajectory = call_sample(cfm.double() if name in IN_FLOAT64 else cfm, INPUTS, **call)
    # float32 keeps 6e-8; 8 steps of some 50 operations each add up to 1e-6. In float64 it is dopri5's own 1e-9, which a
    # solve of this model raises a hundredfold.
    tolerance = 1e-6 if name in IN_FLOAT64 else 1e-5
    assert relative_error(out, RECORDED[f"sample/{name}/out"]) < tolerance
    assert relative_error(trajectory[3], RECORDED[f"sample/{name}/state 3"]) < tolerance
    assert relative_error(trajectory[-1], RECORDED[f"sample/{name}/last"]) < tolerance


@pytest.mark.parametrize("name", TRAINING_CASES)
def test_training_loss_is_that_of_f5_tts(name: str) -> None:
    flags, options = TRAINING_CASES[name]
    torch.manual_seed(9)  # f5-tts draws from the global generator, and in this order
    loss, cond, pred = f5_cfm(flags, options).eval()(INPUTS["x"], INPUTS["ids"], lens=torch.tensor([24, 19]))
    assert torch.equal(cond, RECORDED[f"training/{name}/cond"])
    assert relative_error(pred, RECORDED[f"training/{name}/pred"]) < 1e-5
    assert relative_error(loss, RECORDED[f"training/{name}/loss"]) < 1e-5


def double_cfm(**dit: Any) -> CFM:
    return tiny_cfm(dit).double().eval()


def differentiable_sample(cfm: CFM, **call: Any) -> tuple[Tensor, Tensor]:
    return call_sample(cfm, INPUTS, **{"steps": 3, "cache": False, "rows": 2, **call})


def loss_of(cfm: CFM, **call: Any) -> Tensor:
    """A smooth scalar of the generated frames that weighs them all differently."""
    out, _ = differentiable_sample(cfm, **call)
    return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).square().mean()


def gradients(cfm: CFM, loss: Callable[..., Tensor] = loss_of, **call: Any) -> dict[str, Tensor]:
    cfm.zero_grad()
    loss(cfm, **call).backward()
    return {name: p.grad.clone() for name, p in cfm.named_parameters() if p.grad is not None}


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor], rtol: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert (gradient - other[name]).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize(
    ("dit", "call"),
    [
        (V1, {}),
        ({**V0, "qk_norm": "rms_norm", "long_skip_connection": True}, dict(cfg_strength=0.0)),
        ({**V1, **AVERAGE}, UNEQUAL),
    ],
    ids=["v1", "v0 with every layer, no guidance", "average upsampling, unequal"],
)
def test_gradient_agrees_with_finite_differences(dit: dict, call: dict) -> None:
    """Central differences in float64, in one direction for each weight tensor, text embedding among them.

    The direction is half the gradient's own, half random: neither a wrong length nor a wrong turn would pass.
    With h = 1e-4 truncation is about h^2 = 1e-8 and rounding 1e-16 / h = 1e-12, relative.
    """
    cfm = double_cfm(**dit)
    found = gradients(cfm, **call)
    assert len(found) == len(list(cfm.parameters()))
    generator, step = torch.Generator().manual_seed(3), 1e-4
    for name, parameter in cfm.named_parameters():
        gradient = found[name]
        assert gradient.norm() > 0, name
        noise = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        direction = gradient / gradient.norm() + noise / noise.norm()
        with torch.no_grad():
            parameter += step * direction
            above = loss_of(cfm, **call, cache=True)
            parameter -= 2 * step * direction
            below = loss_of(cfm, **call, cache=True)
            parameter += step * direction
        slope, expected = (above - below) / (2 * step), (gradient * direction).sum()
        assert abs(slope - expected) <= 1e-6 * abs(expected), name


def test_cached_and_uncached_samples_are_equal() -> None:
    cfm = double_cfm()
    cached = differentiable_sample(cfm, cache=True)
    assert all(torch.equal(a, b) for a, b in zip(cached, differentiable_sample(cfm), strict=True))


def euler_that_embeds_text_at_every_step(cfm: CFM, **call: Any) -> Tensor:
    """Upstream's solve as PR 1299 differentiates it, from the public forward of the DiT alone."""
    _, states = differentiable_sample(cfm, cache=True)
    cond = torch.nn.functional.pad(INPUTS["mel"].double(), (0, 0, 0, 24))
    x, t = states[0], torch.linspace(0, 1, 4, dtype=torch.float64)
    for start, end in pairwise(t):
        both = cfm.transformer(x, cond, INPUTS["ids"], start, cfg_infer=True, cache=False)
        prompted, free = both.chunk(2)
        x = x + (end - start) * (prompted + 2.0 * (prompted - free))
    out = torch.cat((cond[:, :16], x[:, 16:]), dim=1)
    return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).square().mean()


def test_text_embedded_once_has_the_gradient_of_text_embedded_at_every_step() -> None:
    cfm = double_cfm()
    assert_same_gradients(gradients(cfm), gradients(cfm, euler_that_embeds_text_at_every_step))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "dopri5"])
def test_checkpointed_gradient_is_the_plain_one(method: str, mode: str) -> None:
    """In train mode too: dropout is replayed, not drawn again."""
    cfm = double_cfm()
    cfm.odeint_kwargs = dict(method=method, rtol=1e-2, atol=1e-2)
    cfm.train(mode == "train")
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        found.append(gradients(cfm, checkpoint=checkpoint))
    assert_same_gradients(*found)


def test_backward_runs_in_the_mode_of_the_sample() -> None:
    cfm = double_cfm()
    expected = gradients(cfm)

    def loss_then_train(cfm: CFM, **call: Any) -> Tensor:
        loss = loss_of(cfm.eval(), **call)
        cfm.train()
        return loss

    assert_same_gradients(gradients(cfm, loss_then_train), expected)
    assert all(module.training for module in cfm.modules())


def test_backward_runs_under_the_autocast_of_the_sample() -> None:
    cfm = tiny_cfm().eval()

    def autocast_loss(cfm: CFM, **call: Any) -> Tensor:
        # with its cache the plain graph would add the gradients of all steps up in bfloat16
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out, _ = differentiable_sample(cfm, **call)
        assert out.dtype == torch.float32
        return out.square().mean()

    plain = gradients(cfm, autocast_loss, checkpoint=False)
    assert_same_gradients(plain, gradients(cfm, autocast_loss, checkpoint=True), rtol=1e-5)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_truncated_gradient_is_that_of_a_detached_state(keep: int) -> None:
    """grad_steps=K: the solve of the last K steps alone, begun at the detached state before them."""
    cfm = double_cfm()
    out, states = differentiable_sample(cfm, grad_steps=keep)
    assert torch.equal(out, differentiable_sample(cfm)[0])
    assert out.requires_grad == (keep > 0)
    if keep == 0:
        return
    found = gradients(cfm, grad_steps=keep)

    def last_steps(cfm: CFM) -> Tensor:
        ids, cond = INPUTS["ids"], torch.nn.functional.pad(INPUTS["mel"].double(), (0, 0, 0, 24))
        x, t = states[3 - keep].detach(), torch.linspace(0, 1, 4, dtype=torch.float64)
        for k in range(3 - keep, 3):
            prompted, free = cfm.transformer(x, cond, ids, t[k], cfg_infer=True).chunk(2)
            x = x + (t[k + 1] - t[k]) * (prompted + 2.0 * (prompted - free))
        out = torch.cat((cond[:, :16], x[:, 16:]), dim=1)
        return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).square().mean()

    assert_same_gradients(found, gradients(cfm, last_steps))


def test_memory_of_a_gradient_does_not_grow_with_the_steps() -> None:
    """Only states accumulate: 1.3 kB a step here, against 1 MB for one step's graph."""
    cfm = tiny_cfm(dict(depth=6)).eval()

    def run(steps: int, checkpoint: bool) -> int:
        def step() -> None:
            cfm.zero_grad(set_to_none=False)
            loss_of(cfm, rows=1, steps=steps, checkpoint=checkpoint, cfg_strength=0.0).backward()

        step()  # gradients exist from now on
        return peak_bytes(step)

    few = run(4, checkpoint=True)
    assert run(64, checkpoint=True) / few < 1.1
    assert run(16, checkpoint=False) / few > 3  # the measurement sees what it should


def test_branches_of_guidance_one_after_the_other_have_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradients(double_cfm(), checkpoint=False)
    monkeypatch.setattr("rlhf_mel.f5.cfm.FULL_LOAD", 1)
    cfm, calls = double_cfm(), []
    velocity = cfm.velocity
    cfm.velocity = lambda x, t, cond: calls.append(cond.guidance) or velocity(x, t, cond)  # type: ignore
    assert_same_gradients(gradients(cfm, checkpoint=True), plain)
    assert calls[-2:] == [0.0, 0.0] and calls[0] > 0


def test_branches_of_guidance_one_after_the_other_take_half_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cfm = tiny_cfm(dict(depth=6)).eval()

    def step() -> None:
        cfm.zero_grad(set_to_none=False)
        loss_of(cfm, rows=3, steps=4, cfg_strength=2.0, duration=200).backward()

    step()
    together = peak_bytes(step)
    monkeypatch.setattr("rlhf_mel.f5.cfm.FULL_LOAD", 1)
    assert 0.45 < peak_bytes(step) / together < 0.65


# The eight behaviours of F5-TTS pull request 1299.


def test_default_sample_carries_no_gradient() -> None:
    out, trajectory = call_sample(tiny_cfm(), INPUTS)
    assert out.grad_fn is None and trajectory.grad_fn is None and not out.requires_grad


def test_uncached_sample_carries_a_gradient() -> None:
    out, trajectory = differentiable_sample(tiny_cfm())
    assert out.grad_fn is not None and trajectory.grad_fn is not None


def test_backward_gives_every_parameter_a_finite_gradient() -> None:
    cfm = tiny_cfm()
    found = gradients(cfm)
    assert found.keys() == dict(cfm.named_parameters()).keys()
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in found.values())


@pytest.mark.parametrize("training", [True, False])
def test_uncached_sample_keeps_the_mode(training: bool) -> None:
    cfm = tiny_cfm().train(training)
    differentiable_sample(cfm)
    assert all(module.training is training for module in cfm.modules())


def test_default_sample_leaves_eval_mode() -> None:
    cfm = tiny_cfm().train()
    call_sample(cfm, INPUTS)
    assert not any(module.training for module in cfm.modules())


@pytest.mark.parametrize("cfg_strength", [0.0, 1.0, 2.0])
def test_every_guidance_is_differentiable(cfg_strength: float) -> None:
    gradient = gradients(tiny_cfm().eval(), cfg_strength=cfg_strength)["transformer.proj_out.weight"]
    assert gradient.isfinite().all() and gradient.norm() > 0


# What else a caller can rely on.


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_silent_loss_of_gradients_raises(context: Callable[[], Any]) -> None:
    with context(), pytest.raises(RuntimeError, match=rf"got torch\.{context.__name__}; leave .* cache=True"):
        differentiable_sample(tiny_cfm())


def test_a_reference_made_under_inference_mode_is_welcome() -> None:
    cfm = tiny_cfm().eval()
    with torch.inference_mode():
        inputs = {name: value.clone() for name, value in INPUTS.items()}
    out, _ = call_sample(cfm, inputs, steps=2, cache=False)
    out.sum().backward()


def test_reference_frames_have_no_gradient_to_weights_and_the_identity_to_the_mel() -> None:
    cfm = double_cfm()
    mel = INPUTS["mel"].double().requires_grad_()
    out, trajectory = cfm.sample(mel, INPUTS["ids"], 40, steps=2, cache=False, seed=0)
    weights = list(cfm.parameters())
    found = torch.autograd.grad(out[:, :16].sum(), [mel, *weights], retain_graph=True, allow_unused=True)
    assert torch.equal(found[0], torch.ones_like(mel))
    assert all(gradient is None or gradient.abs().max() == 0 for gradient in found[1:])
    generated = torch.autograd.grad(out[:, 16:].sum(), [mel, *weights], retain_graph=True)
    assert all(gradient.abs().max() > 0 for gradient in generated)
    raw = torch.autograd.grad(trajectory[-1][:, :16].sum(), cfm.transformer.proj_out.bias)[0]
    assert raw.abs().max() > 0  # the trajectory shows the flow itself, nothing pasted in


def test_an_exception_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grad state and mode come back, and the next text is the one that is spoken (upstream spoke the one before)."""
    cfm = tiny_cfm().train()
    expected, _ = call_sample(copy.deepcopy(cfm), INPUTS, text=["fed."])
    velocity, calls = cfm.transformer.velocity, []

    def fail_at_the_third_call(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return velocity(*args, **kwargs)

    monkeypatch.setattr(cfm.transformer, "velocity", fail_at_the_third_call)
    for cache in (False, True):
        with pytest.raises(KeyboardInterrupt):
            call_sample(cfm, INPUTS, cache=cache, text=["abc."])
        assert torch.is_grad_enabled()
        assert all(module.training is not cache for module in cfm.modules())
    assert calls == [True] * 3 + [False] * 3
    monkeypatch.undo()
    assert torch.equal(call_sample(cfm, INPUTS, text=["fed."])[0], expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cfm: pickle.loads(pickle.dumps(cfm))])
def test_a_model_that_has_sampled_can_be_copied(copied: Callable[[CFM], CFM]) -> None:
    cfm = tiny_cfm()
    out, _ = call_sample(cfm, INPUTS)
    differentiable_sample(cfm)[0].sum().backward()
    assert torch.equal(call_sample(copied(cfm), INPUTS)[0], out)


def test_generator_gives_each_item_its_own_noise_and_leaves_the_global_one_alone() -> None:
    cfm = tiny_cfm()
    before = torch.get_rng_state()
    _, first = call_sample(cfm, INPUTS, rows=2, seed=None, generator=torch.Generator().manual_seed(1))
    _, again = call_sample(cfm, INPUTS, rows=2, seed=None, generator=torch.Generator().manual_seed(1))
    _, seeded = call_sample(cfm, INPUTS, rows=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first[0, 0], first[0, 1])
    assert torch.equal(seeded[0, 0], seeded[0, 1])  # upstream's meaning of seed
    noise = first[0].flatten()
    assert abs(noise.mean()) < 0.15 and 0.9 < noise.std() < 1.1  # 640 normal numbers: 4 deviations


def test_a_generator_for_each_item_does_not_see_the_batch() -> None:
    def draw(rows: int) -> Tensor:
        generators = [torch.Generator().manual_seed(7 + row) for row in range(rows)]
        return call_sample(tiny_cfm(), INPUTS, rows=rows, seed=None, generator=generators)[1][0]

    assert torch.equal(draw(2)[0], draw(1)[0])
    with pytest.raises(ValueError, match="expected one, or 2"):
        call_sample(tiny_cfm(), INPUTS, rows=2, seed=None, generator=[torch.Generator()])


def test_the_vocoder_hears_channels_first_and_carries_gradients() -> None:
    cfm = tiny_cfm().eval()
    out, _ = differentiable_sample(cfm, vocoder=lambda mel: mel.sum(dim=1))
    assert_close(out, differentiable_sample(cfm)[0].sum(dim=-1))
    assert out.requires_grad


def test_training_loss_is_repeatable_by_its_generator() -> None:
    cfm = tiny_cfm().eval()

    def loss(seed: int) -> Tensor:
        return cfm(INPUTS["x"], INPUTS["ids"], generator=torch.Generator().manual_seed(seed))[0]

    assert torch.equal(loss(4), loss(4)) and not torch.equal(loss(4), loss(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(cond=torch.zeros(1, 16, 9)), r"expected mel \[batch, frames, 8\] or waveform .* got \[1, 16, 9\]"),
        (dict(text=torch.zeros(2, 4, dtype=torch.long)), r"text: expected 1 items"),
        (dict(edit_mask=torch.ones(1, 16)), r"edit_mask: expected bool \[1, reference frames\]"),
        (dict(steps=0), "steps: expected at least 1, got 0"),
        (dict(grad_steps=9), r"grad_steps: expected 0..8 .* got 9"),
    ],
)
def test_bad_input_is_named(call: dict, message: str) -> None:
    call = {"cond": INPUTS["mel"][:1], "text": INPUTS["ids"][:1], "duration": 40, "steps": 8, **call}
    with pytest.raises(ValueError, match=message):
        tiny_cfm().sample(**call)


def test_a_model_of_another_kind_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="expected a vocabulary with the tokenizer"):
        tiny_cfm(vocab_char_map=None, tokenizer=load_tokenizer("char"))
    with pytest.raises(ValueError, match=r"ODE method: expected one of .* got 'leapfrog'"):
        call_sample(tiny_cfm(odeint_kwargs=dict(method="leapfrog")), INPUTS)


def test_state_dict_has_nothing_but_the_transformer() -> None:
    cfm = tiny_cfm()
    assert all(name.startswith("transformer.") for name in cfm.state_dict())
    assert isinstance(cfm, nn.Module) and cfm.num_channels == 8
