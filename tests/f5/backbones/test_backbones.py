"""UNetT and MMDiT: the numbers of f5-tts 1.1.22, gradients of all backbones; keys and shapes of what is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import (
    BACKBONE_CASES,
    BACKBONE_SAMPLES,
    BACKBONES,
    E2,
    GRADIENT_CASES,
    MASKED,
    MEL,
    VOCABULARY,
    call_dit,
    call_sample,
    gradient_summary,
    ramp_loss,
    tiny_backbone,
    tiny_prompts,
    with_weights,
)
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from rlhf_mel.f5.backbones.mmdit import MMDiT
from rlhf_mel.f5.backbones.unett import UNetT
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.checkpoints import load_backbone, load_policy, save_policy
from rlhf_mel.flow.lora import add_lora, lora_layers
from rlhf_mel.flow.policy import rollout
from rlhf_mel.speech.text import load_tokenizer

pytestmark = pytest.mark.rounding

FIXTURES = Path(__file__).parents[2] / "fixtures"
RECORDED = load_file(FIXTURES / "f5_tts_backbones.safetensors")
GRADIENTS = load_file(FIXTURES / "f5_tts_gradients.safetensors")
INPUTS = {
    name.removeprefix("input/"): value
    for name, value in load_file(FIXTURES / "f5_tts.safetensors").items()
    if name.startswith("input/")
}
WEIGHTS = {
    "DiT": load_file(FIXTURES / "f5_tts_weights.safetensors"),
    "UNetT": load_file(FIXTURES / "f5_tts_weights_unett.safetensors"),
    "MMDiT": load_file(FIXTURES / "f5_tts_weights_mmdit.safetensors"),
}


def f5_backbone(name: str, flags: Any) -> nn.Module:
    backbone, arguments = BACKBONES[name]
    return with_weights(backbone(**{**arguments, **flags}), WEIGHTS[name])


def f5_cfm(name: str, flags: Any) -> CFM:
    return CFM(f5_backbone(name, flags), mel_spec_kwargs=MEL, vocab_char_map=dict(VOCABULARY))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", BACKBONE_CASES)
def test_forward_is_that_of_f5_tts(name: str) -> None:
    backbone, flags, call = BACKBONE_CASES[name]
    with torch.no_grad():
        found = call_dit(f5_backbone(backbone, flags).eval(), INPUTS, **call)
    assert relative_error(found, RECORDED[f"forward/{name}"]) < 1e-5


@pytest.mark.parametrize("backbone", ["UNetT", "MMDiT"])
@pytest.mark.parametrize("name", BACKBONE_SAMPLES)
def test_sample_is_that_of_f5_tts(backbone: str, name: str) -> None:
    cfm = f5_cfm(backbone, E2 if backbone == "UNetT" else {})
    out, trajectory = call_sample(cfm, INPUTS, **BACKBONE_SAMPLES[name])
    assert relative_error(out, RECORDED[f"sample/{backbone}/{name}/out"]) < 1e-5
    assert relative_error(trajectory[-1], RECORDED[f"sample/{backbone}/{name}/last"]) < 1e-5


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradient_is_that_of_f5_tts_without_its_no_grad(name: str, checkpoint: bool) -> None:
    """float64 in both, but rotary angles and time sinusoids are float32 in both: 1e-7 of the largest summands."""
    backbone, flags, call = GRADIENT_CASES[name]
    cfm = f5_cfm(backbone, flags).double().eval()
    out, _ = call_sample(cfm, INPUTS, **{"steps": 3, **call}, cache=False, checkpoint=checkpoint)
    ramp_loss(out).backward()
    found = gradient_summary(cfm)
    recorded = {key.split("/")[2]: value for key, value in GRADIENTS.items() if key.split("/")[1] == name}
    assert found.keys() == recorded.keys()
    for parameter, expected in recorded.items():
        assert_close(found[parameter], expected, rtol=1e-5, atol=1e-6 * float(expected[0]) + 1e-12, msg=parameter)


# Keys and shapes: the table of the published configurations, from f5-tts's yaml files.

BASE: dict[str, Any] = dict(dim=1024, depth=22, heads=16, ff_mult=2, text_dim=512, conv_layers=4)
SMALL: dict[str, Any] = dict(dim=768, depth=18, heads=12, ff_mult=2, text_dim=512, conv_layers=4)
PUBLISHED = {
    "F5TTS_v1_Base": ("DiT", BASE, 337_096_804, 364),
    "F5TTS_Base": ("DiT", {**BASE, **E2}, 337_096_804, 364),
    "F5TTS_v1_Small": ("DiT", SMALL, 159_228_772, 308),
    "F5TTS_Small": ("DiT", {**SMALL, **E2}, 159_228_772, 308),
    "E2TTS_Base": ("UNetT", dict(dim=1024, depth=24, heads=16, ff_mult=4, **E2), 333_470_444, 363),
    "E2TTS_Small": ("UNetT", dict(dim=768, depth=20, heads=12, ff_mult=4, **E2), 157_161_708, 305),
}
"""Backbone, arguments, parameters and state_dict entries, with the 2545 tokens of Emilia's vocabulary."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    backbone, arguments, parameters, entries = PUBLISHED[name]
    with torch.device("meta"):
        model = load_backbone(backbone)(**arguments, text_num_embeds=2545)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(model.state_dict()) == entries


def test_state_dict_is_that_of_e2tts_base() -> None:
    with torch.device("meta"):
        model = UNetT(**PUBLISHED["E2TTS_Base"][1], text_num_embeds=2545)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {
        "time_embed.time_mlp.0.weight": (1024, 256),
        "text_embed.text_embed.weight": (2546, 100),
        "input_embed.proj.weight": (1024, 300),
        "input_embed.conv_pos_embed.conv1d.0.weight": (1024, 64, 31),
        "rotary_embed.inv_freq": (32,),
        "layers.12.0.weight": (1024, 2048),
        "layers.0.1.g": (1024,),
        "layers.23.2.to_q.weight": (1024, 1024),
        "layers.23.2.to_out.0.bias": (1024,),
        "layers.5.3.g": (1024,),
        "layers.5.4.ff.0.0.weight": (4096, 1024),
        "layers.5.4.ff.2.bias": (1024,),
        "norm_out.g": (1024,),
        "proj_out.weight": (100, 1024),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert not any(name in shapes for name in ("layers.11.0.weight", "layers.12.0.bias"))


# What our velocities promise, for every backbone.


@pytest.mark.parametrize("name", BACKBONES)
def test_a_shared_time_is_the_time_of_each_item(name: str) -> None:
    model: Any = tiny_backbone(name).eval()
    text = model.embed_text(INPUTS["ids"], 24)
    each = model.velocity(INPUTS["x"], INPUTS["cond"], text, torch.tensor([0.35, 0.35]))
    shared = model.velocity(INPUTS["x"], INPUTS["cond"], text, torch.tensor(0.35), rope=model.rope(24))
    assert_close(shared, each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["UNetT", "MMDiT"])
def test_an_item_of_a_batch_of_one_duration_is_the_item_alone(name: str) -> None:
    """MMDiT's text is padded in the batch: only what attention leaves out of account makes that exact."""
    model: Any = tiny_backbone(name, **(MASKED if name == "MMDiT" else {})).eval()
    mask = torch.ones(2, 24, dtype=torch.bool)
    with torch.no_grad():
        both = model(INPUTS["x"], INPUTS["cond"], INPUTS["ids"], torch.tensor(0.4), mask=mask)
        alone = model(INPUTS["x"][1:], INPUTS["cond"][1:], INPUTS["ids"][1:, :7], torch.tensor(0.4), mask=mask[1:])
    assert_close(both[1:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["UNetT", "MMDiT"])
def test_nothing_waits_for_the_device(name: str) -> None:
    backbone, arguments = BACKBONES[name]
    with torch.device("meta"):
        model = backbone(**{**arguments, **MASKED})
        inputs = {key: torch.empty_like(value, device="meta") for key, value in INPUTS.items()}
        mask = torch.empty(2, 24, dtype=torch.bool)
        out = model(inputs["x"], inputs["cond"], inputs["ids"], torch.empty(2), mask=mask, cfg_infer=True)
    assert out.shape == (4, 24, 8)


def test_checkpointed_blocks_of_mmdit_have_the_same_gradient() -> None:
    gradients = []
    for checkpoint_activations in (False, True):
        model = tiny_backbone("MMDiT", checkpoint_activations=checkpoint_activations).eval()
        call_dit(model, INPUTS).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(plain, checkpointed, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["UNetT", "MMDiT"])
def test_every_parameter_has_a_gradient(name: str) -> None:
    model = tiny_backbone(name, qk_norm="rms_norm")
    call_dit(model, INPUTS, cfg_infer=True).square().sum().backward()
    dead = {key for key, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    # what the text of MMDiT's last block would ask, no one answers
    asks = {"attn.to_q_c.weight", "attn.to_q_c.bias", "attn.c_q_norm.weight"} if name == "MMDiT" else set()
    assert dead == {f"transformer_blocks.1.{key}" for key in asks}


@pytest.mark.parametrize("name", ["UNetT", "MMDiT"])
def test_the_policy_speaks_is_adapted_and_saved(name: str, tmp_path: Path) -> None:
    """Rollout with gradients, LoRA on attention and feed-forward of every block, and back from disk."""
    policy = CFM(
        tiny_backbone(name),
        mel_spec_kwargs=MEL,
        vocab_char_map=dict(VOCABULARY),
        tokenizer=load_tokenizer("char"),
    )
    save_policy(policy, tmp_path)
    loaded = load_policy(tmp_path)

    def speech(policy: CFM) -> torch.Tensor:
        return rollout(policy, tiny_prompts(), steps=2, generator=torch.Generator().manual_seed(0)).mel

    assert type(loaded.transformer).__name__ == name
    assert_close(speech(loaded), speech(policy), rtol=1e-5, atol=1e-5)
    add_lora(policy)
    # a layer of UNetT: q, k, v, out, two of the feed-forward; of MMDiT twice that, but in its last block the text
    # has neither out nor feed-forward
    assert len(lora_layers(policy)) == {"UNetT": 4 * 6, "MMDiT": 2 * 12 - 3}[name]
    speech(policy).square().sum().backward()
    assert all(p.grad is not None for key, p in policy.named_parameters() if "lora_B" in key)


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(depth=3), "depth: expected an even number"), (dict(skip_connect_type="mul"), "skip_connect_type: expected")],
)
def test_a_unett_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetT(**{**BACKBONES["UNetT"][1], **options})


def test_a_fresh_mmdit_predicts_zero() -> None:
    assert call_dit(MMDiT(**BACKBONES["MMDiT"][1]), INPUTS).abs().max() == 0
