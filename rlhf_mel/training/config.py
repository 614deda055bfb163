"""RLHFConfig: one dataclass for a run, in the words of TRL and transformers; its defaults are the bundled models.

`RLHFConfig` extends `transformers.TrainingArguments`; LoRA comes from TRL's `ModelConfig`. Both are filled by
`parse_arguments` from YAML (`--config file.yaml`) and from the command line over it. An unknown key, algorithm or
reward is an error that names what was expected, before any model is loaded.
"""

# ruff: noqa: RUF009 (what option() returns is a field of its own, not a value that runs share)
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from rlhf_mel.algorithms.base import Algorithm, algorithm_class, load_algorithm
from rlhf_mel.rewards.load import check_name, find_reward, options_of
from rlhf_mel.rewards.options import check_options

OF_LANGUAGE_MODELS = ("neftune_noise_alpha", "label_smoothing_factor", "use_liger_kernel", "train_sampling_strategy")
"""Options of transformers that nothing here reads; a run that sets them is refused."""


SHARED_OPTIONS = ("epsilon", "epsilon_high", "scale_rewards", "multi_objective_aggregation")
"""Options that algorithms have in common with TRL's GRPOConfig: fields of the run, handed to the algorithm's Config."""


NOT_SAVED = frozenset({"hub_token", "local_rank", "debug", "include_num_input_tokens_seen"})
"""A secret, the launcher's, and two whose defaults the command line gives in another form."""


def option(default: Any, text: str) -> Any:
    """A field of a run: its default (a function makes one that can be changed), and what --help says of it."""
    metadata = {"help": text.replace("%", "%%")}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


Config = TypeVar("Config", bound=type)


def no_type_check(config: Config) -> Config:
    """A mark for jaxtyping's import hook, which knows it by its name: transformers' own defaults break its types.

    (`typing.no_type_check` would take the types from the command line too.)
    """
    return config


@no_type_check
@dataclass
class RLHFConfig(TrainingArguments):
    """A run of `RLHFTrainer`. Every field of `TrainingArguments` works too; those below differ or are new."""

    _VALID_DICT_FIELDS = [  # noqa: RUF012, not annotated: a dataclass would make it a field
        *TrainingArguments._VALID_DICT_FIELDS,
        "algorithm_kwargs",
        "preference_kwargs",
        "prompt_columns",
        "reward_kwargs",
    ]

    policy: str = option(
        "tiny", "Flow to fine-tune: 'tiny' (bundled), a published name, a folder, a file, 'package.module:function'."
    )
    policy_model: str | None = option(None, "For a weight file of F5-TTS: the published model it is or was tuned from.")
    policy_vocab: str | None = option(None, "For a weight file of F5-TTS: its vocab.txt; default: the one beside it.")
    policy_weights: str | None = option(
        None, "For a policy by 'package.module:function': a folder policy/ that a run saved."
    )
    vocoder: str = option("tiny", "Mel to waveform, frozen: 'tiny', 'griffin_lim', path.")
    recognizer: str = option("tiny", "Listens in the evaluation (error rate, voice): 'tiny', path or 'none'.")
    train_prompts: str = option(
        "tiny", "'tiny', a list (JSONL, CSV, .lst), a folder with train.jsonl, or 'hf://datasets/OWNER/NAME'."
    )
    eval_prompts: str = option("tiny", "'tiny', a list, a folder with heldout.jsonl, or 'hf://datasets/OWNER/NAME'.")
    train_preferences: str | None = option(
        None,
        "For algorithms that learn from pairs of clips, in place of train_prompts: a data set of preferences, by its "
        "id on the hub, folder or file.",
    )
    preference_kwargs: dict[str, Any] | str | None = option(
        None, 'How it is read, as JSON: \'{"adapter": "speechjudge", "ties": "keep"}\' (load_preferences has all).'
    )
    dataset_train_split: str = option("train", "Split of hf:// prompts, or of preferences, to train on.")
    dataset_test_split: str = option("test", "Split of hf:// prompts to evaluate on.")
    prompt_columns: dict[str, str] | str | None = option(
        None, 'Our names of columns to theirs, as JSON: \'{"text": "sentence"}\'.'
    )
    prepare_references: bool = option(False, "Shorten, trim and raise reference clips as F5-TTS's inference does.")
    duration_rule: str = option("policy", "Where a prompt has no duration_s: 'policy', or 'f5', F5-TTS's inference.")
    num_eval_prompts: int = option(8, "Held-out prompts heard before and after training, from the first on; 0: none.")

    noise_floor: bool = option(
        True, "Before training, hear held-out prompts with a second sampling seed too: how far chance moves a measure."
    )

    reward_models: list[str] = option(
        lambda: ["mos"], "Rewards by name (reward_models/NAME.py), 'package.module:Name', or a trained one's folder."
    )
    reward_weights: list[float] | None = option(None, "One weight a reward; default: 1 each.")
    reward_kwargs: dict[str, Any] | str | None = option(
        None, 'Options of rewards, by the names above, as JSON: \'{"mos": {"compression_eps": 1e-3}}\'.'
    )
    algorithm: str = option("draft", "A file of rlhf_mel/algorithms: 'draft', 'refl', 'flow_grpo', ...")
    algorithm_kwargs: dict[str, Any] | str | None = option(
        None, "Options of the algorithm's own Config, as JSON: '{\"grad_steps\": 4}'."
    )
    beta: float | None = option(
        None,
        "Weight of what ties the policy to the reference; 0: no reference is kept (as in TRL); default: the "
        "algorithm's own.",
    )
    num_iterations: int = option(1, "Updates that learn from the same rollouts (as in TRL), where there are rollouts.")
    epsilon: float | None = option(None, "How far below 1 a probability ratio counts; default: the algorithm's own.")
    epsilon_high: float | None = option(None, "How far above 1 a probability ratio counts; default: epsilon.")
    scale_rewards: str | None = option(
        None, "Rewards are divided by the deviation of their 'group', of the 'batch', or by 'none'."
    )
    multi_objective_aggregation: str | None = option(
        None, "Several rewards: 'sum_then_normalize', or 'normalize_then_sum', each by its own deviation."
    )
    num_generations: int = option(1, "Rollouts of one prompt in a batch; divides per_device_train_batch_size.")
    ema_decay: float | None = option(
        None,
        "Decay an update of an average of the trained weights, evaluated and saved beside them (policy_ema/); "
        "default: none is kept, flow_grpo: 0.9.",
    )

    sampling_steps: int = option(16, "Steps of the ODE solve, in training and evaluation.")
    cfg_strength: float = option(2.0, "Classifier-free guidance; 0: none, F5-TTS: 2.")
    train_cfg_strength: float | None = option(
        None,
        "Guidance of training rollouts; default: cfg_strength. Without (0), training costs half, and Flow-GRPO "
        "and FlowTTS-GRPO found it to learn faster.",
    )
    sway_sampling_coef: float | None = option(-1.0, "Sway of the time grid, F5-TTS: -1; None: uniform.")
    solver: str = option("euler", "Method of the ODE solve: 'euler', 'midpoint', ...")

    reward_batch_size: int | None = option(
        None, "Rollouts that vocoder and rewards hear at once, to save memory; default: all of the batch."
    )
    torch_compile: bool = option(
        False,
        "Compile the policy's repeated blocks, and nothing else: half a minute at first; pays on a GPU from the "
        "size of F5TTS_v1_Base on.",
    )
    cuda_graphs: bool | None = option(
        None,
        "Velocities, and gradients of lengths that come often, as CUDA graphs, which keep the memory of the "
        "largest; default: on a GPU.",
    )
    activation_checkpointing: bool | None = option(
        True,
        "Velocities keep their input alone and run again in backward(); false: all that they computed is kept, which "
        "takes less time and memory that grows with the differentiated steps (best with micro-batches of one).",
    )
    cpu_threads: int | None = option(
        None, "Threads a process on a CPU; default: the cores there are, at most 8. (accelerate allows 1.)"
    )
    output_dir: str = option("runs/demo", "Everything a run writes: samples, checkpoints, report.html, policy/.")
    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.")
    max_steps: int = option(20, "Updates.")
    per_device_train_batch_size: int = option(4, "Rollouts (of train_preferences: pairs) a device and update.")
    warmup_steps: float = option(0, "Updates of linear warm-up (below 1: share of all).")
    lr_scheduler_type: str = option("constant", "Learning rate schedule.")
    logging_steps: float = option(1, "Updates between two log lines.")
    save_strategy: str = option("steps", "When to write checkpoints.")
    save_steps: float = option(100, "Updates between two checkpoints.")
    save_total_limit: int | None = option(1, "Checkpoints to keep.")
    # In this order: HfArgumentParser takes the second of three types.
    report_to: None | str | list[str] = option("none", "Trackers: wandb, tensorboard, ...")  # noqa: RUF036
    remove_unused_columns: bool = option(False, "Prompts carry every column to the rewards: must stay False.")
    dataloader_pin_memory: bool = option(False, "Batches are small; nothing to gain.")
    ddp_find_unused_parameters: bool | None = option(False, "Every parameter takes part in every velocity.")

    def __post_init__(self) -> None:
        self._as_given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        if self.beta is None:
            self.beta = algorithm_class(self.algorithm).default_beta
        _check_numbers(self)
        _check_schedule(self)
        self.reward_models = list(self.reward_models)
        # Without this, transformers takes the processes of a data-parallel run on CPUs for runs of their own.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # transformers would compile the whole update, and recompile it for every length
        self.compile_policy, self.torch_compile = self.torch_compile, False
        if self.torch_compile_backend or self.torch_compile_mode:
            raise ValueError(
                "torch_compile_backend and torch_compile_mode: expected none, the policy's blocks are compiled by "
                f"inductor; got {self.torch_compile_backend!r} and {self.torch_compile_mode!r}; remove them"
            )
        # the solve does it; transformers would look for layers of its own models
        self.recompute, self.activation_checkpointing = self.activation_checkpointing is not False, False
        self.gradient_checkpointing = False  # the former name, which older ones read
        super().__post_init__()  # type: ignore[no-untyped-call]  # of transformers
        _check_inherited(self)
        _check_rewards(self.reward_models, self.reward_weights, self.reward_kwargs)
        _check_data(self, load_algorithm(self.algorithm, self.algorithm_options, beta=self.beta or 0.0))
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be False: rewards read prompt columns that the policy does not; "
                "got True; remove the option"
            )

    @property
    def algorithm_options(self) -> Mapping[str, Any]:
        """`algorithm_kwargs` as a mapping, and those of SHARED_OPTIONS that were given."""
        options = self.algorithm_kwargs or {}
        if not isinstance(options, Mapping):
            raise ValueError(
                f"algorithm_kwargs must be a mapping: expected e.g. '{{\"grad_steps\": 4}}', got {options!r}"
            )
        shared = {name: getattr(self, name) for name in SHARED_OPTIONS if getattr(self, name) is not None}
        if twice := sorted(shared.keys() & options.keys()):
            raise ValueError(f"{twice} given twice: expected one value, got algorithm_kwargs with a second; remove it")
        return {**shared, **options}

    @property
    def preference_options(self) -> Mapping[str, Any]:
        """`preference_kwargs` as a mapping."""
        options = self.preference_kwargs or {}
        if not isinstance(options, Mapping):
            raise ValueError(
                f'preference_kwargs must be a mapping: expected e.g. \'{{"ties": "keep"}}\', got {options!r}'
            )
        return options


def _check_inherited(config: RLHFConfig) -> None:
    """Raise where an option of transformers is set that has no meaning for rollouts of mels."""
    for own in dataclasses.fields(config):
        value = getattr(config, own.name)
        if own.name in OF_LANGUAGE_MODELS and value != own.default:
            raise ValueError(f"{own.name} is of language models: expected {own.default!r}, got {value!r}; remove it")
    accelerator: Any = config.accelerator_config
    if accelerator.dispatch_batches:
        raise ValueError(
            "accelerator_config: expected dispatch_batches off, as each process draws its own prompts, got True; "
            "remove it"
        )


def _check_numbers(config: RLHFConfig) -> None:
    """Raise on the first of our own numbers that is of the wrong kind or out of range."""
    for name, least in (("num_eval_prompts", 0), ("num_generations", 1), ("num_iterations", 1), ("sampling_steps", 1)):
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    size = config.reward_batch_size
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(f"reward_batch_size must be a whole number of at least 1, or None for all, got {size!r}")
    for name in ("beta", "cfg_strength", "train_cfg_strength"):
        value = getattr(config, name)
        if value is None and name == "train_cfg_strength":
            continue
        if not isinstance(value, int | float) or value < 0:
            raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    decay = config.ema_decay
    if decay is not None and (not isinstance(decay, int | float) or not 0 <= decay < 1):
        raise ValueError(f"ema_decay must be a number of at least 0 and below 1, got {decay!r}")
    if config.per_device_train_batch_size % config.num_generations:
        raise ValueError(
            "per_device_train_batch_size counts rollouts and must be a multiple of num_generations: got "
            f"{config.per_device_train_batch_size} and {config.num_generations}; raise the batch size or use "
            "gradient_accumulation_steps"
        )


def _check_schedule(config: RLHFConfig) -> None:
    """Raise if checkpoints do not fit what the algorithm learns from."""
    if config.save_strategy == "steps" and config.save_steps >= 1 and config.save_steps % config.num_iterations:
        raise ValueError(
            "a checkpoint between updates that share rollouts cannot be resumed exactly: expected save_steps to be a "
            f"multiple of num_iterations, got {config.save_steps:g} and {config.num_iterations}"
        )


def _check_data(config: RLHFConfig, algorithm: Algorithm) -> None:
    """Raise if groups or preferences do not fit what the algorithm learns from."""
    if config.num_generations < 2 and algorithm.needs_groups:
        raise ValueError(
            f"algorithm {config.algorithm!r} compares rollouts of one prompt: expected num_generations of at least 2, "
            f"got {config.num_generations}; 8 is a good start"
        )
    if config.num_generations > 1 and algorithm.learns_from_pairs:
        raise ValueError(
            f"algorithm {config.algorithm!r} learns from pairs of a data set: expected num_generations 1, got "
            f"{config.num_generations}; num_noise_samples of algorithm_kwargs draws several times for each"
        )
    _ = config.preference_options  # raises
    if config.train_preferences is not None and not algorithm.learns_from_pairs:
        raise ValueError(
            "train_preferences: expected an algorithm that learns from pairs of a data set, such as flow_dpo, got "
            f"{config.algorithm!r}, which learns from rollouts (of train_prompts); remove the one or name the other"
        )


def _check_rewards(names: Sequence[str], weights: Sequence[float] | None, options: Any) -> None:
    """Raise if there is no reward, an unknown one, not one weight a reward, or options that a reward does not take."""
    if not names:
        raise ValueError("reward_models is empty: expected at least one reward, e.g. --reward_models mos")
    for name in names:
        check_name(name)
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            f"reward_weights needs one weight a reward: expected {len(names)} for {list(names)}, got {list(weights)}"
        )
    if options is None:
        return
    if not isinstance(options, Mapping) or not all(isinstance(own, Mapping) for own in options.values()):
        example = '{"mos": {"compression_eps": 1e-3}}'
        raise ValueError(f"reward_kwargs: expected a mapping a reward, e.g. '{example}', got {options!r}")
    if unknown := sorted(options.keys() - set(names)):
        raise ValueError(
            f"reward_kwargs: expected options of {list(names)}, got those of {unknown}; name it in reward_models"
        )
    for name, own in options.items():
        check_options(find_reward(name), options_of(name, own), name=name)


def resolved(
    config: RLHFConfig, peft_config: LoraConfig | None = None, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What reproduces a run by `--config`: our own fields, and each inherited one that was given another value.

    Args:
        given: fields of parts that the trainer was given in Python (sources.py), in place of the config's.
    """
    # Not by comparison with a second RLHFConfig(): a new TrainingArguments resets Accelerate under a running trainer.
    own = RLHFConfig.__annotations__
    as_strings = config.to_dict()  # type: ignore[no-untyped-call]  # of transformers
    values = {name: value for name, value in as_strings.items() if name in own}
    fields = dataclasses.fields(TrainingArguments)
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields}
    changed = {
        name: value
        for name, value in config._as_given.items()
        if name not in own and value != defaults[name] and name not in NOT_SAVED
    }
    # what transformers is told is another thing
    values |= {"torch_compile": config.compile_policy, "activation_checkpointing": config.recompute}
    return values | changed | _lora_fields(peft_config) | dict(given or {})


def _lora_fields(peft_config: LoraConfig | None) -> dict[str, Any]:
    """The fields of TRL's `ModelConfig` that make `peft_config`."""
    if peft_config is None:
        return {}
    targets = peft_config.target_modules
    return {
        "use_peft": True,
        "lora_r": peft_config.r,
        "lora_alpha": peft_config.lora_alpha,
        "lora_dropout": peft_config.lora_dropout,
        "lora_target_modules": sorted(targets) if isinstance(targets, set | list) else targets,
        "lora_modules_to_save": peft_config.modules_to_save,
        "use_rslora": peft_config.use_rslora,
        "use_dora": peft_config.use_dora,
    }


def save_config(
    path: Path, config: RLHFConfig, peft_config: LoraConfig | None = None, given: Mapping[str, Any] | None = None
) -> None:
    """Write `resolved` as YAML."""
    values = resolved(config, peft_config, given)
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
