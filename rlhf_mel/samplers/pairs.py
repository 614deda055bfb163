"""Pairs of one's own: N samples of each prompt, ranked by rewards or left to people, written as a data set.

    x_0^(r,k) drawn by item_generator(seed + k, r),  k = 0 ... N - 1,  r the prompt's row
    score^(r,k) = reward(vocoder(x_1^(r,k)))
    pairs of row r: best against worst, all, or neighbours in the ranking; margin = difference of the scores

The seed of each clip and the row are kept, which with the policy settle the starting noise (flow/noise.py), so that
an algorithm can train on the noise that the preference was about (PNAPO, arXiv 2605.09433).

Unranked pairs have the columns prompt, audio_a, audio_b, seed_a, seed_b instead, for `rlhf-mel annotate`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.data.preferences.files import write_preferences
from rlhf_mel.data.prompts import PromptDataset
from rlhf_mel.flow.noise import item_generator
from rlhf_mel.flow.policy import Policy, rollout
from rlhf_mel.pipeline import Sampling, vocode
from rlhf_mel.progress import progress
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.measures import clips
from rlhf_mel.storage import ASSETS, write_whole
from rlhf_mel.vocoders import Vocoder

HARD_TEXTS = ASSETS / "hard_texts.txt"
"""Repeats, numbers spelled out, tongue-twisters, long names."""

CHOICES = ("extremes", "all", "adjacent")
"""Which samples of a prompt meet; see PairOptions.choose."""


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """How many samples, and which of them meet."""

    n: int = 4
    """Samples of each prompt."""
    choose: str = "extremes"
    """Of the samples in order of their scores: best against worst, every two, or neighbours. Unranked samples are in
    the order of their seeds, where "extremes" are the first and the last."""
    min_margin: float = 0.0
    """Ranked pairs whose scores differ by no more than this are left out, and counted."""
    seed: int = 0
    """Of the first sample; the k-th has seed + k."""
    batch_size: int = 8
    """Samples at a time; changes memory and speed, not the noise."""

    def __post_init__(self) -> None:
        if self.n < 2 or self.batch_size < 1:
            raise ValueError(f"n, batch_size: expected at least 2 and 1, got {self.n}, {self.batch_size}")
        if self.choose not in CHOICES:
            raise ValueError(f"choose: expected one of {list(CHOICES)}, got {self.choose!r}")
        if not self.min_margin >= 0:
            raise ValueError(f"min_margin: expected at least 0, got {self.min_margin}")


@dataclass(frozen=True)
class Sample:
    """One clip of a prompt."""

    waveform: Float[Tensor, " s"]
    sample_rate_hz: int
    seed: int
    score: float | None
    """None: unranked."""


@dataclass
class PairMaker:
    """Makes pairs of a policy's samples."""

    policy: Policy
    vocoder: Vocoder
    rewards: Rewards | None
    """Who ranks; None: nobody."""
    options: PairOptions = field(default_factory=PairOptions)
    sampling: Sampling = field(default_factory=Sampling)
    device: torch.device | str = "cpu"
    counts: Counter[str] = field(default_factory=Counter)
    """How many `pairs` were made, and what was left out, by reason."""

    def rows(self, prompts: PromptDataset, shown_as: str | None = None) -> Iterator[dict[str, Any]]:
        """The rows of the data set, prompt by prompt."""
        for row, samples in self.samples(prompts, shown_as):
            if self.rewards is None:
                made = _unranked_rows(prompts, row, samples, self.options)
            else:
                made = self._ranked_rows(prompts, row, samples)
            for pair in made:
                self.counts["pairs"] += 1
                yield pair

    def samples(self, prompts: PromptDataset, shown_as: str | None = None) -> Iterator[tuple[int, list[Sample]]]:
        """The number of each prompt and its N samples."""
        n, batch_size = self.options.n, self.options.batch_size
        items = [(row, self.options.seed + k) for row in range(len(prompts)) for k in range(n)]
        waiting: list[Sample] = []
        row = 0
        for first in progress(range(0, len(items), batch_size), shown_as):
            waiting += self._batch(prompts, items[first : first + batch_size])
            while len(waiting) >= n:
                yield row, waiting[:n]
                waiting, row = waiting[n:], row + 1

    @torch.no_grad()
    def _batch(self, prompts: PromptDataset, items: Sequence[tuple[int, int]]) -> list[Sample]:
        batch = prompts.collate([prompts[row] for row, _ in items]).to(self.device)
        if self.rewards is not None:
            self.rewards.check(batch)
        generators = [item_generator(seed, row) for row, seed in items]
        spoken = rollout(self.policy, batch, generator=generators, grad_steps=0, **asdict(self.sampling))
        audio = vocode(self.vocoder, spoken)
        scores = [None] * len(items) if self.rewards is None else self.rewards(audio, batch).total.tolist()
        return [
            Sample(waveform, audio.sample_rate_hz, seed, score)
            for waveform, (_, seed), score in zip(clips(audio), items, scores, strict=True)
        ]

    def _ranked_rows(self, prompts: PromptDataset, row: int, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
        scored = [sample for sample in samples if sample.score is not None and math.isfinite(sample.score)]
        if missing := len(samples) - len(scored):
            self.counts["samples without a finite score"] += missing
        ranked = sorted(scored, key=lambda sample: -(sample.score or 0.0))
        pairs = chosen_places(len(ranked), self.options.choose)
        if not pairs:
            self.counts["prompts with fewer than two scored samples"] += 1
        for better, worse in pairs:
            chosen, rejected = ranked[better], ranked[worse]
            margin = (chosen.score or 0.0) - (rejected.score or 0.0)
            if margin <= self.options.min_margin:
                self.counts[f"pairs with a margin of at most {self.options.min_margin:g}"] += 1
                continue
            yield {
                **_shared(prompts, row, (chosen.seed, rejected.seed)),
                "chosen": encoded(chosen),
                "rejected": encoded(rejected),
                "margin": margin,
                "chosen_seed": chosen.seed,
                "rejected_seed": rejected.seed,
            }


def chosen_places(count: int, choose: str) -> list[tuple[int, int]]:
    """Which of `count` samples in order meet, the earlier one first."""
    if count < 2:
        return []
    if choose == "extremes":
        return [(0, count - 1)]
    return list(itertools.combinations(range(count), 2) if choose == "all" else itertools.pairwise(range(count)))


def _unranked_rows(
    prompts: PromptDataset, row: int, samples: Sequence[Sample], options: PairOptions
) -> Iterator[dict[str, Any]]:
    for first, second in chosen_places(len(samples), options.choose):
        a, b = samples[first], samples[second]
        yield {
            **_shared(prompts, row, (a.seed, b.seed)),
            "audio_a": encoded(a),
            "audio_b": encoded(b),
            "seed_a": a.seed,
            "seed_b": b.seed,
        }


def _shared(prompts: PromptDataset, row: int, seeds: tuple[int, int]) -> dict[str, Any]:
    """What both kinds of rows have; the reference as its file is."""
    prompt = prompts.rows[row]
    name = prompt.get("id") or f"{row:05d}"
    shared = {
        "prompt": prompt["text"],
        "reference_audio": reference_of(prompts, row),
        "reference_text": prompt["reference_text"],
        "id": f"{name}-{seeds[0]}-{seeds[1]}",
        "row": row,
    }
    return shared | ({"voice": str(prompt["voice"])} if prompt.get("voice") is not None else {})


def reference_of(prompts: PromptDataset, row: int) -> dict[str, Any]:
    """The reference clip of a prompt, its file's bytes and no path."""
    source = prompts._source(prompts.rows[row])
    return {"bytes": source if isinstance(source, bytes) else Path(source).read_bytes(), "path": None}


def encoded(sample: Sample) -> dict[str, Any]:
    """The clip as 16-bit FLAC, clipped at full scale as a wav file would be."""
    import soundfile  # loads a C library

    file = BytesIO()
    waveform = sample.waveform.clamp(-1, 1).numpy()
    soundfile.write(file, waveform, sample.sample_rate_hz, format="FLAC", subtype="PCM_16")
    return {"bytes": file.getvalue(), "path": None}


def read_texts(path: str | Path) -> list[str]:
    """The texts of a list, one a line; lines that start with # are comments.

    Raises:
        ValueError: there are none.
    """
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    texts = [line for line in lines if line and not line.startswith("#")]
    if not texts:
        raise ValueError(f"{path}: expected a text on each line, got none")
    return texts


def with_texts(prompts: PromptDataset, texts: Sequence[str]) -> PromptDataset:
    """These texts, in the voices of the prompts in turn; how long each takes is left to the duration rule."""
    rows = []
    for number, text in enumerate(texts):
        place = number % len(prompts)
        prompt = prompts.rows[place]
        row = {"id": f"text{number:04d}", "text": text, "reference_text": prompt["reference_text"]}
        voice = {} if prompt.get("voice") is None else {"voice": prompt["voice"]}
        rows.append({**row, **voice, "reference_audio": reference_of(prompts, place)})
    name = f"texts in the voices of {prompts.name}"
    return PromptDataset(rows, name=name, mel_spec=prompts.mel_spec, check_audio=False, options=prompts.options)


def write_pairs(rows: Iterator[Mapping[str, Any]], folder: str | Path, *, ranked: bool, about: str) -> Path:
    """Write rows of PairMaker as a data set with a card; `load_preferences`, or `rlhf-mel annotate`, reads it.

    Raises:
        FileExistsError: there is a data set in the folder.
        ValueError: there are no rows.
    """
    check_folder(folder)
    if ranked:
        return write_preferences(rows, folder, about=about)
    return _write_unranked(list(rows), Path(folder), about)


def check_folder(folder: str | Path) -> None:
    """Raise FileExistsError if a data set lies there already."""
    if found := sorted(Path(folder).glob("data/*.parquet")):
        raise FileExistsError(f"{folder}: expected no data set there, got {found[0].name}; choose another folder")


def _write_unranked(rows: Sequence[Mapping[str, Any]], folder: Path, about: str) -> Path:
    from datasets import Audio, Dataset, Features, Value

    if not rows:
        raise ValueError(f"{folder}: expected pairs to write, got none")
    clip = {"bytes": Value("binary"), "path": Value("string")}
    audio = ("audio_a", "audio_b", "reference_audio")
    kinds: dict[str, Any] = dict.fromkeys(("prompt", "reference_text", "voice", "id"), Value("string"))
    kinds |= dict.fromkeys(audio, clip) | dict.fromkeys(("seed_a", "seed_b", "row"), Value("int64"))
    present = {name: kind for name, kind in kinds.items() if any(name in row for row in rows)}
    columns = {name: [row.get(name) for row in rows] for name in present}
    file = folder / "data/train-00000.parquet"
    table = Dataset.from_dict(columns, features=Features(present))
    for name in audio:
        table = table.cast_column(name, Audio())  # from a struct: as a feature it would encode, with torchcodec
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda temporary: table.to_parquet(str(temporary)))
    # No `configs` in the card: of a local folder with them `datasets` 5 caches by the folder's last name alone, and
    # gives what another folder of that name held. It finds data/train-* by itself.
    card = (
        "---\ntask_categories:\n- text-to-speech\n---\n"
        f"# Pairs to label\n{about}\n\n{len(rows)} pairs, for `rlhf-mel annotate`.\n"
    )
    write_whole(folder / "README.md", lambda temporary: temporary.write_text(card, encoding="utf-8"))
    return folder


def push_dataset(folder: str | Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a data set's folder to the Hugging Face hub, as a private repository where it is new; its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, commit_message="Add pairs"))
