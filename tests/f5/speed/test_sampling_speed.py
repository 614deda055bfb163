"""FastVelocity and compiled blocks compute what the plain backbone computes, and follow its weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import MEL, VOCABULARY, tiny_backbone
from torch import Tensor
from torch.testing import assert_close

from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.condition import velocity_by
from rlhf_mel.f5.speed.gradients import PATIENCE, StandIn, Sums
from rlhf_mel.flow.ema import MovingAverage
from rlhf_mel.flow.lora import add_lora, lora_disabled, lora_layers
from rlhf_mel.flow.recompute import Autocast, Weights, differentiate

pytestmark = pytest.mark.rounding

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = {
    "mel": torch.randn(3, 20, 8, generator=GENERATOR),
    "ids": torch.randint(len(VOCABULARY), (3, 9), generator=GENERATOR),
}


@pytest.fixture(autouse=True)
def float32_convolutions() -> Iterator[None]:
    """On a GPU they are TF32 otherwise, whose rounding depends on the kernel that is chosen."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def spoken(policy: CFM, **options: Any) -> Tensor:
    """What `sample` says in eval mode with guidance, of INPUTS."""
    call = {"duration": 40, "steps": 3, "cfg_strength": 2.0, "seed": 0, **options}
    return policy.eval().sample(INPUTS["mel"], INPUTS["ids"], **call)[0]


def fast_cfm(backbone: str = "DiT") -> tuple[CFM, CFM]:
    """The same policy twice, plain and fast; without a compiler, which another test uses."""
    plain, fast = (CFM(tiny_backbone(backbone), mel_spec_kwargs=MEL, vocab_char_map=dict(VOCABULARY)) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    return plain, fast.speed_up(compiled=False)


@pytest.mark.parametrize("backbone", ["DiT", "UNetT", "MMDiT"])
def test_speaks_as_the_plain_policy(backbone: str) -> None:
    plain, fast = fast_cfm(backbone)
    assert_close(spoken(fast), spoken(plain), rtol=1e-5, atol=1e-5)


def change_by_fused_optimizer(policy: CFM) -> None:
    weights = list(policy.parameters())
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    versions = [weight._version for weight in weights]
    torch.optim.AdamW(weights, lr=1e-2, fused=True).step()
    assert [weight._version for weight in weights] == versions  # the reason not to trust versions
    policy.zero_grad()


def change_data_in_place(policy: CFM) -> None:
    for weight in policy.parameters():
        weight.data.mul_(1.01)


def exchange_data(policy: CFM) -> None:
    for weight in policy.parameters():
        weight.data = 1.01 * weight.data


@pytest.mark.parametrize("change", [change_by_fused_optimizer, change_data_in_place, exchange_data])
def test_follows_the_weights(change: Any) -> None:
    plain, fast = fast_cfm()
    before = spoken(fast)
    for policy in (plain, fast):
        change(policy)
    after = spoken(fast)
    assert (after - before).norm() > 1e-3 * before.norm()
    assert_close(after, spoken(plain), rtol=1e-5, atol=1e-5)


def test_lora_is_merged_and_can_be_switched_off() -> None:
    plain, fast = fast_cfm()
    base = spoken(plain)
    for policy in (plain, fast):
        torch.manual_seed(0)
        add_lora(policy)
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    assert (spoken(plain) - base).norm() > 1e-3 * base.norm()
    assert_close(spoken(fast), spoken(plain), rtol=1e-4, atol=1e-4)
    with lora_disabled(lora_layers(fast)):
        assert_close(spoken(fast), base, rtol=1e-5, atol=1e-5)
    assert_close(spoken(fast), spoken(plain), rtol=1e-4, atol=1e-4)


def test_an_average_in_place_is_what_speaks() -> None:
    _, fast = fast_cfm()
    first = spoken(fast)
    average = MovingAverage(fast)
    change_data_in_place(fast)
    changed = spoken(fast)
    with average.applied():
        assert_close(spoken(fast), first, rtol=1e-6, atol=1e-6)
    assert_close(spoken(fast), changed, rtol=1e-6, atol=1e-6)


def test_gradient_is_the_plain_one() -> None:
    plain, fast = fast_cfm()
    found = []
    for policy in (plain, fast):
        spoken(policy, cache=False).square().mean().backward()
        found.append([weight.grad for weight in policy.parameters()])
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9


def as_float32(leaf: Any) -> Any:
    """The leaf of a gradient in float32, if it is one in half precision."""
    if not isinstance(leaf, Tensor) or leaf.dtype != torch.bfloat16:
        return leaf
    return leaf.detach().float().requires_grad_(leaf.requires_grad)


@pytest.mark.parametrize("backbone", ["DiT", "UNetT", "MMDiT"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("durations", [[40, 40, 40], [40, 33, 37]])
def test_stand_in_sums_the_gradients_of_autograd(
    backbone: str, autocast: bool, lora: bool, durations: list[int]
) -> None:
    """What a graph is captured of; on a CPU it can run as it is.

    In float32 both sum the same few thousand products in another order: 1e-5. In bfloat16 each rounds some ten thousand
    numbers on its own, so they are as far apart as each is from float32, which is more where terms cancel (the bias of
    keys moves all scores of a query alike, its gradient is what rounding leaves): ours may be four times as far as
    autocast's, which no sum over a hundred independent roundings is by chance, and 1 % besides for those of fewer.
    """
    _, fast = fast_cfm(backbone)
    if lora:
        add_lora(fast)
        for name, weight in fast.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    counts = []

    def both(run: Any, leaves: Any, weights: Weights, cotangent: Tensor) -> Any:
        sums = Sums(fast.transformer, weights.parameters)
        dtype = torch.bfloat16 if autocast else None
        stand_in = StandIn(fast.transformer, dtype, sums, fast.fast._cast(dtype))
        own = replace(run, function=velocity_by(stand_in.backbone))
        found = [stand_in.differentiate(own, leaves, cotangent), stand_in.differentiate(own, leaves, cotangent)]
        alone = Weights(weights.parameters)
        of_leaves, of_weights = differentiate(run, leaves, alone, cotangent), alone.take()
        exact = Weights(weights.parameters)
        in_float32 = replace(run, autocast=Autocast("cpu", None))
        of_exact = [*differentiate(in_float32, [as_float32(leaf) for leaf in leaves], exact, cotangent), *exact.take()]
        pairs = [*zip(found[0], of_leaves, strict=True), *zip(found[1], of_leaves, strict=True)]
        for weight, gradient in zip(weights.parameters, of_weights, strict=True):
            assert (id(weight) in stand_in.touched) == (gradient is not None)
            pairs.append((None if gradient is None else sums.by_id[id(weight)] / 2, gradient))
        for (ours, theirs), true in zip(pairs, [*of_exact[: len(of_leaves)], *of_exact], strict=True):
            if theirs is not None and autocast:
                assert (ours - true).norm() <= 4 * (theirs - true).norm() + 1e-2 * true.norm()
            elif theirs is not None:
                assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-9
        counts.append(len(stand_in.touched))
        weights.add(of_weights)
        return of_leaves

    fast.differentiate = both  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mel = spoken(fast, cache=False, steps=2, duration=torch.tensor(durations))
    mel.float().square().mean().backward()
    assert counts[0] == counts[1] > 10
    assert all(weight.dtype == torch.float32 and not weight._post_accumulate_grad_hooks for weight in fast.parameters())


def test_stand_in_follows_the_weights() -> None:
    _, fast = fast_cfm()
    weight = fast.transformer.transformer_blocks[0].attn.to_k.weight
    stand_in = StandIn(fast.transformer, torch.bfloat16, Sums(fast.transformer, fast.parameters()), {})
    change_data_in_place(fast)
    stand_in.follow()
    own = stand_in.backbone.transformer_blocks[0].attn
    assert torch.equal(own.to_k.weight, weight.bfloat16())
    assert torch.equal(own.weight.chunk(3)[1], weight.bfloat16())


def test_copies_have_their_own_weights() -> None:
    plain, fast = fast_cfm()
    spoken(fast)
    other = copy.deepcopy(fast)
    restored = pickle.loads(pickle.dumps(fast.fast))
    change_data_in_place(fast)
    assert_close(spoken(other), spoken(plain), rtol=1e-5, atol=1e-5)
    assert restored is not fast.fast


def test_weights_are_cast_to_the_autocast_dtype() -> None:
    """The error against float32 is that of plain autocast, not more than half as much again."""
    plain, fast = fast_cfm()
    exact = spoken(plain)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = ((spoken(policy) - exact).norm() / exact.norm() for policy in (plain, fast))
    assert 1e-4 < ours < 1.5 * theirs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graph_replays_other_inputs() -> None:
    plain, fast = (policy.cuda() for policy in fast_cfm())
    mel, ids = INPUTS["mel"].cuda(), INPUTS["ids"].cuda()
    for seed, duration in ((0, 40), (1, 40), (2, 37), (3, 40)):
        # whoever reads memory that another owns by now reads this
        torch.cuda.empty_cache()
        _ = [torch.full((2**18,), float("nan"), device="cuda") for _ in range(64)]
        call: dict[str, Any] = {"steps": 3, "cfg_strength": 2.0, "seed": seed}
        ours, theirs = (policy.sample(mel, ids, duration, **call)[0] for policy in (fast, plain))
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_from_graphs_are_the_plain_ones(lora: bool) -> None:
    plain, fast = (policy.cuda().eval() for policy in fast_cfm())
    for policy in (plain, fast) if lora else ():
        torch.manual_seed(0)
        add_lora(policy)
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    mel, ids = INPUTS["mel"].cuda(), INPUTS["ids"].cuda()
    assert fast.fast is not None and fast.fast._gradients is not None
    for seeds, duration in (([0], 40), ([1], 40), ([2], 37), ([3], 40), ([4, 5], 40), ([6], 37)):
        torch.cuda.empty_cache()
        _ = [torch.full((2**18,), float("nan"), device="cuda") for _ in range(64)]
        found = []
        for policy in (plain, fast):
            policy.zero_grad()
            call: dict[str, Any] = {"steps": PATIENCE - 2, "cfg_strength": 2.0, "cache": False}
            # several solves in one backward() share what their gradients are summed in
            sum(policy.sample(mel, ids, duration, seed=seed, **call)[0].square().mean() for seed in seeds).backward()
            found.append([weight.grad for weight in policy.parameters()])
        for ours, theirs in zip(found[1], found[0], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9
        for policy in (plain, fast):  # another optimizer step does not need another graph
            change_data_in_place(policy)
    assert len(fast.fast._gradients._graphs._graphs) == 2


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_at_every_length() -> None:
    plain, fast = fast_cfm()
    fast.speed_up(cuda_graphs=False)
    for duration in (40, 41, 47):
        assert_close(spoken(fast, duration=duration), spoken(plain, duration=duration), rtol=1e-5, atol=1e-5)
    found = []
    for policy in (plain, fast):
        spoken(policy, cache=False).square().mean().backward()
        found.append(policy.transformer.transformer_blocks[0].attn.to_q.weight.grad)
    assert (found[1] - found[0]).norm() <= 1e-4 * found[0].norm()
