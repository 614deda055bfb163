"""A live f5-tts model as policy: one set of parameters, gradients, no stale cache, deepcopy. f5-tts itself runs."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from problems import EVERYTHING, MASKED, UNEQUAL, V0, call_sample, case_inputs, tiny_prompts
from torch.testing import assert_close

from rlhf_mel.f5.checkpoints import load_policy, save_policy
from rlhf_mel.f5.live import policy_from_f5, write_back
from rlhf_mel.flow.lora import add_lora
from rlhf_mel.flow.policy import rollout
from rlhf_mel.flow.reference import ReferencePolicy

pytestmark = [
    pytest.mark.f5_tts,
    pytest.mark.skipif(importlib.util.find_spec("f5_tts") is None, reason="f5-tts is not installed"),
]


@pytest.fixture(scope="module")
def upstream() -> Any:
    import make_fixtures

    return make_fixtures.Upstream()


CASES = {
    "DiT v1": ("DiT", {}),
    "DiT v0 with every layer": ("DiT", {**V0, **EVERYTHING, **MASKED, "dropout": 0.0}),
    "DiT, average upsampling": ("DiT", dict(text_embedding_average_upsampling=True)),
    "UNetT": ("UNetT", dict(skip_connect_type="add", conv_layers=0)),
    "MMDiT": ("MMDiT", dict(qk_norm="rms_norm", text_mask_padding=False)),
}


def speech(policy: Any, **options: Any) -> torch.Tensor:
    return rollout(policy, tiny_prompts(), steps=2, generator=torch.Generator().manual_seed(0), **options).mel


@pytest.mark.parametrize("name", CASES)
def test_it_speaks_as_the_live_model(name: str, upstream: Any) -> None:
    live = upstream.cfm(*CASES[name])
    policy = policy_from_f5(live, tokenizer="char")
    for call in ({}, dict(UNEQUAL)):
        ours, theirs = (call_sample(cfm, case_inputs(), **call)[0] for cfm in (policy, live))
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_an_update_of_the_policy_is_an_update_of_the_live_model(name: str, upstream: Any) -> None:
    live = upstream.cfm(*CASES[name])
    policy = policy_from_f5(live, tokenizer="char")
    theirs = dict(live.named_parameters())
    assert all(parameter is theirs.pop(key) for key, parameter in policy.named_parameters()) and not theirs
    before, _ = call_sample(live, case_inputs())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    speech(policy).square().mean().backward()
    optimizer.step()
    after, _ = call_sample(live, case_inputs())
    assert (after - before).abs().max() > 1e-3
    assert_close(call_sample(policy, case_inputs())[0], after, rtol=1e-4, atol=1e-4)


def test_a_solve_that_the_live_model_did_not_finish_changes_nothing(
    upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """f5-tts's own next sample speaks the first text; the policy speaks what it is given."""
    live = upstream.cfm("DiT", {})
    policy = policy_from_f5(live, tokenizer="char")
    first, second = dict(text=["abc"]), dict(text=["fed"])
    expected, _ = call_sample(upstream.cfm("DiT", {}), case_inputs(), **second)
    calls = []

    def interrupt(module: Any, inputs: Any, output: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = live.transformer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        call_sample(live, case_inputs(), **first)
    hook.remove()
    assert live.transformer.text_cond is not None  # stale
    assert_close(call_sample(policy, case_inputs(), **second)[0], expected, rtol=1e-5, atol=1e-5)
    assert (call_sample(live, case_inputs(), **second)[0] - expected).abs().max() > 1e-3


def test_it_can_be_copied_where_the_live_model_cannot(upstream: Any) -> None:
    live = upstream.cfm("DiT", {})
    policy = policy_from_f5(live, tokenizer="char")
    call_sample(live, case_inputs())
    with pytest.raises(TypeError):
        copy.deepcopy(live)
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        copied.transformer.proj_out.bias += 1.0
    assert not torch.equal(copied.transformer.proj_out.bias, policy.transformer.proj_out.bias)
    ReferencePolicy(policy).rollout(tiny_prompts(), steps=1, generator=torch.Generator().manual_seed(0))


def test_lora_is_written_back_and_the_policy_is_saved(upstream: Any, tmp_path: Any) -> None:
    live = upstream.cfm("DiT", {})
    policy: Any = add_lora(policy_from_f5(live, tokenizer="char"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    expected = call_sample(policy, case_inputs())[0]
    other = upstream.cfm("DiT", {})
    write_back(policy, other)
    assert_close(call_sample(other, case_inputs())[0], expected, rtol=1e-4, atol=1e-4)
    saved = load_policy(save_policy(policy, tmp_path))
    assert_close(call_sample(saved, case_inputs())[0], expected, rtol=1e-4, atol=1e-4)


def test_other_models_are_refused(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"expected f5-tts's CFM on one of \['DiT', 'UNetT', 'MMDiT'\]"):
        policy_from_f5(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"expected float32 weights, got torch\.float16"):
        policy_from_f5(upstream.cfm("DiT", {}).half(), tokenizer="char")
    live = upstream.cfm("DiT", {})
    live.transformer.norm_out.register_forward_hook(lambda module, inputs, output: 1.01 * output)
    with pytest.raises(ValueError, match=r"expected the forward pass of f5-tts 1\.1\.22, got one that differs by 0\.0"):
        policy_from_f5(live, tokenizer="char")
