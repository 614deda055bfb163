"""Train a reward from human preferences: a Bradley-Terry model of the mel, or on a frozen Whisper encoder's features.

    python recipes/constructed_pairs.py --out data/constructed                       # offline pairs to try it on
    python recipes/reward_model.py --train_preferences data/constructed/train \\
        --eval_preferences data/constructed/heldout --output_dir runs/reward_model
    accelerate launch recipes/drlx.py --reward_models runs/reward_model              # its folder is a reward at once

    --train_preferences OWNER/NAME --columns chosen=audio_a,rejected=audio_b     whatever load_preferences reads
    --preference_kwargs '{"axis": "naturalness"}'                                and every option of it
    --body whisper --encoder models/whisper-base                                 heads on a folder of transformers
    --tie_model davidson                                                         keep ties, and learn their share

Every field of trl's RewardConfig works too (`center_rewards_coefficient`, `learning_rate`, `max_steps`, ...), in a file
by `--config my.yaml`; logged are TRL's accuracy, margin, min_reward, mean_reward, max_reward. The loss is that of
rewards/bradley_terry.py, the network that of speech/preference_model.py. In training each clip gets a gain of up to
+-12 dB and up to half a second of near silence at either end, so that neither tells chosen from rejected.

Pairs are held out by prompt (`--eval_share`), never by row: two pairs of one sentence are no strangers. report.json and
calibration.png say of them what recipes/reward_report.py says of any reward: accuracy, calibration, and what level,
silence and length do to the score.

Leaves out: text and reference voice (the score is of the sound alone), streaming, other encoders than Whisper.
Hardware: the body "mel" two CPU cores, a few minutes for some hundred pairs; "whisper" a GPU.
Numbers to expect: docs/guide.md.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from reward_report import Numbered, as_audio, figures, prompt_keys, report, score_pairs, write_report
from torch import Tensor
from transformers import Trainer
from trl import RewardConfig, TrlParser

from rlhf_mel.data.preferences.load import PairBatch, PreferenceDataset, load_preferences, parse_columns
from rlhf_mel.flow.noise import mix_seed, seeded
from rlhf_mel.metrics import pool
from rlhf_mel.rewards.bradley_terry import LossConfig, bootstrap_counts, preference_loss, tie_threshold
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.speech.preference_model import PreferenceModel, load_preference_model, save_preference_model
from rlhf_mel.speech.whisper_features import load_whisper_features
from rlhf_mel.types import Audio, Prompts

NO_EFFECT = (
    "model_init_kwargs",
    "trust_remote_code",
    "chat_template_path",
    "disable_dropout",
    "dataset_num_proc",
    "eos_token",
    "max_length",
    "pad_to_multiple_of",
    "activation_offloading",
    "pad_token",
    "label_smoothing_factor",
)
"""Fields of RewardConfig that only language models have."""
CARD = (
    "train_preferences",
    "preference_kwargs",
    "columns",
    "tie_model",
    "label_smoothing",
    "margin_scale",
    "gain_db",
    "silence_s",
    "seed",
)
"""What the config.json of the reward says of its training."""


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text.replace("%", "%%")})


@dataclass
class RewardModelConfig(RewardConfig):
    """Fields of RewardConfig whose defaults differ, and our own."""

    _VALID_DICT_FIELDS = [*RewardConfig._VALID_DICT_FIELDS, "mel_spec", "preference_kwargs"]  # noqa: RUF012, not annotated: no field

    train_preferences: str = option("", "Pairs to learn from: a data set by its id on the hub, folder or file.")
    eval_preferences: str | None = option(None, "Pairs to be judged by; default: a share of the prompts is held out.")
    eval_share: float = option(0.2, "Share of the prompts that is held out.")
    dataset_train_split: str = option("train", "Split of both data sets.")
    columns: str | None = option(None, "Our roles to their columns: chosen=audio_a,rejected=audio_b.")
    preference_kwargs: dict[str, Any] | str | None = option(  # noqa: RUF009
        None, 'How they are read, as JSON: \'{"axis": "naturalness", "ties": "keep"}\' (load_preferences has all).'
    )
    tie_model: str = option("none", "'none', 'rao_kupper' or 'davidson' (rewards/bradley_terry.py).")
    label_smoothing: float = option(0.0, "Share of the answers that are taken to be slips (as in DPOConfig).")
    margin_scale: float = option(1.0, "Margins of the data set are multiplied by it; 0: not used.")
    body: str = option("mel", "What is heard: 'mel' or 'whisper'.")
    encoder: str | None = option(None, "For 'whisper': a folder in transformers' format.")
    window_s: float | None = option(None, "For 'whisper': shorter windows than 30 s cost less.")
    mel_spec: dict[str, Any] | str | None = option(None, "Mels of the policy, as JSON: fields of MelSpec.")  # noqa: RUF009
    num_members: int = option(3, "Members of the ensemble.")
    dim: int = option(64, "Channels of a member.")
    num_layers: int = option(3, "Blocks of a member on the mel.")
    kernel_size: int = option(7, "Frames that a block spans.")
    dropout: float = option(0.1, "Probability, in training.")
    gain_db: float = option(12.0, "Largest gain or attenuation of a clip in training; 0: none.")
    silence_s: float = option(0.5, "Longest silence put before and after a clip in training; 0: none.")
    output_dir: str | None = option("runs/reward_model", "The reward's folder; its reports lie there too.")
    learning_rate: float = option(1e-3, "Of AdamW.")
    weight_decay: float = option(0.01, "Of AdamW.")
    num_train_epochs: float = option(20.0, "Passes over the pairs.")
    per_device_train_batch_size: int = option(16, "Pairs in a batch.")
    per_device_eval_batch_size: int = option(16, "Pairs in a batch.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rate.")
    warmup_steps: float = option(0.05, "Updates, or their share, until the learning rate is reached.")
    save_strategy: str = option("no", "When to write checkpoints; the reward is written at the end.")
    report_to: None | str | list[str] = option("none", "Trackers: wandb, tensorboard, ...")  # noqa: RUF009, RUF036
    remove_unused_columns: bool = option(False, "Must stay False: pairs are no columns of a model.")
    gradient_checkpointing: bool = option(False, "Not needed.")
    activation_checkpointing: bool | None = option(False, "Not needed.")
    bf16: bool | None = option(False, "Scores are float32.")
    ddp_find_unused_parameters: bool | None = option(False, "Every parameter takes part in every loss.")

    def __post_init__(self) -> None:
        defaults = {entry.name: entry.default for entry in dataclasses.fields(RewardConfig)}
        if given := [name for name in NO_EFFECT if getattr(self, name) != defaults[name]]:
            raise ValueError(f"{given}: expected none, they have no effect on a model of speech; remove them")
        if not self.train_preferences:
            raise ValueError("train_preferences: expected a data set, got none; name one by --train_preferences")
        if not 0 < self.eval_share < 1:
            raise ValueError(f"eval_share: expected a share between 0 and 1, got {self.eval_share!r}")
        if self.gain_db < 0 or self.silence_s < 0:
            raise ValueError(f"gain_db, silence_s: expected at least 0, got {self.gain_db}, {self.silence_s}")
        if (self.body == "whisper") != (self.encoder is not None):
            raise ValueError("encoder: expected a folder for --body whisper and none for 'mel'")
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        off = ("remove_unused_columns", "gradient_checkpointing", "activation_checkpointing", "bf16", "fp16")
        if given := [name for name in off if getattr(self, name)]:
            raise ValueError(f"{given}: expected False, scores are float32 and the model is small; remove the option")
        super().__post_init__()
        _ = self.loss_config, self.model_config  # they check their values

    @property
    def loss_config(self) -> LossConfig:
        return LossConfig(**{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(LossConfig)})

    @property
    def model_config(self) -> PreferenceModel.Config:
        fields = dataclasses.fields(PreferenceModel.Config)
        return PreferenceModel.Config(**{entry.name: getattr(self, entry.name) for entry in fields})


# Pairs.


def load_pairs(args: RewardModelConfig, source: str) -> PreferenceDataset:
    """Without reference clips; with ties where there is a model of them, unless preference_kwargs says otherwise."""
    options = {"references": False, "ties": "drop" if args.tie_model == "none" else "keep"}
    if args.columns:
        options["columns"] = parse_columns(args.columns)
    options |= args.preference_kwargs or {}
    if options.get("streaming"):
        raise ValueError("preference_kwargs: expected pairs that can be shuffled, got streaming; remove it")
    return load_preferences(
        source, split=args.dataset_train_split, mel_spec=MelSpec(**(args.mel_spec or {})), **options
    )


def split_by_prompt(keys: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows to learn from and rows to be judged by: `share` of the prompts, at least one, and all their rows."""
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise ValueError(f"expected pairs of two prompts or more to hold one out, got {len(prompts)}; use more prompts")
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    drawn = torch.randperm(len(prompts), generator=seeded(mix_seed(seed, len(prompts)))).tolist()[:count]
    held_out = {prompts[place] for place in drawn}
    rows = range(len(keys))
    return [row for row in rows if keys[row] not in held_out], [row for row in rows if keys[row] in held_out]


# Sound.


def both_sides(pairs: PairBatch) -> list[Tensor]:
    """The waveforms of chosen, then of rejected."""
    sides = (pairs.chosen, pairs.rejected)
    return [
        row[:length] for side in sides for row, length in zip(side.waveform, side.lengths_samples.tolist(), strict=True)
    ]


def augmented(clip: Tensor, rate_hz: int, gain_db: float, silence_s: float, generator: torch.Generator) -> Tensor:
    """A clip [S] with a gain, and with faint noise (-100 to -60 dBFS) of random length before and after it."""
    gain, before, after, level = torch.rand(4, generator=generator).tolist()
    noise_rms = 10 ** ((-100 + 40 * level) / 20)
    edges = [
        noise_rms * torch.randn(int(share * silence_s * rate_hz), generator=generator).to(clip)
        for share in (before, after)
    ]
    return torch.cat([edges[0], clip * 10 ** ((2 * gain - 1) * gain_db / 20), edges[1]])


# Training.


class Scorer(torch.nn.Module):
    """What Accelerate wraps. transformers would write to the `config` of the network itself."""

    def __init__(self, network: PreferenceModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, audio: Audio) -> Tensor:
        return self.network(audio)


class PreferenceTrainer(Trainer):
    """transformers' Trainer on pairs: the loss, TRL's metrics, and the folder of a reward as checkpoint."""

    def __init__(self, network: PreferenceModel, train: Numbered, held_out: Numbered, args: RewardModelConfig) -> None:
        super().__init__(Scorer(network), args, train.collate, train, held_out)
        generator = seeded(mix_seed(args.seed, args.num_members))
        self.counts = bootstrap_counts(len(train.pairs), args.num_members, generator)
        self.logged: dict[str, list[float]] = defaultdict(list)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        pairs, rows, args = inputs["pairs"].to(self.args.device), inputs["rows"], self.args
        generator = seeded(mix_seed(args.seed, self.state.global_step, *rows.tolist()))
        rate_hz = pairs.chosen.sample_rate_hz
        clips = [augmented(clip, rate_hz, args.gain_db, args.silence_s, generator) for clip in both_sides(pairs)]
        chosen, rejected = model(as_audio(clips, rate_hz, self.network.mel_spec)).chunk(2)
        counts = self.counts[rows.cpu()].to(chosen.device)
        loss, metrics = self._loss(chosen, rejected, pairs, counts)
        for name, value in metrics.items():
            self.logged[name] += self.accelerator.gather_for_metrics(value.reshape(-1)).tolist()
        return (loss, chosen) if return_outputs else loss

    @property
    def network(self) -> PreferenceModel:
        return self.accelerator.unwrap_model(self.model).network

    @property
    def threshold(self) -> Tensor:
        """Of each member's model of ties."""
        return tie_threshold(self.network.threshold, self.args.tie_model)

    def _loss(self, chosen: Tensor, rejected: Tensor, pairs: PairBatch, counts: Tensor | None) -> Any:
        config = self.args.loss_config
        return preference_loss(
            chosen,
            rejected,
            soft_labels=pairs.soft_labels,
            margins=pairs.margins,
            weights=pairs.weights,
            counts=counts,
            config=config,
            threshold=self.threshold,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, **pool([self.logged])}, start_time)
        self.logged.clear()

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        found = score_pairs(self.score, eval_dataset or self.eval_dataset, self.args.eval_batch_size, self.args.device)
        values = figures(found, self.args.loss_config, self.threshold.cpu())
        values = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        super().log(values)  # what was gathered of the training waits for its own line
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)
        return values

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        return self.network.eval()(audio)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            card = {name: getattr(self.args, name) for name in CARD}
            save_preference_model(self.network, output_dir or self.args.output_dir, trained_on=card)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.network.load_state_dict(load_preference_model(resume_from_checkpoint).own_state(), strict=False)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


@torch.no_grad()
def centre(network: PreferenceModel, pairs: Numbered, batch_size: int) -> None:
    """Subtract each member's mean score of the training's clips from all its scores."""
    network.eval()
    network.centre.zero_()
    moved = (batch.to(network.centre.device) for batch in pairs.batches(batch_size))
    scores = [network(side) for batch in moved for side in (batch.chosen, batch.rejected)]
    network.centre.copy_(torch.cat(scores).mean(0))


def parse(argv: Sequence[str] | None) -> RewardModelConfig:
    parser = TrlParser((RewardModelConfig,), allow_abbrev=False)
    args, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"unknown options {unknown}; `python recipes/reward_model.py --help` lists all")
    return args


def splits(args: RewardModelConfig) -> tuple[Numbered, Numbered, list[str]]:
    """Pairs to learn from, pairs to be judged by, and the prompts of the latter."""
    pairs = load_pairs(args, args.train_preferences)
    keys = prompt_keys(pairs)
    if args.eval_preferences is None:
        rows, held_out = split_by_prompt(keys, args.eval_share, args.seed)
        return Numbered(pairs, rows), Numbered(pairs, held_out), [keys[row] for row in held_out]
    others = load_pairs(args, args.eval_preferences)
    other_keys = prompt_keys(others)
    if shared := set(keys) & set(other_keys):
        print(
            f"warning: {len(shared)} of {len(set(other_keys))} prompts to be judged by are learnt from too", flush=True
        )
    return Numbered(pairs, range(len(pairs))), Numbered(others, range(len(others))), other_keys


def main(argv: Sequence[str] | None = None) -> None:
    try:
        args = parse(argv)
        encoder = None if args.encoder is None else load_whisper_features(args.encoder, args.window_s)
        train, held_out, keys = splits(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"reward_model.py: {error}") from None
    seed = mix_seed(args.seed, 1)
    network = PreferenceModel(args.model_config, mel_spec=train.pairs.mel_spec, encoder=encoder, seed=seed)
    network.threshold.requires_grad_(args.tie_model != "none")
    trainer = PreferenceTrainer(network, train, held_out, args)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    centre(trainer.network, train, args.eval_batch_size)
    values: dict[str, Any] = {"learnt_from": {"pairs": len(train), "dropped": train.pairs.counts}}
    trainer.save_model()
    if args.should_save:
        out = Path(args.output_dir)
        options = {"config": args.loss_config, "threshold": trainer.threshold.detach().cpu(), "device": args.device}
        values |= report(trainer.score, held_out, keys, out, batch_size=args.eval_batch_size, **options)
        write_report(values, out)


if __name__ == "__main__":
    main(sys.argv[1:])
