"""DiT: the numbers, keys and shapes of f5-tts 1.1.22 (tests/make_fixtures.py), and what its velocity promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import AVERAGE, DIT_CASES, EVERYTHING, MASKED, TINY, V0, V1, call_dit, tiny_dit, with_weights
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf_mel.f5.backbones._common import upsample_evenly
from rlhf_mel.f5.backbones.dit import DiT
from rlhf_mel.f5.layers import apply_rope, rotary_table

pytestmark = pytest.mark.rounding

FIXTURES = Path(__file__).parents[2] / "fixtures"
RECORDED = load_file(FIXTURES / "f5_tts.safetensors")
WEIGHTS = load_file(FIXTURES / "f5_tts_weights.safetensors")
INPUTS = {name.removeprefix("input/"): value for name, value in RECORDED.items() if name.startswith("input/")}

F5TTS_V1_BASE = dict(dim=1024, depth=22, heads=16, ff_mult=2, text_dim=512, conv_layers=4, text_num_embeds=2545)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("name", DIT_CASES)
def test_forward_is_that_of_f5_tts(name: str) -> None:
    flags, call = DIT_CASES[name]
    dit = with_weights(DiT(**{**TINY, **flags}), WEIGHTS).eval()
    with torch.no_grad():
        assert relative_error(call_dit(dit, INPUTS, **call), RECORDED[f"dit/{name}"]) < 1e-5


def test_state_dict_is_that_of_f5tts_v1_base() -> None:
    """Keys and shapes from facts/f5_tts.md; 337,096,804 parameters in 364 entries."""
    with torch.device("meta"):
        dit = DiT(**F5TTS_V1_BASE)
    shapes = {name: tuple(value.shape) for name, value in dit.state_dict().items()}
    assert len(shapes) == 364
    assert sum(parameter.numel() for parameter in dit.parameters()) == 337_096_804
    expected = {
        "time_embed.time_mlp.0.weight": (1024, 256),
        "time_embed.time_mlp.2.bias": (1024,),
        "text_embed.text_embed.weight": (2546, 512),
        "text_embed.text_blocks.3.dwconv.weight": (512, 1, 7),
        "text_embed.text_blocks.3.pwconv1.weight": (1024, 512),
        "text_embed.text_blocks.0.grn.gamma": (1, 1, 1024),
        "text_embed.text_blocks.0.norm.bias": (512,),
        "input_embed.proj.weight": (1024, 712),
        "input_embed.conv_pos_embed.conv1d.2.weight": (1024, 64, 31),
        "rotary_embed.inv_freq": (32,),
        "transformer_blocks.21.attn_norm.linear.weight": (6144, 1024),
        "transformer_blocks.21.attn.to_q.weight": (1024, 1024),
        "transformer_blocks.21.attn.to_out.0.bias": (1024,),
        "transformer_blocks.21.ff.ff.0.0.weight": (2048, 1024),
        "transformer_blocks.21.ff.ff.2.weight": (1024, 2048),
        "norm_out.linear.weight": (2048, 1024),
        "proj_out.weight": (100, 1024),
    }
    assert {name: shapes.get(name) for name in expected} == expected


def test_qk_norm_and_long_skip_have_the_keys_of_f5_tts() -> None:
    extra = set(tiny_dit(qk_norm="rms_norm", long_skip_connection=True).state_dict()) - set(tiny_dit().state_dict())
    norms = {f"transformer_blocks.{i}.attn.{x}_norm.weight" for i in range(2) for x in "qk"}
    assert extra == norms | {"long_skip_connection.weight"}


def test_a_fresh_model_predicts_zero() -> None:
    dit = DiT(**TINY)
    assert call_dit(dit, INPUTS).abs().max() == 0


def test_precomputed_text_and_rope_change_nothing() -> None:
    dit = tiny_dit().eval()
    mask = torch.arange(24) < torch.tensor([24, 17])[:, None]
    text = dit.embed_text(INPUTS["ids"], 24, mask.sum(dim=1))
    time = torch.tensor([0.35, 0.35])
    whole = dit(INPUTS["x"], INPUTS["cond"], INPUTS["ids"], time, mask=mask)
    parts = dit.velocity(INPUTS["x"], INPUTS["cond"], text, time, mask=mask, rope=dit.rope(24))
    assert torch.equal(whole, parts)
    shared = dit.velocity(INPUTS["x"], INPUTS["cond"], text, time[0], mask=mask, rope=dit.rope(24))
    assert_close(shared, parts, rtol=1e-5, atol=1e-6)  # one AdaLN row for the batch


@pytest.mark.parametrize(
    ("tokens", "frames", "expected"),
    [
        (3, 3, [0, 1, 2]),
        (3, 7, [0, 0, 1, 1, 2, 2, 2]),  # 7 = 2 + 2 + 3: the last token takes the remainder
        (3, 8, [0, 0, 1, 1, 1, 2, 2, 2]),
        (1, 4, [0, 0, 0, 0]),
        (4, 6, [0, 1, 2, 2, 3, 3]),
    ],
)
def test_upsampling_gives_each_token_an_equal_share(tokens: int, frames: int, expected: list[int]) -> None:
    rows = torch.arange(1.0, 11.0).expand(1, 1, -1).transpose(1, 2)  # row i holds i + 1
    spread = upsample_evenly(rows, torch.tensor([tokens]), torch.tensor([frames]))[0, :, 0]
    assert spread.tolist() == [token + 1 for token in expected] + [0] * (10 - frames)


def test_upsampling_of_no_text_is_silence() -> None:
    assert upsample_evenly(torch.ones(1, 5, 2), torch.tensor([0]), None).abs().max() == 0


def test_rope_turns_adjacent_pairs_by_their_angle() -> None:
    """Pair i at position n turns by n 10000^(-2i/d); here d = 4, so by n and n / 100 radians."""
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(1, 6, 2, 4)
    turned = apply_rope(x, rotary_table(6, 4))[0, 5, 0]
    angles = torch.tensor([5.0, 0.05])
    expected = torch.stack((angles.cos()[0], angles.sin()[0], -angles.sin()[1], angles.cos()[1]))
    assert_close(turned, expected, rtol=1e-6, atol=1e-6)
    first_only = apply_rope(x, rotary_table(6, 4), heads=1)
    assert torch.equal(first_only[:, :, 1], x[:, :, 1]) and not torch.equal(first_only[:, :, 0], x[:, :, 0])


def test_rope_keeps_its_precision_in_half_weights_and_under_autocast() -> None:
    """f5-tts in bfloat16 weights rounds inv_freq: 0.9 rad off at frame 940."""
    table = tiny_dit().bfloat16().rope(941)
    exact = 940.0 / 10_000.0 ** (torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    assert table.cos.dtype == torch.float32
    assert_close(table.cos[940].double(), exact.cos(), rtol=0, atol=1e-4)
    x = torch.randn(1, 941, 1, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        turned = apply_rope(x, table)
    assert torch.equal(turned, apply_rope(x.float(), table).bfloat16())


def test_checkpointed_blocks_have_the_same_gradient() -> None:
    gradients = []
    for checkpoint_activations in (False, True):
        dit = tiny_dit(checkpoint_activations=checkpoint_activations).eval().double()
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in INPUTS.items()}
        call_dit(dit, inputs).square().sum().backward()
        gradients.append([parameter.grad for parameter in dit.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(plain, checkpointed, rtol=1e-12, atol=1e-12)


def test_every_parameter_has_a_gradient() -> None:
    dit = tiny_dit(qk_norm="rms_norm", long_skip_connection=True)
    call_dit(dit, INPUTS, cfg_infer=True).square().sum().backward()
    dead = [name for name, p in dit.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert dead == []


@pytest.mark.parametrize("flags", [V0, V1, {**V1, **AVERAGE}, {**V1, **MASKED, **EVERYTHING}])
def test_nothing_waits_for_the_device(flags: dict) -> None:
    """On the meta device every look at a value raises: shapes alone decide, as CUDA graphs need."""
    with torch.device("meta"):
        dit = DiT(**{**TINY, **flags})
        inputs = {name: torch.empty_like(value, device="meta") for name, value in INPUTS.items()}
        mask = torch.empty(2, 24, dtype=torch.bool)
        out = dit(inputs["x"], inputs["cond"], inputs["ids"], torch.empty(2), mask=mask, cfg_infer=True)
        out.sum().backward()
    assert out.shape == (4, 24, 8) and dit.proj_out.weight.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cond=torch.zeros(2, 23, 8)), r"x and cond: expected one shape"),
        (dict(text=torch.zeros(3, 4, dtype=torch.long)), r"text: expected ids \[2, tokens\]"),
        (dict(text=torch.zeros(2, 4)), r"got torch.float32"),
        (dict(time=torch.zeros(3)), r"time: expected a scalar or \[2\]"),
        (dict(mask=torch.ones(2, 24)), r"mask: expected bool \[2, 24\]"),
    ],
)
def test_wrong_shapes_are_named(change: dict, message: str) -> None:
    call = dict(x=INPUTS["x"], cond=INPUTS["cond"], text=INPUTS["ids"], time=torch.tensor(0.5))
    with pytest.raises(ValueError, match=message):
        tiny_dit()(**{**call, **change})


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="text_mask_padding=True"):
        DiT(**{**TINY, "text_mask_padding": False, "text_embedding_average_upsampling": True})
    with pytest.raises(ValueError, match="qk_norm"):
        DiT(**{**TINY, "qk_norm": "layer_norm"})
