"""Averages of weights: numbers by hand, the policy that runs on them, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from problems import tiny_policy, tiny_prompts
from small_runs import metrics, same_weights, trainer, write_dataset
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_mel.f5.checkpoints import load_policy
from rlhf_mel.flow.ema import LaggedPolicy, MovingAverage, check_lag, warmed_up
from rlhf_mel.flow.lora import add_lora


class Scalar(nn.Module):
    """velocity = weight * x + frozen."""

    def __init__(self, weight: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[weight]], dtype=dtype))
        self.frozen = nn.Parameter(torch.tensor([10.0], dtype=dtype), requires_grad=False)

    def velocity(self, x: Tensor, t: Any = None, cond: Any = None) -> Tensor:
        return nn.functional.linear(x, self.weight, self.frozen)

    def set(self, weight: float) -> None:
        with torch.no_grad():
            self.weight.fill_(weight)


def test_the_average_by_hand() -> None:
    policy = Scalar(1.0)
    average = MovingAverage(policy)
    assert average.state_dict().keys() == {"weight"}, "frozen weights are not averaged"
    policy.set(3.0)
    average.update(0.75)  # 0.75 * 1 + 0.25 * 3
    assert average.state_dict()["weight"].item() == 1.5
    policy.set(-2.5)
    average.update(0.5)  # 0.5 * 1.5 - 0.5 * 2.5
    assert average.state_dict()["weight"].item() == -0.5
    average.update(0.0)
    assert average.state_dict()["weight"].item() == -2.5


def test_an_average_in_bfloat16_does_not_stand_still() -> None:
    """0.999 * 1 + 0.001 * 1.25 is 1.00025; in bfloat16 numbers near 1 are 2^-7 apart."""
    policy = Scalar(1.0, torch.bfloat16)
    average = MovingAverage(policy)
    policy.set(1.25)
    average.update(0.999)
    assert average.state_dict()["weight"].item() == pytest.approx(1.00025, abs=1e-6)
    with average.applied():
        assert policy.weight.dtype == torch.bfloat16


def test_the_average_is_in_place_inside_and_never_outside() -> None:
    policy = Scalar(1.0)
    average = MovingAverage(policy)
    policy.set(4.0)
    x = torch.ones(1, 1, 1)
    with average.applied() as averaged:
        assert averaged is policy and policy.velocity(x).item() == 11
    assert policy.velocity(x).item() == 14
    with pytest.raises(ZeroDivisionError), average.applied():
        _ = 1 / 0
    assert policy.velocity(x).item() == 14
    assert average.velocity(x, x, None).item() == 11 and not average.velocity(x, x, None).requires_grad


def test_a_graph_from_before_keeps_its_weights() -> None:
    """d (w^2 x) / dw = 2 w x at w = 4, whatever was in place between forward and backward."""
    policy = Scalar(1.0)
    average = MovingAverage(policy)
    policy.set(4.0)
    y = (policy.weight.square() * 3.0).sum()
    with average.applied():
        average.velocity(torch.ones(1, 1, 1), torch.ones(1), None)
    y.backward()
    assert policy.weight.grad is not None and policy.weight.grad.item() == 24


def test_autocast_does_not_confuse_the_two_sets_of_weights() -> None:
    """Autocast keeps the bfloat16 copy of a parameter, with or without its graph, until the context ends."""
    policy, x = Scalar(1.0), torch.ones(1, 1, 1)
    average = MovingAverage(policy)
    policy.set(4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert average.velocity(x, x, None).item() == 11
        y = policy.velocity(x)
        assert y.item() == 14 and average.velocity(x, x, None).item() == 11
    y.sum().backward()
    assert policy.weight.grad is not None and policy.weight.grad.item() == 1


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_averaged_policy_is_the_policy_that_was(lora: bool) -> None:
    policy: Any = tiny_policy()
    if lora:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policy = add_lora(policy, LoraConfig(r=2, init_lora_weights=False))
    prompts = tiny_prompts().select([0, 2])
    policy.eval()
    cond = policy.encode(prompts)
    x, t = policy.prior(cond, torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.7])
    want = policy.velocity(x, t, cond).detach()
    average = MovingAverage(policy)
    assert len(average.state_dict()) == sum(p.requires_grad for p in policy.parameters())
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    policy.train()
    assert torch.equal(average.velocity(x, t, average.encode(prompts)), want), "also its encoding, also without dropout"
    assert policy.training and not torch.allclose(policy.eval().velocity(x, t, policy.encode(prompts)), want, atol=1e-3)


def test_states_come_back_and_foreign_ones_are_refused() -> None:
    policy = Scalar(1.0)
    average, other = MovingAverage(policy), MovingAverage(Scalar(7.0))
    average.load_state_dict(other.state_dict())
    assert average.state_dict()["weight"].item() == 7
    with pytest.raises(ValueError, match=r"expected those of the 1 that are trained, got 0.*LoRA options"):
        average.load_state_dict({})


def test_warm_up_by_hand() -> None:
    assert [warmed_up(0.9, updates) for updates in (0, 8, 1000)] == [0.1, 0.5, 0.9]


def test_the_lagged_policy_moves_between_collections_only() -> None:
    policy, lagged = Scalar(0.0), LaggedPolicy(rate=0.25, maximum=0.6)

    def old() -> float:
        return lagged.refreshed(policy).state_dict()["weight"].item()

    assert old() == 0
    policy.set(8.0)
    assert old() == 0, "no update yet"
    lagged.on_update()
    assert old() == 6.0, "after one update, decay 0.25: 0.25 * 0 + 0.75 * 8"
    assert old() == 6.0, "a second batch of the same collection"
    policy.set(16.0)
    lagged.on_update()
    lagged.on_update()
    assert old() == pytest.approx(0.6 * 6 + 0.4 * 16), "after three, decay min(0.75, 0.6)"


def test_the_lagged_policy_resumes() -> None:
    policy, lagged = Scalar(0.0), LaggedPolicy(rate=0.25, maximum=0.6)
    lagged.refreshed(policy)
    policy.set(8.0)
    lagged.on_update()
    resumed = LaggedPolicy(rate=0.25, maximum=0.6)
    resumed.load_state_dict(lagged.state_dict())  # before it has seen a policy
    assert resumed.refreshed(policy).state_dict() == lagged.refreshed(policy).state_dict() == {"weight": 6.0}
    unused = LaggedPolicy(rate=0.25, maximum=0.6)
    unused.load_state_dict(LaggedPolicy(rate=0.25, maximum=0.6).state_dict())
    assert unused.refreshed(policy).state_dict()["weight"].item() == 8


@pytest.mark.parametrize(("rate", "maximum"), [(-0.1, 0.5), (0.1, 1.0), (0.1, -0.1)])
def test_decays_out_of_range_are_refused(rate: float, maximum: float) -> None:
    with pytest.raises(ValueError, match=r"old_decay_(rate|max) of nft: expected a number"):
        check_lag("nft", rate, maximum)


class Remember(TrainerCallback):
    """The policy's weights after each update."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append(flat(model.policy))


def flat(policy: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])


def test_a_run_evaluates_and_saves_its_average_apart(tmp_path: Path) -> None:
    """Decays min(0.15, (1 + n) / (10 + n)) = 0.1, 0.15, 0.15 of three updates."""
    seen, dataset = Remember(), write_dataset(tmp_path)
    options: dict[str, Any] = dict(ema_decay=0.15, max_steps=3, save_steps=2, save_total_limit=None)
    run = trainer(
        tmp_path, dataset, callbacks=[seen], num_eval_prompts=1, eval_strategy="steps", eval_steps=3, **options
    )
    average = flat(run.policy)
    run.train()
    for weights, decay in zip(seen.weights, (0.1, 0.15, 0.15), strict=True):
        average = decay * average + (1 - decay) * weights
    summary = json.loads((tmp_path / "summary.json").read_text())
    torch.testing.assert_close(flat(load_policy(summary["policy_ema"])), average, rtol=1e-5, atol=1e-7)
    assert torch.equal(flat(load_policy(summary["policy"])), seen.weights[-1])
    assert same_weights(load_policy(summary["policy"]), run.policy), "the online weights are back in place"
    (evaluated,) = [line for line in metrics(tmp_path) if "eval_reward" in line]
    assert evaluated["eval_ema_reward"] == summary["after_ema"]["reward"] != evaluated["eval_reward"]
    assert evaluated["eval_reward"] == summary["after"]["reward"]

    whole = flat(load_policy(summary["policy_ema"]))
    trainer(tmp_path, dataset, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(flat(load_policy(summary["policy_ema"])), whole), "resumed to the bit"


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path)
    trainer(tmp_path, dataset, max_steps=1, save_steps=1).train()
    with pytest.raises(ValueError, match=r"expected ema\.pt, which this run's algorithm or ema_decay needs, got none"):
        trainer(tmp_path, dataset, ema_decay=0.9).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="ema_decay must be a number of at least 0 and below 1, got 1"):
        trainer(tmp_path, dataset, ema_decay=1)
