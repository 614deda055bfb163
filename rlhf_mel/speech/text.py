"""Text to tokens to ids: vocabularies and tokenizers.

A tokenizer turns a sentence into a list of tokens, a vocabulary maps tokens to ids (F5-TTS: id = line number of
`vocab.txt`, batch padding -1; the backbone adds one, so that 0 is its filler). Two tokenizers:

`char`     F5-TTS's: the characters themselves.
`phoneme`  ARPAbet with stress from the CMU Pronouncing Dictionary (BSD-2-Clause, bundled), each phoneme repeated once
           for every two frames that it lasts. With the DiT's `text_embedding_average_upsampling`, which gives each
           token an equal share of the frames (ZipVoice, arXiv 2506.13053), a phoneme then stands over the frames in
           which it is heard, and a small model has no alignment left to learn.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rlhf_mel.lookup import did_you_mean
from rlhf_mel.speech.f5_text import ByteTokenizer, PinyinTokenizer
from rlhf_mel.storage import ASSETS

PUNCTUATION = (",", ".", "?", "!")


VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")


CONSONANTS = (*"BDFGKLMNPRSTVWYZ", "CH", "DH", "HH", "JH", "NG", "SH", "TH", "ZH")


SILENCE = " "


PHONEMES = (*(f"{vowel}{stress}" for vowel in VOWELS for stress in "012"), *CONSONANTS)


TOKENS = (SILENCE, *PHONEMES, *PUNCTUATION)
"""Line 0 of a vocabulary is the space, as in F5-TTS's."""


UNIT_FRAMES = 2
"""Mel frames for which a token of the phoneme tokenizer stands."""


@runtime_checkable
class Tokenizer(Protocol):
    """Sentence to tokens, and how long the sentence takes to say relative to others (the duration rule)."""

    name: str

    def __call__(self, text: str, frames: int | None = None) -> list[str]:
        """Tokens; where they stand for stretches of time, those of `frames` mel frames (None: its usual pace)."""
        ...

    def prompt(self, reference_text: str, text: str, reference_frames: int, frames: int) -> list[str]:
        """Tokens of a reference and of what is said after it, in `frames` frames, `reference_frames` of them its."""
        ...

    def spoken_length(self, text: str) -> float:
        """How long the text takes to say, in a unit of the tokenizer's own: only ratios count."""
        ...


@runtime_checkable
class TimedTokenizer(Tokenizer, Protocol):
    """A tokenizer whose tokens stand for stretches of time, and that can draw how long each lasts."""

    @property
    def draws_timing(self) -> bool:
        """Whether a distribution to draw from is known."""
        ...

    def drawn(self, seed: int) -> Tokenizer:
        """The tokenizer with durations of one draw for the texts that it reads, but for references, which are heard."""
        ...


class CharTokenizer:
    """F5-TTS's characters; speech time is taken to be proportional to UTF-8 bytes, as upstream's inference does."""

    name = "char"

    def __call__(self, text: str, frames: int | None = None) -> list[str]:
        """Characters. `frames` changes nothing."""
        return list(text)

    def prompt(self, reference_text: str, text: str, reference_frames: int, frames: int) -> list[str]:
        """Characters of both texts, a space between them. Frames change nothing."""
        return list(f"{reference_text} {text}")

    def spoken_length(self, text: str) -> float:
        """UTF-8 bytes."""
        return float(len(text.encode("utf-8")))


@functools.cache
def load_lexicon() -> Mapping[str, tuple[str, ...]]:
    """Lower-case word to its first pronunciation: the CMU Pronouncing Dictionary, bundled."""
    packed = (ASSETS / "cmudict.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    return {word: tuple(phonemes.split()) for word, phonemes in (line.split(" ", 1) for line in lines)}


@dataclass(frozen=True)
class Timing:
    """How the durations of takes differ from the likely ones: by log-normal factors, fitted by recipes/align.py."""

    pace_std: float
    """Standard deviation of the logarithm of a take's length."""
    local_std: float
    """The same of a phoneme's share of it."""
    local_correlation: float
    """Of the latter from one phoneme to the next: an autoregression of first order."""

    def draw(self, count: int, seed: int) -> list[float]:
        """`count` factors of one take; the same for the same seed on every machine. Beyond 2.5 sigma none is drawn."""
        pace, first, *rest = np.random.default_rng(seed).standard_normal(count + 1).clip(-2.5, 2.5).tolist()
        states = [first]
        for kick in rest:
            states.append(self.local_correlation * states[-1] + math.sqrt(1 - self.local_correlation**2) * kick)
        return [math.exp(self.pace_std * pace + self.local_std * state) for state in states]


class PhonemeTokenizer:
    """English words as ARPAbet, each phoneme as often as it lasts units of two frames; `{K AH0 M}` spells a word.

    A sentence is " " (the silence before it), its phonemes and its punctuation; a full stop is added where none closes
    it. Durations are linear in `weights` (`durations.json`, fitted by recipes/align.py); without, all are alike. Takes
    differ from them by `timing`, where a seed is given.

    Raises:
        ValueError: a character other than letters, apostrophe, space and , . ? ! ; : - or a word that is not in
            the lexicon (the message names it and how to spell it); fewer units of time than phonemes.
    """

    name = "phoneme"

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        units_per_phoneme: float = 3.5,
        timing: Timing | None = None,
        seed: int | None = None,
    ) -> None:
        self.weights, self.units_per_phoneme = weights, units_per_phoneme
        self.timing, self.seed = timing, seed

    @classmethod
    def from_durations(cls, card: Mapping[str, Any]) -> PhonemeTokenizer:
        """With what `durations_card` gave, or recipes/align.py wrote."""
        timing = Timing(**card["timing"]) if "timing" in card else None
        return cls(card["weights"], card["units_per_phoneme"], timing)

    @property
    def durations_card(self) -> dict[str, Any]:
        """Everything that decides how long phonemes last, as JSON takes it; see durations.json."""
        timing = {"timing": asdict(self.timing)} if self.timing else {}
        return {"units_per_phoneme": self.units_per_phoneme, **timing, "weights": self.weights}

    @property
    def draws_timing(self) -> bool:
        """Whether the tokenizer knows how takes differ."""
        return self.timing is not None

    def drawn(self, seed: int | None) -> PhonemeTokenizer:
        """The same with the durations of one take; None: with those that are most likely."""
        return PhonemeTokenizer(self.weights, self.units_per_phoneme, self.timing, seed)

    def __call__(self, text: str, frames: int | None = None) -> list[str]:
        """Phonemes, each once for two of the frames that it lasts, `frames` in all; None: the usual pace."""
        phonemes = self.phonemes(text)
        if not phonemes:
            return []
        durations = self.durations(phonemes)
        usual = max(round(sum(durations) * self.units_per_phoneme), len(phonemes))
        units = spread(durations, usual if frames is None else frames // UNIT_FRAMES)
        return [phoneme for phoneme, count in zip(phonemes, units, strict=True) for _ in range(count)]

    def prompt(self, reference_text: str, text: str, reference_frames: int, frames: int) -> list[str]:
        """Phonemes of the reference over its frames, then those of the text over the rest of `frames`."""
        # as when aligned: a reference of odd length ends with half a unit
        reference = reference_frames + reference_frames % UNIT_FRAMES
        return self.drawn(None)(reference_text, reference) + self(text, frames - reference)

    def spoken_length(self, text: str) -> float:
        """Sum of the phonemes' durations, in units of the mean phoneme."""
        return float(sum(self.durations(self.phonemes(text))))

    @staticmethod
    def phonemes(text: str) -> list[str]:
        """The sentence or sentences as tokens, each once; none if no word is said."""
        parts = PhonemeTokenizer._parts(text)
        if not any(part[-1].isalpha() or part[-1] in "'}" for part in parts):
            return []
        if parts[-1] not in PUNCTUATION:
            parts = [*parts, "."]
        tokens = [SILENCE]
        for index, part in enumerate(parts):
            tokens += PhonemeTokenizer._phonemes(part)
            if part in ".?!" and index + 1 < len(parts):
                tokens.append(SILENCE)
        return tokens

    def durations(self, phonemes: Sequence[str]) -> list[float]:
        """Seconds of each phoneme relative to the mean phoneme: at least a fifth, times what was drawn."""
        if self.weights is None:
            likely = [1.0] * len(phonemes)
        else:
            features = duration_features(phonemes)
            likely = [max(sum(self.weights.get(name, 0.0) for name in names), 0.2) for names in features]
        if self.timing is None or self.seed is None:
            return likely
        factors = self.timing.draw(len(phonemes), self.seed)
        return [duration * factor for duration, factor in zip(likely, factors, strict=True)]

    @staticmethod
    def _parts(text: str) -> list[str]:
        text = text.lower().replace("’", "'")
        spelled = re.sub(r"\{[^}]*\}", "", text)
        unknown = sorted(set(re.sub(r"[a-z' ,.?!;:\-]", "", spelled)))
        if unknown:
            raise ValueError(
                f"text has characters outside the vocabulary: expected English letters, apostrophes and , . ? ! ; : -, "
                f"got {unknown} in {text!r}; write numbers and symbols out as words"
            )
        return re.findall(r"\{[^}]*\}|[a-z][a-z']*|'[a-z]+|[,.?!;:]|-{2,}", text)

    @staticmethod
    def _phonemes(part: str) -> Sequence[str]:
        if part.startswith("{"):
            phonemes = part.strip("{}").upper().split()
            if unknown := [phoneme for phoneme in phonemes if phoneme not in PHONEMES]:
                raise ValueError(f"{part} is not ARPAbet with stress: {unknown} unknown; write e.g. {{K AH0 M}}")
            return phonemes
        if not part[0].isalpha() and part[0] != "'":
            return (part if part in PUNCTUATION else ",",)
        lexicon = load_lexicon()
        pronunciation = lexicon.get(part) or lexicon.get(part.strip("'"))
        if pronunciation is None:
            raise ValueError(
                f"the word {part!r} is not among the {len(lexicon):,} of the pronunciation lexicon; "
                "use another word, or spell it in ARPAbet: {K AH0 M}"
            )
        return pronunciation


def duration_features(phonemes: Sequence[str]) -> list[tuple[str, ...]]:
    """What decides how long each phoneme lasts: itself, its neighbours, and whether a pause is near."""
    padded = ["^", *phonemes, "$", "$"]
    features = []
    for before, now, after, later in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        names = [now, f"{before}<", f">{after}"]
        if after in PUNCTUATION:
            names.append(f"{now}|pause")
        elif later in PUNCTUATION:
            names.append(f"{now}|near pause")
        features.append(tuple(names))
    return features


def spread(durations: Sequence[float], units: int) -> list[int]:
    """`units` whole units shared in proportion to `durations`, each getting at least one; rounding never drifts.

    Raises:
        ValueError: fewer units than durations.
    """
    if units < len(durations):
        raise ValueError(f"expected at least a unit for each of {len(durations)} phonemes, got {units}; speak slower")
    scale = units / sum(durations)
    excess = [max(duration * scale - 1, 0.0) + 1e-9 for duration in durations]
    spare, total = units - len(durations), sum(excess)
    shares, given, until = [], 0, 0.0
    for beyond_one in excess:
        until += beyond_one
        upto = round(spare * until / total)
        shares.append(1 + upto - given)
        given = upto
    return shares


def _bundled_phonemes() -> PhonemeTokenizer:
    return PhonemeTokenizer.from_durations(json.loads((ASSETS / "durations.json").read_text(encoding="utf-8")))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte": ByteTokenizer,
    "char": CharTokenizer,
    "phoneme": _bundled_phonemes,
    "pinyin": PinyinTokenizer,
}


def load_tokenizer(name: str, durations: Mapping[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of that name; `durations`: for "phoneme", those that a policy was trained with, not the bundled.

    Raises:
        ValueError: an unknown name.
    """
    if name == "phoneme" and durations is not None:
        return PhonemeTokenizer.from_durations(durations)
    if name not in TOKENIZERS:
        known = sorted(TOKENIZERS)
        raise ValueError(f"unknown tokenizer {name!r}: expected one of {known}{did_you_mean(name, known)}")
    return TOKENIZERS[name]()


def load_vocab(path: str | Path) -> dict[str, int]:
    """Token to id from a vocabulary file of one token a line (LF or CRLF); id = line number (F5-TTS)."""
    text = Path(path).read_bytes().decode("utf-8").replace("\r\n", "\n")
    return {token: index for index, token in enumerate(text.removesuffix("\n").split("\n"))}


def tokens_to_ids(
    batch: Sequence[Sequence[str]], vocab: Mapping[str, int], *, strict: bool = True
) -> Int[Tensor, "b t"]:
    """Token lists to ids, padded with -1.

    `strict=False` is upstream's `list_str_to_idx`: a token outside the vocabulary becomes id 0.

    Raises:
        ValueError: `strict` and a token is not in the vocabulary.
    """
    unknown = sorted({token for tokens in batch for token in tokens if token not in vocab})
    if strict and unknown:
        raise ValueError(
            f"text has tokens outside the vocabulary: got {unknown[:10]}, expected some of the {len(vocab)} known; "
            "rewrite the text, or load the policy with its own vocab.txt"
        )
    rows = [torch.tensor([vocab.get(token, 0) for token in tokens], dtype=torch.long) for tokens in batch]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
