"""The parts of a run from its options: prompts, rewards, recognizer, pipeline on its device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from rlhf_mel.algorithms.base import Algorithm
from rlhf_mel.algorithms.families.pairs import clip_prompts
from rlhf_mel.data.preferences.load import PreferenceDataset, load_preferences
from rlhf_mel.data.prompt_files import table_of
from rlhf_mel.data.prompts import PromptDataset, PromptOptions, load_dataset_prompts, load_prompts
from rlhf_mel.flow.lora import add_lora
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.progress import progress
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
        recompute=args.recompute,
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


def as_prompts(given: Any, args: RLHFConfig, policy: Any, *, held_out: bool) -> PromptDataset:
    """The prompts, all of which the policy can read: given as such, by name, or as a table (load_dataset_prompts)."""
    prompts = (args.eval_prompts if held_out else args.train_prompts) if given is None else given
    if not isinstance(prompts, PromptDataset):
        options = PromptOptions(prepare_references=args.prepare_references, duration_rule=args.duration_rule)
        named: Any = dict(columns=args.prompt_columns or {}, mel_spec=policy.mel_spec, options=options)
        split = args.dataset_test_split if held_out else args.dataset_train_split
        if not isinstance(prompts, str | Path):
            prompts = load_dataset_prompts(prompts, split=split, **named)
        elif str(prompts).startswith(HUB_DATASETS):
            prompts = load_dataset_prompts(str(prompts).removeprefix(HUB_DATASETS), split=split, **named)
        else:
            prompts = load_prompts(prompts, split="heldout" if held_out else "train", **named)
    if policy.tokenizer is not None:
        prompts.check_texts(policy.tokenizer)
    return prompts


def training_data(given: Any, args: RLHFConfig, policy: Any, algorithm: Algorithm) -> PromptDataset | PreferenceDataset:
    """What the algorithm learns from: prompts, or where it learns from pairs the preferences given or named.

    Raises:
        ValueError: it is the other of the two, or some rows cannot be used.
    """
    if isinstance(given, PreferenceDataset if not algorithm.learns_from_pairs else PromptDataset):
        wanted = "preferences" if algorithm.learns_from_pairs else "prompts"
        raise ValueError(
            f"train_dataset: expected {wanted}, which algorithm {args.algorithm!r} learns from with these options, got "
            f"a {type(given).__name__}; give the other, or choose another algorithm"
        )
    if not algorithm.learns_from_pairs:
        return as_prompts(given, args, policy, held_out=False)
    preferences = as_preferences(given, args, policy)
    algorithm.check_pairs(preferences)
    check_clips(preferences, policy, "reading pairs" if args.should_save else None)
    return preferences


def as_preferences(given: Any, args: RLHFConfig, policy: Any) -> PreferenceDataset:
    """The pairs of clips."""
    preferences = args.train_preferences if given is None else given
    if isinstance(preferences, PreferenceDataset):
        return preferences
    if preferences is None:
        raise ValueError(
            f"algorithm {args.algorithm!r} learns from pairs of clips: expected train_preferences, got none; name a "
            "data set, or have the policy's own rollouts ranked by the rewards: --algorithm_kwargs '{\"online\": true}'"
        )
    options: Any = {"split": args.dataset_train_split, "mel_spec": policy.mel_spec, **args.preference_options}
    if not isinstance(preferences, str | Path):
        preferences = table_of(preferences, options["split"], name="train_dataset")
    loaded: Any = load_preferences(preferences, **options)
    if not isinstance(loaded, PreferenceDataset):
        raise ValueError("preference_kwargs: expected pairs that can be shuffled, got streaming; remove it")
    return loaded


def check_clips(preferences: PreferenceDataset, policy: Any, shown_as: str | None = None) -> None:
    """Raise unless the policy could have said every clip: its mels, its texts, its references, and its lengths.

    Every pair is read once, about 20 ms each, so that a bad one stops the run at its start.
    """
    if preferences.mel_spec != policy.mel_spec:
        raise ValueError(
            f"{preferences.name}: expected clips as mels of the policy, {policy.mel_spec}, got {preferences.mel_spec}; "
            "load them with its mel_spec"
        )
    problems = []
    for number in progress(range(len(preferences)), shown_as):
        row = preferences[number]
        try:
            policy.durations(clip_prompts(preferences.collate([row])))
        except ValueError as error:
            lacking = "no reference_audio: " if row.get("reference_audio") is None else ""
            problems.append(f"row {number} (id {row.get('id')!r}): {lacking}{error}")
    if problems:
        listed = "\n  ".join(problems[:10]) + ("\n  ..." if len(problems) > 10 else "")
        raise ValueError(
            f"{len(problems)} of {len(preferences)} pairs of {preferences.name} do not suit the policy; remove them, "
            f"or take another policy:\n  {listed}"
        )


def heldout_prompts(given: Any, args: RLHFConfig, policy: Any) -> PromptDataset | None:
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
