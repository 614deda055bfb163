"""RLHFTrainer: resuming, determinism and data parallelism to the last bit, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import re
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from datasets import Audio as AudioFeature
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from safetensors.torch import load_file
from small_runs import TEXTS, Near, Voice, metrics, policy, quietness, same_weights, trainer, write_dataset
from torch import Tensor
from transformers import TrainerCallback

from rlhf_mel.algorithms.base import AlgorithmBase
from rlhf_mel.data.prompts import PromptDataset
from rlhf_mel.f5.checkpoints import load_policy
from rlhf_mel.f5.export import load_lora
from rlhf_mel.flow.noise import mix_seed
from rlhf_mel.flow.policy import rollout
from rlhf_mel.metrics import Metrics
from rlhf_mel.pipeline import Pipeline
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.speech.text import CharTokenizer
from rlhf_mel.training.arguments import parse_arguments
from rlhf_mel.training.config import RLHFConfig, resolved
from rlhf_mel.training.trainer import RLHFTrainer
from rlhf_mel.types import Prompts


@pytest.fixture
def dataset(tmp_path: Path) -> PromptDataset:
    return write_dataset(tmp_path)


def test_one_seed_is_one_run(tmp_path: Path, dataset: PromptDataset) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        runs.append(trainer(tmp_path / name, dataset, seed=seed))
        runs[-1].train()
    first, again, other = (metrics(tmp_path / name) for name in "abc")
    assert first == again and same_weights(runs[0].policy, runs[1].policy)
    assert first[0]["reward"] != other[0]["reward"] and not same_weights(runs[0].policy, runs[2].policy)
    assert first[0]["reward"] != first[1]["reward"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, dataset: PromptDataset, lora: bool) -> None:
    # 5 prompts twice, batches of 2, 2 micro-batches: the third update ends epoch 0, the run is cut inside epoch 1.
    options: dict[str, Any] = dict(
        max_steps=6,
        save_steps=4,
        save_total_limit=None,
        gradient_accumulation_steps=2,
        num_generations=2,
        lr_scheduler_type="linear",
    )
    peft = LoraConfig(r=2) if lora else None
    whole = trainer(tmp_path / "run", dataset, peft=peft, **options)
    whole.train()
    uninterrupted = metrics(tmp_path / "run")
    assert [line["step"] for line in uninterrupted] == [1, 2, 3, 4, 5, 6]
    assert uninterrupted[-1]["epoch"] > 1

    resumed = trainer(tmp_path / "run", dataset, peft=peft, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert metrics(tmp_path / "run") == uninterrupted
    assert same_weights(resumed.policy, whole.policy)


class Replay(AlgorithmBase):
    """Collects noise and the texts, follows neither, and counts the updates in a state of its own."""

    name = "replay"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        pass

    def __init__(self, config: Config | None = None, *, beta: float = 0.0) -> None:
        self.updates = 0
        self.seen: list[tuple[int, list[str], float]] = []

    def collect(self, pipeline: Pipeline, prompts: Prompts, generator: torch.Generator) -> tuple[list[str], float]:
        assert not torch.is_grad_enabled()
        return list(prompts.texts), torch.rand((), generator=generator).item()

    def loss(self, pipeline: Pipeline, collected: Any, generator: torch.Generator) -> tuple[Tensor, Metrics]:
        self.seen.append((self.updates, *collected))
        return 0.0 * sum(p.sum() for p in pipeline.policy.parameters()), {"reward": torch.tensor([collected[1]])}

    def on_update(self, pipeline: Pipeline) -> None:
        self.updates += 1

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]


@pytest.mark.filterwarnings("ignore:first update")  # its loss is 0
def test_num_iterations_updates_learn_from_the_same_rollouts(tmp_path: Path, dataset: PromptDataset) -> None:
    # 5 prompts in updates of 2 micro-batches of 2: two blocks an epoch, the second filled up with two first rows.
    options: dict[str, Any] = dict(
        algorithm="test_trainer:Replay",
        num_iterations=3,
        gradient_accumulation_steps=2,
        max_steps=6,
        save_steps=3,
        save_total_limit=None,
    )
    run = trainer(tmp_path, dataset, **options)
    run.train()
    seen = run.model.algorithm.seen
    assert [update for update, *_ in seen] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "on_update follows each update"
    blocks = [[(texts, noise) for _, texts, noise in seen[start : start + 2]] for start in range(0, 12, 2)]
    assert blocks[0] == blocks[1] == blocks[2] and blocks[3] == blocks[4] == blocks[5]
    assert len({noise for block in (blocks[0], blocks[3]) for _, noise in block}) == 4, "fresh noise for each batch"
    texts = [text for block in (blocks[0], blocks[3]) for texts, _ in block for text in texts]
    assert set(texts) == set(TEXTS) and texts[5:] == texts[:3]

    resumed = trainer(tmp_path, dataset, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.model.algorithm.seen == seen[6:]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["flow_grpo", "ddpo"])
def test_a_black_box_reward_trains_and_resumes_to_the_bit(
    tmp_path: Path, dataset: PromptDataset, name: str, lora: bool
) -> None:
    own = {"window_size": 1, "window_shift_every": 2} if name == "flow_grpo" else {"per_prompt_buffer": 16}
    options: dict[str, Any] = dict(
        algorithm=name,
        algorithm_kwargs=own,
        sampling_steps=4,
        sway_sampling_coef=None,
        per_device_train_batch_size=4,
        num_generations=2,
        num_iterations=2,
        max_steps=6,
        save_steps=4,
        save_total_limit=None,
    )
    peft = LoraConfig(r=2, init_lora_weights=False) if lora else None
    whole = trainer(tmp_path, dataset, reward=quietness, peft=peft, **options)
    whole.train()
    uninterrupted = metrics(tmp_path)
    assert {"kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"} < uninterrupted[0].keys()
    assert uninterrupted[0]["reward"] == uninterrupted[1]["reward"] != uninterrupted[2]["reward"]
    assert uninterrupted[0]["clip_ratio/region_mean"] == 0, "the first ratio is 1"
    assert uninterrupted[1]["clip_ratio/region_mean"] > 0, "the second is not: the weights have moved"
    assert uninterrupted[-1]["kl"] > 0 and (lora or uninterrupted[0]["kl"] == 0)

    resumed = trainer(tmp_path, dataset, reward=quietness, peft=peft, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert metrics(tmp_path) == uninterrupted
    assert same_weights(resumed.policy, whole.policy)


def warned_at_start(run: RLHFTrainer) -> list[str]:
    """Train, and return what it warned of with the doctor's name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    return [str(warning.message) for warning in caught if "rlhf-mel doctor" in str(warning.message)]


BLACK_BOX: dict[str, Any] = dict(per_device_train_batch_size=4, sampling_steps=4, beta=0.0, sway_sampling_coef=None)


@pytest.mark.parametrize("name", ["draft", "flow_grpo", "ddpo"])
def test_a_healthy_run_starts_without_a_warning(tmp_path: Path, dataset: PromptDataset, name: str) -> None:
    reward = None if name == "draft" else quietness
    own = {"window_size": 1} if name == "flow_grpo" else {}
    run = trainer(
        tmp_path, dataset, algorithm=name, algorithm_kwargs=own, reward=reward, num_generations=2, **BLACK_BOX
    )
    assert warned_at_start(run) == []
    assert name == "draft" or metrics(tmp_path)[0]["ratio_error"] == 0, "the first ratio is 1"


@pytest.mark.parametrize(
    ("name", "own", "num_generations", "message"),
    [
        ("flow_grpo", {"window_size": 1}, 2, "expected rewards that differ within a group"),
        ("ddpo", {}, 1, "expected rewards that differ, got equal ones"),
    ],
)
def test_a_run_whose_rewards_are_equal_says_so_at_its_start(
    tmp_path: Path, dataset: PromptDataset, name: str, own: dict[str, int], num_generations: int, message: str
) -> None:
    def same(completions: list[Any], **columns: Any) -> list[float]:
        return [2.0] * len(completions)

    options = dict(algorithm=name, algorithm_kwargs=own, num_generations=num_generations, **BLACK_BOX)
    run = trainer(tmp_path, dataset, reward=same, **options)
    rewards, gradient = warned_at_start(run)
    assert rewards.startswith(f"4 fresh rollouts: {message}")
    assert gradient.startswith("first update: expected a finite gradient above 0, got one of norm 0;")


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(("factor", "norm"), [(0.0, "0"), (float("nan"), "nan"), (float("inf"), "(inf|nan)")])
def test_a_gradient_that_teaches_nothing_is_told_once(
    tmp_path: Path, dataset: PromptDataset, factor: float, norm: str, max_grad_norm: float
) -> None:
    # two updates of two micro-batches where the weights stay numbers, else one
    options = dict(max_steps=1 + (factor == 0), gradient_accumulation_steps=2, max_grad_norm=max_grad_norm)
    run = trainer(tmp_path, dataset, beta=0.0, **options)
    for weight in run.policy.parameters():
        weight.register_hook(lambda gradient: (gradient.abs() + 1) * factor)
    (said,) = warned_at_start(run)
    assert re.match(f"first update: expected a finite gradient above 0, got one of norm {norm};", said)


def test_a_replay_by_another_policy_is_told_at_the_start(tmp_path: Path, dataset: PromptDataset) -> None:
    # The velocity is higher by 0.05 after the rollout, and the epsilon so wide that no step is clipped.
    run = trainer(
        tmp_path,
        dataset,
        algorithm="flow_grpo",
        algorithm_kwargs={"epsilon": 1.0, "window_size": 1},
        reward=quietness,
        num_generations=2,
        **BLACK_BOX,
    )
    algorithm, own, drift = run.model.algorithm, run.policy.velocity, torch.zeros(())
    run.policy.velocity = lambda x, t, cond: own(x, t, cond) + drift
    collect = algorithm.collect

    def collect_and_drift(*arguments: Any) -> Any:
        drift.zero_()
        collected = collect(*arguments)
        drift.fill_(0.05)
        return collected

    algorithm.collect = collect_and_drift
    (said,) = warned_at_start(run)
    assert said.startswith("4 fresh rollouts: expected ratio 1, got others (off by 0.0")
    first = metrics(tmp_path)[0]
    assert first["clip_ratio/region_mean"] == 0 and first["ratio_error"] > 1e-3


def test_what_a_rollout_cannot_do_is_refused(tmp_path: Path, dataset: PromptDataset) -> None:
    with pytest.raises(ValueError, match="save_steps to be a multiple of num_iterations, got 100 and 3"):
        trainer(tmp_path, dataset, num_iterations=3)


def test_training_can_go_without_the_guidance_of_the_evaluation(tmp_path: Path, dataset: PromptDataset) -> None:
    assert trainer(tmp_path, dataset).pipeline.sampling.cfg_strength == 2.0
    run = trainer(tmp_path, dataset, train_cfg_strength=0.0, num_eval_prompts=1)
    assert run.pipeline.sampling.cfg_strength == 0.0 and run.args.cfg_strength == 2.0
    guided = trainer(tmp_path, dataset, num_eval_prompts=1)
    heard = [one._listen("before") for one in (run, guided)]
    assert heard[0].metrics["reward"] == heard[1].metrics["reward"]


def test_each_epoch_has_its_own_order(tmp_path: Path, dataset: PromptDataset) -> None:
    run = trainer(tmp_path, dataset)
    first = list(run._get_train_sampler())
    run.state.epoch = 0.8
    assert list(run._get_train_sampler()) == first
    run.state.epoch = 1.0
    assert list(run._get_train_sampler()) != first


def test_only_the_policy_is_trained_saved_and_wrapped(tmp_path: Path, dataset: PromptDataset) -> None:
    run = trainer(tmp_path, dataset, save_steps=1)
    before = policy()
    run.train()
    own = {f"policy.{name}" for name, _ in before.named_parameters()}
    assert {name for name, _ in run.model.named_parameters()} == own
    assert {name for name in load_file(tmp_path / "checkpoint-2/model.safetensors")} == {
        f"policy.{name}" for name in before.state_dict()
    }
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in run.policy.parameters()}
    assert not same_weights(run.policy, before)

    vocoder, (reward,) = run.pipeline.vocoder, run.pipeline.rewards.models
    assert vocoder.gain.item() == 0.5 and reward.target.item() == pytest.approx(0.1)
    assert not vocoder.gain.requires_grad and not reward.target.requires_grad
    prompts = dataset.collate([dataset[0]])
    assert run.pipeline.reference is not None
    untrained = before.eval().encode(prompts).text
    assert torch.equal(run.pipeline.reference.encode(prompts).text, untrained)


def test_prompts_come_as_any_table_and_their_columns_reach_the_rewards(tmp_path: Path, dataset: PromptDataset) -> None:
    """The same run from a PromptDataset, from tables of `datasets` and from rows; `wish` is no column of prompts."""
    clip = {"path": None, "bytes": (tmp_path / "voice.wav").read_bytes()}
    rows = [
        {"sentence": text, "reference_audio": clip, "reference_text": "abc", "wish": float(number)}
        for number, text in enumerate(TEXTS)
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    table = Dataset.from_dict(columns).cast_column("reference_audio", AudioFeature(decode=False))
    tables: dict[str, Any] = {
        "Dataset": (table, table),
        "DatasetDict": (DatasetDict({"train": table, "test": table}),) * 2,
        "IterableDataset": (table.to_iterable_dataset(), table.to_iterable_dataset()),
        "rows": (rows, rows),
    }
    heard: list[list[float]] = []

    def wishes(completions: list[Any], wish: list[float], **others: Any) -> list[float]:
        heard.append(wish)
        return quietness(completions)

    seen = {}
    for kind, (train, test) in tables.items():
        args = RLHFConfig(
            output_dir=str(tmp_path / kind),
            use_cpu=True,
            max_steps=2,
            algorithm="awm",
            num_generations=2,
            per_device_train_batch_size=2,
            sampling_steps=3,
            num_eval_prompts=2,
            recognizer="none",
            noise_floor=False,
            prompt_columns={"text": "sentence"},
        )
        parts: dict[str, Any] = dict(vocoder=Voice(), train_dataset=train, eval_dataset=test)
        heard.clear()
        RLHFTrainer(policy(), reward_models=wishes, args=args, **parts).train()
        seen[kind] = metrics(tmp_path / kind)
        assert heard[0] == heard[-1] == [0.0, 1.0]  # held-out prompts, before and after
        assert all(row[0] == row[1] for row in heard[1:-1])  # two rollouts of one prompt
    assert all(run == seen["rows"] for run in seen.values())
    with pytest.raises(ValueError, match=r"expected split 'test', got splits \['train'\]"):
        RLHFTrainer(policy(), wishes, args, vocoder=Voice(), train_dataset=rows, eval_dataset={"train": rows})


def test_blocks_are_compiled_and_nothing_else(tmp_path: Path, dataset: PromptDataset) -> None:
    assert trainer(tmp_path, dataset).policy.fast is None
    run = trainer(tmp_path, dataset, torch_compile=True)
    assert run.policy.fast is not None and not run.args.torch_compile
    compiled = [name for name, module in run.model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == [f"policy.transformer.transformer_blocks.{k}" for k in range(len(compiled))] and compiled
    with pytest.raises(ValueError, match="cuda_graphs: expected a GPU, got cpu"):
        trainer(tmp_path, dataset, cuda_graphs=True)
    with pytest.raises(ValueError, match="torch_compile_backend and torch_compile_mode: expected none"):
        trainer(tmp_path, dataset, torch_compile_mode="max-autotune")


def test_kept_activations_give_the_same_gradient_without_a_second_run(tmp_path: Path, dataset: PromptDataset) -> None:
    ran, first = [], []
    for recompute in (True, False):
        folder = tmp_path / str(recompute)
        options: dict[str, Any] = dict(max_steps=1, algorithm_kwargs={"grad_steps": 3}, beta=0.0)
        run = trainer(folder, dataset, activation_checkpointing=recompute, **options)
        calls: list[int] = []
        run.policy.transformer.norm_out.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run.train()
        ran.append(len(calls))
        first.append(metrics(folder)[0])
        assert f"activation_checkpointing: {str(recompute).lower()}" in (folder / "config.yaml").read_text()
    assert ran[0] == 2 * ran[1] > 0  # all three steps of each solve run once more in backward()
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4)


def test_without_beta_there_is_no_reference(tmp_path: Path, dataset: PromptDataset) -> None:
    assert trainer(tmp_path, dataset, beta=0.0).pipeline.reference is None


def test_lora_trains_adapters_and_exports_plain_weights(tmp_path: Path, dataset: PromptDataset) -> None:
    run = trainer(tmp_path, dataset, peft=LoraConfig(r=2))
    base = {name: p.clone() for name, p in run.policy.named_parameters() if not p.requires_grad}
    run.train()
    assert base and all(torch.equal(p, base[n]) for n, p in run.policy.named_parameters() if n in base)
    assert all("lora_" in name for name, p in run.policy.named_parameters() if p.requires_grad)
    exported = load_policy(tmp_path / "policy")
    prompts = dataset.collate([dataset[0]])
    mels = [
        rollout(speaker, prompts, steps=2, grad_steps=0, generator=torch.Generator().manual_seed(0)).mel
        for speaker in (run.policy, exported, policy())
    ]
    torch.testing.assert_close(mels[0], mels[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mels[1], mels[2], atol=1e-3)
    adapted = load_lora(policy(), tmp_path / "adapter")
    adapted_mel = rollout(adapted, prompts, steps=2, grad_steps=0, generator=torch.Generator().manual_seed(0)).mel
    torch.testing.assert_close(mels[0], adapted_mel, rtol=1e-4, atol=1e-5)


def test_push_to_hub_uploads_the_judged_policy_and_its_card(
    tmp_path: Path, dataset: PromptDataset, monkeypatch: Any
) -> None:
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options["private"]))

        def upload_folder(self, **options: Any) -> str:
            calls.append((options["folder_path"], options["commit_message"]))
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    hub: dict[str, Any] = dict(push_to_hub=True, hub_model_id="me/mine", hub_token="secret", save_steps=1)
    run = trainer(tmp_path, dataset, **hub)
    run.train()
    assert "secret" not in (tmp_path / "config.yaml").read_text()
    assert calls == []  # neither a repository nor a checkpoint before the end
    assert run.push_to_hub() == "address"
    assert calls == ["secret", ("me/mine", True), (tmp_path / "policy", "Upload policy")]
    assert "draft" in (tmp_path / "policy/README.md").read_text()
    with pytest.raises(ValueError, match=r"expected commit_message alone, got \['blocking'\]"):
        run.push_to_hub(blocking=False)


def test_a_run_leaves_its_folder(tmp_path: Path, dataset: PromptDataset) -> None:
    run = trainer(tmp_path, dataset, num_eval_prompts=2, save_steps=2, adam_beta2=0.9)
    run.train()

    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    for name in ("loss", "reward", "reward_std", "rewards/near/mean", "rewards/near/std", "anchor", "grad_norm"):
        assert isinstance(lines[0][name], float), name
    assert lines[0]["anchor"] == 0 and lines[1]["anchor"] > 0
    assert lines[0]["loss"] == pytest.approx(-lines[0]["reward"]), "before the first update the anchor is 0"
    assert lines[0]["dropped_rollouts"] == 0

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["algorithm"], summary["seed"], summary["steps"], summary["device"]) == ("draft", 42, 2, "cpu")
    assert summary["after"]["reward"] > summary["before"]["reward"], "two steps of 1e-3 up the gradient"
    assert {"rewards/near/mean", "dnsmos_ovrl", "level_dbfs"} <= summary["before"].keys()
    assert summary["verdict"]["overall"] and summary["seconds"] > 0

    index = json.loads((tmp_path / "samples/index.json").read_text())
    assert [(item["id"], item["text"], item["voice"]) for item in index] == [("p0", "abc", "v"), ("p1", "a bad", "v")]
    for kind in ("before", "after", "reference"):
        assert soundfile.info(tmp_path / "samples" / index[1][kind]).samplerate == 24_000
    assert soundfile.info(tmp_path / "samples/reference_000.wav").frames == 2000
    rewards = [item["scores_before"]["reward"] for item in index]
    assert sum(rewards) / 2 == pytest.approx(summary["before"]["reward"])

    assert same_weights(load_policy(summary["policy"]), run.policy)
    assert (tmp_path / "report.html").stat().st_size > 1000
    named = ["--policy", "tiny", "--reward_models", "mos", "--reward_weights", "1", "--vocoder", "tiny"]
    again, _ = parse_arguments(["--config", str(tmp_path / "config.yaml"), *named])
    prompts = {"reward_weights": [1.0], "train_prompts": "prompts", "eval_prompts": "prompts"}
    assert resolved(again) == {**resolved(run.args), **prompts} and again.adam_beta2 == 0.9


def test_evaluation_between_updates_reports_with_eval_prefix(tmp_path: Path, dataset: PromptDataset) -> None:
    run = trainer(tmp_path, dataset, num_eval_prompts=1, eval_strategy="steps", eval_steps=2)
    run.train()
    (evaluated,) = [line for line in metrics(tmp_path) if "eval_reward" in line]
    assert evaluated["step"] == 2
    after = json.loads((tmp_path / "summary.json").read_text())["after"]
    assert evaluated["eval_reward"] == after["reward"] and evaluated["eval_dnsmos_ovrl"] == after["dnsmos_ovrl"]


class KeepGradients(TrainerCallback):
    """The gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run_rank(rank: int, folder: Path, port: int) -> None:
    """One of two data-parallel processes: a single update of all weights and one of LoRA, and their gradients."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    dataset = write_dataset(folder / str(rank))
    for kind, peft, heard in (("full", None, 1), ("lora", LoraConfig(r=2), 0)):
        keep = KeepGradients()
        run = trainer(folder / kind, dataset, [keep], peft, max_steps=1, max_grad_norm=0, num_eval_prompts=heard)
        run.train()
        torch.save(keep.gradients, folder / f"{kind}_{rank}.pt")
    torch.distributed.barrier()  # no rank leaves while the other still talks to it
    torch.distributed.destroy_process_group()
    # Without the interpreter's own end: gloo's threads were once seen to outlive it and abort. All is written.
    os._exit(0)


def test_two_processes_share_the_mean_gradient(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (tmp_path, port), nprocs=2)
    dataset = write_dataset(tmp_path / "alone")
    for kind, peft in (("full", None), ("lora", LoraConfig(r=2))):
        ranks = [torch.load(tmp_path / f"{kind}_{rank}.pt") for rank in (0, 1)]
        assert ranks[0].keys() == ranks[1].keys() and all(torch.equal(ranks[0][n], ranks[1][n]) for n in ranks[0])

        alone = trainer(tmp_path / "alone", dataset, peft=peft)
        order = list(alone._get_train_sampler())
        rewards: list[float] = []
        for rank in (0, 1):
            batch = dataset.collate([dataset[row] for row in order[2 * rank : 2 * rank + 2]])
            output = alone.model(collected=batch, noise_seed=mix_seed(42, 0, rank, 0))
            (output["loss"] / 2).backward()
            rewards += output["metrics"]["reward"].tolist()
        want = {name: p.grad for name, p in alone.model.named_parameters() if p.grad is not None}
        assert want.keys() == ranks[0].keys() and max(grad.abs().max() for grad in want.values()) > 1e-4
        for name in want:
            torch.testing.assert_close(ranks[0][name], want[name], rtol=1e-4, atol=1e-6, msg=name)
        (line,) = metrics(tmp_path / kind)
        assert line["reward"] == pytest.approx(sum(rewards) / 4) and line["reward_std"] > 0
    assert json.loads((tmp_path / "full/summary.json").read_text())["before"]["reward"] < 0


def test_policy_and_vocoder_must_mean_the_same_mel(tmp_path: Path, dataset: PromptDataset, monkeypatch: Any) -> None:
    monkeypatch.setattr(Voice, "mel_spec", MelSpec())
    with pytest.raises(ValueError, match=r"expected a vocoder of MelSpec.*hop_length=64.*got one of"):
        trainer(tmp_path, dataset)


def test_a_text_that_the_policy_cannot_read_stops_the_run_at_its_start(tmp_path: Path, dataset: PromptDataset) -> None:
    class Strict(CharTokenizer):
        def __call__(self, text: str) -> list[str]:
            if "j" in text:
                raise ValueError("no j")
            return list(text)

    run_policy = policy()
    run_policy.tokenizer = Strict()
    with pytest.raises(ValueError, match=r"1 of 5 rows.*\n.*row 4 .*no j"):
        RLHFTrainer(run_policy, Near(), RLHFConfig(use_cpu=True), vocoder=Voice(), train_dataset=dataset)


def test_save_model_exports_the_policy(tmp_path: Path, dataset: PromptDataset) -> None:
    run = trainer(tmp_path, dataset)
    run.save_model(str(tmp_path / "exported"))
    assert same_weights(load_policy(tmp_path / "exported"), run.policy)


def test_policy_and_prompts_come_from_where_the_config_says(tmp_path: Path, monkeypatch: Any) -> None:
    """A weight file of F5-TTS with the name of its model; a data set of `datasets`, its splits and its own columns."""
    asked: list[Any] = []
    monkeypatch.setattr("rlhf_mel.policies.load", lambda path, **how: asked.append((path, how)) or policy())
    write_dataset(tmp_path)
    for split, texts in (("train", TEXTS), ("validation", TEXTS[:2])):
        clips = [{"path": None, "bytes": (tmp_path / "voice.wav").read_bytes()} for _ in texts]
        columns = {"sentence": texts, "reference_audio": clips, "reference_text": ["abc"] * len(texts)}
        Dataset.from_dict(columns).cast_column("reference_audio", AudioFeature(decode=False)).to_parquet(
            tmp_path / f"set/data/{split}-00000-of-00001.parquet"
        )
    run = RLHFTrainer(
        reward_models=Near(),
        vocoder=Voice(),
        args=RLHFConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            policy="model_last.pt",
            policy_model="F5TTS_v1_Base",
            policy_vocab="vocab.txt",
            train_prompts=f"hf://datasets/{tmp_path / 'set'}",
            eval_prompts=f"hf://datasets/{tmp_path / 'set'}",
            dataset_test_split="validation",
            prompt_columns={"text": "sentence"},
            recognizer="none",
            num_eval_prompts=9,
        ),
    )
    assert asked == [("model_last.pt", {"model": "F5TTS_v1_Base", "vocab": "vocab.txt", "weights": None})]
    assert [run.prompts[row]["text"] for row in range(len(run.prompts))] == list(TEXTS)
    assert run.heldout is not None and len(run.heldout) == 2
