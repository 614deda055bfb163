"""RLHFTrainer: `transformers.Trainer` driving an algorithm, and the run folder it leaves behind.

    loss(theta) = algorithm.loss(algorithm.collect(policy -> vocoder -> rewards))

What Accelerate wraps is `UpdateLoss`: the policy is its only child, its `forward` is the loss. So DDP's hooks fire,
and what is frozen (vocoder, rewards, reference policy) is in no bucket, checkpoint or optimizer. Gradient accumulation,
clipping, schedules, checkpoints and resuming are the Trainer's.

What `collect` returns is kept for `num_iterations` updates, in TRL's sense: with G micro-batches an update, batches
b1..bG are collected in the first update and used again, in that order, by the next ones. Only checkpoints between two
collections, at multiples of num_iterations, resume to the bit; from any other the batches are collected anew.

The noise of every update is a function of (seed, step, process, micro-batch) and the order of the prompts one of (seed,
epoch): a resumed run needs no saved generator to continue as the uninterrupted one.

    output_dir/  config.yaml  metrics.jsonl  checkpoint-N/  samples/  summary.json  report.html  policy/

With `ema_decay` an average of the trained weights follows them (see ema.py), is evaluated beside them (`eval_ema_*`,
`after_ema`) and saved as policy_ema/.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from typing_extensions import override

from rlhf_mel import policies
from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.data.preferences.load import PairBatch, PreferenceDataset
from rlhf_mel.data.prompts import PromptDataset
from rlhf_mel.data.sampler import GroupSampler
from rlhf_mel.evaluation.evaluate import EvaluationResult, evaluate
from rlhf_mel.evaluation.report import write_report
from rlhf_mel.evaluation.verdict import in_words, verdict
from rlhf_mel.f5.export import push_to_hub, save_lora
from rlhf_mel.flow.ema import MovingAverage
from rlhf_mel.flow.noise import mix_seed
from rlhf_mel.metrics import Metrics, pool
from rlhf_mel.progress import duration
from rlhf_mel.rewards.base import RewardSpec
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.recognizer import Recognizer
from rlhf_mel.training.build import (
    as_recognizer,
    as_rewards,
    build_pipeline,
    check_launch,
    freeze,
    heldout_prompts,
    sampling_of,
    training_data,
)
from rlhf_mel.training.callbacks import AfterUpdate, Console, FirstGradient, FollowWeights, MetricsFile, StepClock
from rlhf_mel.training.config import RLHFConfig, save_config
from rlhf_mel.training.first_batch import check_first_batch
from rlhf_mel.training.run_folder import evaluation_line, write_json, write_samples
from rlhf_mel.training.sources import given_parts, given_rewards
from rlhf_mel.training.update import UpdateLoss
from rlhf_mel.types import Prompts
from rlhf_mel.vocoders import Vocoder, load_vocoder

ALGORITHM_STATE = "algorithm.pt"
"""File of a checkpoint with the state of an algorithm that has one."""


EMA_STATE = "ema.pt"
"""File of a checkpoint with the averaged weights, if there are any."""


class RLHFTrainer(Trainer):
    """Trains `policy` towards what `reward_models` like, or by preferences.

    Args:
        policy: a policy or the name of one; it is trained in place. None: `args.policy`.
        reward_models: rewards, or names of them; None: `args.reward_models`.
        args: the run; None: the defaults, which name the bundled models.
        vocoder: an object or a name; None: `args.vocoder`. It is frozen.
        recognizer: likewise.
        train_dataset: prompts, a name of them, or a table: a `datasets.Dataset`, a DatasetDict (`dataset_train_split`),
            their iterable kinds (read to their end, into memory), a list of rows; its columns go by
            `args.prompt_columns`, those that prompts do not have reach the rewards. None: what `args` names. Where the
            algorithm learns from pairs of clips, the same of preferences (`load_preferences`); the rewards are then
            heard in evaluations only.
        eval_dataset: prompts, in the same ways (`dataset_test_split`); the first `args.num_eval_prompts` are heard
            before and after training.
        peft_config: train LoRA adapters instead of all weights.
        callbacks: of transformers.
    """

    args: RLHFConfig

    def __init__(
        self,
        policy: Any = None,
        reward_models: RewardSpec | Sequence[RewardSpec] | Rewards | None = None,
        args: RLHFConfig | None = None,
        *,
        vocoder: Vocoder | str | None = None,
        recognizer: Recognizer | str | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        args = args or RLHFConfig()
        check_launch(args)
        self.peft_config = peft_config
        algorithm = load_algorithm(args.algorithm, args.algorithm_options, beta=args.beta or 0.0)
        rewards = as_rewards(reward_models, args)
        self.given = given_rewards(reward_models, rewards) | given_parts(
            policy=policy,
            vocoder=vocoder,
            recognizer=recognizer,
            eval_prompts=eval_dataset,
            **{"train_preferences" if algorithm.learns_from_pairs else "train_prompts": train_dataset},
        )
        if not isinstance(policy, nn.Module):
            policy = policies.load(
                policy or args.policy, model=args.policy_model, vocab=args.policy_vocab, weights=args.policy_weights
            )
        policies.check(policy, str(args.policy))
        vocoder = load_vocoder(vocoder or args.vocoder) if vocoder is None or isinstance(vocoder, str) else vocoder
        self.prompts = training_data(train_dataset, args, policy, algorithm)
        """Or pairs of clips, with the prompts that they answer."""
        self.heldout = heldout_prompts(eval_dataset, args, policy)
        self.recognizer = as_recognizer(args.recognizer if recognizer is None else recognizer, self.heldout)
        self.pipeline = build_pipeline(policy, vocoder, rewards, args, peft_config)
        algorithm.check(self.pipeline)
        for part in (vocoder, *rewards.models, self.recognizer):
            freeze(part, args.device)
        self._pending: list[Metrics] = []
        self._micro_batch = (-1, 0)
        self._collected: dict[int, Any] = {}
        self._clock = StepClock()
        self._update_loss = UpdateLoss(algorithm, self.pipeline)
        self.average = None if args.ema_decay is None else MovingAverage(self.pipeline.policy)
        super().__init__(
            model=self._update_loss,
            args=args,
            data_collator=partial(_collate, self.prompts),
            train_dataset=self.prompts,
            eval_dataset=self.heldout,
            callbacks=[*self._run_callbacks(args), *(callbacks or [])],
        )
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(Console())

    def _run_callbacks(self, args: RLHFConfig) -> list[TrainerCallback]:
        follow = [] if self.average is None else [FollowWeights(self.average, args.ema_decay or 0.0)]
        metrics = MetricsFile(Path(args.output_dir))
        return [self._clock, AfterUpdate(self._update_loss), FirstGradient(), *follow, metrics]

    @property
    def policy(self) -> Any:
        """The policy that is trained, without what wraps it."""
        return self.pipeline.policy

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """Listen to the held-out prompts, train, listen again; then write policy, samples, summary and report."""
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_config(folder / "config.yaml", self.args, self.peft_config, self.given)
            print(self._title(), flush=True)
        self._micro_batch = (-1, 0)
        self._collected.clear()
        started = time.monotonic()
        before = self._listen("before")
        floor = self._listen("another seed", seed=self.args.seed + 1) if self.args.noise_floor else None
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        after = self._listen("after")
        after_ema = self._listen_averaged("after")
        if self.args.should_save:
            policies.save(self.policy, folder / "policy")
            if self.peft_config is not None:
                save_lora(self.policy, folder / "adapter", base=self.given.get("policy", self.args.policy))
            self._write_results(folder, before, after, after_ema, floor, seconds=time.monotonic() - started)
        self.accelerator.wait_for_everyone()
        return output

    def _title(self) -> str:
        trained = sum(p.numel() for p in self.policy.parameters() if p.requires_grad) / 1e6
        rewards = " + ".join(self.pipeline.rewards.names)
        where = f"{self.args.world_size} x {_device_name(self.args.device)}"
        towards, rows = f"towards {rewards}", "prompts"
        if isinstance(self.prompts, PreferenceDataset):
            towards, rows = "by preferences", "pairs"
        return f"{self.args.algorithm}: {trained:.1f} M parameters {towards}, {len(self.prompts)} {rows}, {where}"

    @override
    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Float[Tensor, ""]:
        at_start = self._micro_batch[0] < 0
        step, index = self._next_micro_batch()
        # The same in a resumed run, different everywhere else.
        where = (self.args.seed, step, self.args.process_index, index)
        (batch,) = inputs.values()
        collected = self._collect(batch, step, index, mix_seed(*where, 1))
        outputs = model(collected=collected, noise_seed=mix_seed(*where))
        if at_start:
            check_first_batch(self._update_loss.algorithm, outputs["metrics"])
        self._pending.append(outputs["metrics"])
        loss: Tensor = outputs["loss"]
        return loss

    def _next_micro_batch(self) -> tuple[int, int]:
        """The update that is under way, and which of its micro-batches this is."""
        step, index = self._micro_batch
        self._micro_batch = (self.state.global_step, index + 1 if step == self.state.global_step else 0)
        return self._micro_batch

    def _collect(self, batch: Prompts | PairBatch, step: int, index: int, noise_seed: int) -> Any:
        """What micro-batch `index` learns from: of this update if it is the first of its iterations, else kept."""
        if step % self.args.num_iterations == 0 or index not in self._collected:
            if isinstance(batch, Prompts):
                self.pipeline.rewards.check(batch)
            with self.accelerator.autocast():  # as in the loss, so that both compute the same numbers
                self._collected[index] = self._update_loss.collect(batch, noise_seed)
        return self._collected[index]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of all updates, micro-batches and processes since the last line."""
        if "loss" in logs:
            logs |= self._pooled() | {"step_time": self._clock.pop()}
        super().log(logs, start_time)

    def _pooled(self) -> dict[str, float]:
        mine = [{name: value.flatten().tolist() for name, value in batch.items()} for batch in self._pending]
        self._pending.clear()
        return pool(gather_object(mine))

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupSampler:
        return GroupSampler(
            len(self.prompts),
            num_generations=self.args.num_generations,
            num_iterations=self.args.num_iterations,
            rollouts_per_update=self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What evaluation.evaluate says of the held-out prompts; in a distributed run the main process listens."""
        result = self._listen(f"step {self.state.global_step}")
        averaged = self._listen_averaged(f"step {self.state.global_step}")
        shared = [{} if result is None else result.metrics, {} if averaged is None else averaged.metrics]
        broadcast_object_list(shared)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in shared[0].items()}
        metrics |= {f"{metric_key_prefix}_ema_{name}": value for name, value in shared[1].items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _listen(self, when: str, seed: int | None = None) -> EvaluationResult | None:
        """Evaluate on the main process, the others wait; None there, and where there is no held-out prompt."""
        started = time.monotonic()
        result = None
        if self.heldout and self.args.should_save:
            result = evaluate(
                self.policy,
                self.pipeline.vocoder,
                self.pipeline.rewards,
                _all_prompts(self.heldout).to(self.args.device),
                sampling=sampling_of(self.args, cfg_strength=self.args.cfg_strength),
                seed=self.args.seed if seed is None else seed,
                recognizer=self.recognizer,
                batch_size=self.args.per_device_eval_batch_size,
                shown_as=f"{when:>8}",
            )
            line = evaluation_line(result.metrics)
            took = duration(time.monotonic() - started)
            print(f"{when:>8}: {len(self.heldout)} held-out prompts  {line}  ({took})", flush=True)
        self.accelerator.wait_for_everyone()
        return result

    def _listen_averaged(self, when: str) -> EvaluationResult | None:
        """The same of the averaged weights; None without any."""
        if self.average is None:
            return None
        with self.average.applied():
            return self._listen(f"{when}, ema")

    def _write_results(
        self,
        folder: Path,
        before: EvaluationResult | None,
        after: EvaluationResult | None,
        after_ema: EvaluationResult | None,
        floor: EvaluationResult | None,
        seconds: float,
    ) -> None:
        summary: dict[str, Any] = {
            "algorithm": self.args.algorithm,
            "seed": self.args.seed,
            "steps": self.state.global_step,
            "seconds": round(seconds, 1),
            "device": _device_name(self.args.device),
            "before": before.metrics if before else {},
            "after": after.metrics if after else {},
            "verdict": verdict(before, after, floor) if before and after else {},
            "policy": str(folder / "policy"),
        }
        if self.average is not None:
            with self.average.applied():
                policies.save(self.policy, folder / "policy_ema")
            summary["after_ema"] = after_ema.metrics if after_ema else {}
            summary["policy_ema"] = str(folder / "policy_ema")
        write_json(folder / "summary.json", summary)
        if self.heldout and before and after:
            write_samples(folder / "samples", _all_prompts(self.heldout), before, after)
            print("\n".join(f"          {line}" for line in in_words(summary["verdict"])), flush=True)
            print(f" verdict: {summary['verdict']['overall']}", flush=True)
        print(f"  report: {write_report(folder)}", flush=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Adds the algorithm's own state, where it has one, and the averaged weights, where there are any."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        for name, owner in self._owners_of_state():
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(owner.state_dict(), folder / name)
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, owner in self._owners_of_state():
            file = Path(resume_from_checkpoint) / name
            if not file.exists():
                raise ValueError(
                    f"checkpoint {resume_from_checkpoint}: expected {name}, which this run's algorithm or ema_decay "
                    "needs, got none; resume with the options that it was written with"
                )
            owner.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def _owners_of_state(self) -> list[tuple[str, Any]]:
        """What a checkpoint holds beside weights and optimizer: file names, and whose state they are."""
        algorithm = self._update_loss.algorithm
        owners = [(ALGORITHM_STATE, algorithm)] if hasattr(algorithm, "state_dict") else []
        return owners if self.average is None else [*owners, (EMA_STATE, self.average)]

    def push_to_hub(self, commit_message: str | None = "Upload policy", **kwargs: Any) -> str:  # type: ignore[override]
        """Upload the policy with a card of what the run measured (export.push_to_hub), after `train`."""
        if kwargs:
            raise ValueError(f"push_to_hub of RLHFTrainer: expected commit_message alone, got {sorted(kwargs)} as well")
        if not self.args.should_save:
            return ""
        folder = Path(self.args.output_dir)
        return push_to_hub(
            self.policy,
            self.args.hub_model_id or folder.resolve().name,
            base=self.given.get("policy", self.args.policy),
            folder=folder / "policy",
            run=folder,
            private=self.args.hub_private_repo is not False,
            token=self.args.hub_token,
            commit_message=commit_message or "Upload policy",
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing yet: `push_to_hub` makes the repository."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: a checkpoint in the middle is no policy that was judged."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Export the policy alone (checkpoints of the Trainer hold the same weights under `policy.`)."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
        elif self.args.should_save:
            policies.save(self.policy, output_dir or Path(self.args.output_dir) / "policy")


def _collate(
    dataset: PromptDataset | PreferenceDataset, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Prompts | PairBatch]:
    return {"pairs" if isinstance(dataset, PreferenceDataset) else "prompts": dataset.collate(rows)}


def _all_prompts(dataset: PromptDataset) -> Prompts:
    return dataset.collate([dataset[row] for row in range(len(dataset))])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
