"""The parts of a run from its options: prompts, rewards, recognizer, pipeline on its device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from rlhf_mel.data.prompts import PromptDataset, PromptOptions, load_dataset_prompts, load_prompts
from rlhf_mel.flow.lora import add_lora
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.rewards.base import RewardSpec
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.recognizer import Recognizer, load_recognizer
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.vocoders import Vocoder

HUB_DATASETS = "hf://datasets/"
"""How the Hugging Face libraries write where a data set is; before its id."""


def build_pipeline(
    policy: Any, vocoder: Vocoder, rewards: Rewards, args: RLHFConfig, peft_config: LoraConfig | None
) -> Pipeline:
    """The pipeline on the run's device: LoRA added, the reference copied, the policy compiled as `args` says.

    Raises:
        ValueError: policy and vocoder are of different mels, or the policy has no `speed_up` that was asked for.
    """
    if vocoder.mel_spec != policy.mel_spec:
        raise ValueError(
            f"policy and vocoder must mean the same by a mel: expected a vocoder of {policy.mel_spec}, "
            f"got one of {vocoder.mel_spec}; choose another --vocoder"
        )
    if peft_config is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)  # peft draws its first weights from the global generator of the CPU
            policy = add_lora(policy, peft_config)
    policy.to(args.device)  # before the reference is copied, so that it lies on the same device
    _speed_up(policy, args)
    return Pipeline(
        policy=policy,
        vocoder=vocoder,
        rewards=rewards,
        reference=ReferencePolicy(policy) if args.beta else None,
        sampling=sampling_of(
            args, cfg_strength=args.cfg_strength if args.train_cfg_strength is None else args.train_cfg_strength
        ),
        reward_batch_size=args.reward_batch_size,
    )


def sampling_of(args: RLHFConfig, *, cfg_strength: float) -> Sampling:
    """How the policy is solved in a run; guidance of training and of evaluation may differ."""
    return Sampling(
        steps=args.sampling_steps,
        cfg_strength=cfg_strength,
        sway_sampling_coef=args.sway_sampling_coef,
        method=args.solver,
    )


def _speed_up(policy: Any, args: RLHFConfig) -> None:
    on_gpu = args.device.type == "cuda"
    if args.cuda_graphs and not on_gpu:
        raise ValueError(f"cuda_graphs: expected a GPU, got {args.device}; remove the option")
    cuda_graphs = on_gpu if args.cuda_graphs is None else args.cuda_graphs
    if not (cuda_graphs or args.compile_policy):
        return
    if hasattr(policy, "speed_up"):
        policy.speed_up(compiled=args.compile_policy, cuda_graphs=cuda_graphs)
    elif args.cuda_graphs or args.compile_policy:
        raise ValueError(
            f"torch_compile, cuda_graphs: expected a policy with a method speed_up, as CFM has, got {type(policy)};"
            " remove the options"
        )


def check_launch(args: RLHFConfig) -> None:
    """Raise ValueError for a launch that is not supported: FSDP, DeepSpeed, or processes that do not work together."""
    if args.fsdp or args.deepspeed:
        raise ValueError(
            "FSDP and DeepSpeed are not supported yet: expected one device or DDP; launch with --multi_gpu"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"this is one of {launched} processes, but {args.world_size} work together: expected a launch on GPUs, or "
            "on CPUs with --use_cpu"
        )
    # Plain `python` on a machine with several GPUs would split each batch by nn.DataParallel, which knows no Prompts.
    args._n_gpu = min(args.n_gpu, 1)


def as_rewards(given: RewardSpec | Sequence[RewardSpec] | Rewards | None, args: RLHFConfig) -> Rewards:
    """The rewards given, or those that `args` names; weights and options are those of `args`.

    Raises:
        ValueError: Rewards that have their own weights and options were given beside those of `args`.
    """
    if isinstance(given, Rewards):
        for name in ("reward_weights", "reward_kwargs"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}: expected none beside Rewards, which have their own, got both; remove them")
        return given
    models: Any = args.reward_models if given is None else given if isinstance(given, list | tuple) else [given]
    return Rewards(models, args.reward_weights, args.reward_kwargs)  # type: ignore[arg-type]


def as_prompts(
    given: PromptDataset | str | Path | None, args: RLHFConfig, policy: Any, *, held_out: bool
) -> PromptDataset:
    """The prompts, all of which the policy can read."""
    prompts = (args.eval_prompts if held_out else args.train_prompts) if given is None else given
    if not isinstance(prompts, PromptDataset):
        options = PromptOptions(prepare_references=args.prepare_references, duration_rule=args.duration_rule)
        named: Any = dict(columns=args.prompt_columns or {}, mel_spec=policy.mel_spec, options=options)
        if str(prompts).startswith(HUB_DATASETS):
            split = args.dataset_test_split if held_out else args.dataset_train_split
            prompts = load_dataset_prompts(str(prompts).removeprefix(HUB_DATASETS), split=split, **named)
        else:
            prompts = load_prompts(prompts, split="heldout" if held_out else "train", **named)
    if policy.tokenizer is not None:
        prompts.check_texts(policy.tokenizer)
    return prompts


def heldout_prompts(given: PromptDataset | str | Path | None, args: RLHFConfig, policy: Any) -> PromptDataset | None:
    """The first `args.num_eval_prompts` of the held-out prompts; None where that is 0."""
    if args.num_eval_prompts == 0:
        return None
    return as_prompts(given, args, policy, held_out=True).head(args.num_eval_prompts)


def as_recognizer(given: Recognizer | str, heldout: PromptDataset | None) -> Recognizer | None:
    """The recognizer; None without anything to listen to, and for the name 'none'."""
    if heldout is None or given == "none":
        return None
    return load_recognizer(given) if isinstance(given, str) else given


def freeze(part: Any, device: torch.device) -> None:
    """Move a part in place, and see to it that it stays what it is."""
    if isinstance(part, nn.Module):
        part.to(device).requires_grad_(False).eval()
