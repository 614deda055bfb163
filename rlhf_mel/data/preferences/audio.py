"""Clips of preference data: every form in which a row can hold one, and what is known of a clip before it is used.

| a row holds                      | what becomes of it                                                  |
|----------------------------------|---------------------------------------------------------------------|
| a path, relative to the data set | a path                                                              |
| a URL                            | downloaded into the cache of `datasets` where that was asked for    |
| bytes, or {"bytes", "path"}      | these bytes                                                         |
| {"array", "sampling_rate"}       | a WAV of floats in memory, so the same samples                      |

Clips are compared by their samples, so the same speech as WAV and as FLAC counts as the same clip. Unlike reference
clips (speech/audio.py), a clip that was compared may be silent or distorted: that may be why it was rejected.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_mel.speech.audio import MelSpec, load_audio, read_mono, read_speech, resample
from rlhf_mel.speech.reference_clips import prepare_reference
from rlhf_mel.storage import write_whole

Encoded = dict[str, Any]
"""{"bytes": a file's bytes or None, "path": a path or None}, as `datasets` has it with Audio(decode=False)."""


DOWNLOAD_TIMEOUT_S = 60.0


UNREADABLE = (ValueError, OSError, RuntimeError)
"""What reading a clip can raise: no audio, no file, or an error of libsndfile."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: Any) -> str:
    """A value in at most about 60 characters, for messages: never a whole array."""
    return _SHORT.repr(value)


def is_url(value: Any) -> bool:
    """Whether a row's clip, a string or the path of an encoded one, is to be fetched by HTTP."""
    if isinstance(value, Mapping):
        value = None if value.get("bytes") else value.get("path")
    return isinstance(value, str) and value.startswith(("http://", "https://"))


@dataclass
class ClipReader:
    """Turns what a row holds into an encoded clip."""

    root: Path = Path(".")
    """Where relative paths start."""
    fetch_urls: bool = False
    fetched: dict[str, str] = field(default_factory=dict)
    """Where each URL lies on this machine."""

    def encoded(self, value: Any) -> Encoded:
        """The clip as bytes or as a path that can be opened.

        Raises:
            ValueError: it is no clip, or a URL that was not to be fetched.
            OSError: it could not be fetched.
        """
        if isinstance(value, bytes):
            value = {"bytes": value, "path": None}
        elif isinstance(value, str | Path):
            value = {"bytes": None, "path": str(value)}
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a clip as path, bytes or samples, got {shown(value)}")
        if value.get("array") is not None:
            return {"bytes": wav_bytes(value["array"], value.get("sampling_rate")), "path": None}
        if value.get("bytes"):
            return {"bytes": value["bytes"], "path": value.get("path")}
        if not value.get("path"):
            raise ValueError(
                "expected a clip, got none" if value.get("bytes") is None else "expected a clip, got 0 bytes"
            )
        return {"bytes": None, "path": self._place(value["path"])}

    def _place(self, path: str) -> str:
        """A path that can be opened."""
        if is_url(path):
            return self._fetch(path)
        return path if "://" in path else str(self.root / path)

    def _fetch(self, url: str) -> str:
        if not self.fetch_urls:
            raise ValueError(f"expected a clip, got the URL {shown(url)}; pass fetch_urls=True to download it")
        if url not in self.fetched:
            self.fetched[url] = _download(url)
        return self.fetched[url]


def _download(url: str) -> str:
    """Where the file lies in the cache of `datasets`; fetched if it is not there yet."""
    from datasets import config  # slow to import

    folder = Path(config.HF_DATASETS_CACHE) / "rlhf_mel_clips"
    file = folder / (hashlib.sha256(url.encode()).hexdigest() + Path(urlsplit(url).path).suffix)
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            content = response.read()
        write_whole(file, lambda path: path.write_bytes(content))
    return str(file)


def wav_bytes(samples: Any, sample_rate_hz: int | None) -> bytes:
    """A WAV file of float32 with these samples, [samples] or [channels, samples].

    Raises:
        ValueError: no sample rate, or no such array.
    """
    import soundfile  # loads a C library

    array = np.asarray(samples, dtype=np.float32)
    if array.ndim not in (1, 2) or array.size == 0 or not sample_rate_hz:
        raise ValueError(f"expected samples and a sampling_rate, got shape {array.shape} at {sample_rate_hz} Hz")
    buffer = BytesIO()
    soundfile.write(buffer, array.T, int(sample_rate_hz), format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def clip_bytes(clip: Encoded) -> bytes:
    """The bytes of an encoded clip's file."""
    if clip["bytes"]:
        return bytes(clip["bytes"])
    if "://" in clip["path"]:
        import fsspec

        with fsspec.open(clip["path"], "rb") as file:
            return bytes(file.read())
    return Path(clip["path"]).read_bytes()


def read_clip(clip: Encoded) -> tuple[Float[Tensor, " s"], int]:
    """Mono samples in [-1, 1] of an encoded clip, and its sample rate in Hz.

    Raises:
        ValueError: it is not audio, empty, or not finite.
        OSError: there is no such file.
    """
    name = Path(clip["path"]).name if clip["path"] else "audio in memory"
    local = clip["path"] and not clip["bytes"] and "://" not in clip["path"]
    waveform, rate_hz = read_mono(clip["path"] if local else clip_bytes(clip), name)
    if waveform.numel() == 0:
        raise ValueError(f"{name}: expected sound, got an empty file")
    if not torch.isfinite(waveform).all():
        raise ValueError(f"{name}: expected finite samples, got NaN or infinity")
    return waveform, rate_hz


def load_clip(clip: Encoded, sample_rate_hz: int) -> Float[Tensor, " s"]:
    """As read_clip, resampled to `sample_rate_hz`."""
    waveform, rate_hz = read_clip(clip)
    return resample(waveform[None], rate_hz, sample_rate_hz)[0]


def load_reference(clip: Encoded, sample_rate_hz: int, prepare: bool = False) -> Float[Tensor, " s"]:
    """A reference clip as for any prompt: at most 12 s, neither silent nor distorted; or prepared as F5-TTS does."""
    source = clip_bytes(clip)
    return prepare_reference(*read_speech(source), sample_rate_hz) if prepare else load_audio(source, sample_rate_hz)


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Where a clip lies: a cell of a table, read when it is needed."""

    table: Any
    """A `datasets.Dataset`, or a sequence of rows."""
    row: int
    column: str

    @property
    def value(self) -> Any:
        """What the cell holds."""
        return self.table[self.row].get(self.column)

    @property
    def key(self) -> tuple[int, int, str]:
        """The same for the same cell."""
        return id(self.table), self.row, self.column


@dataclass(frozen=True, slots=True)
class ClipFacts:
    """What is known of a clip."""

    problem: str | None = None
    """Why it cannot be used, or None."""
    digest: bytes = b""
    """Of its samples, or where these were not decoded of its bytes."""
    rate_hz: int = 0
    samples: int = 0


class Inspector:
    """Reads each clip once and keeps what is known of it.

    Args:
        reader: of the clips.
        mel_spec: a clip too short for a frame of this mel cannot be used.
        decode: decode each clip (about 5 ms); else only its header is read, and what is wrong behind it shows later.
        prepare: reference clips are prepared as F5-TTS does.
    """

    def __init__(
        self,
        reader: ClipReader,
        mel_spec: MelSpec,
        *,
        decode: bool = True,
        prepare: bool = False,
    ) -> None:
        self.reader = reader
        self.rates_hz: set[int] = set()
        self._mel_spec = mel_spec
        self._decode = decode
        self._prepare = prepare
        self._facts: dict[tuple[int, int, str], ClipFacts] = {}
        self._references: dict[tuple[int, int, str], str | None] = {}

    def facts(self, clip: Clip) -> ClipFacts:
        """What is known of the clip."""
        if clip.key in self._facts:
            return self._facts[clip.key]
        try:
            encoded = self.reader.encoded(clip.value)
            facts = self._check(_decoded_facts(encoded) if self._decode else _header_facts(encoded))
        except UNREADABLE as error:
            facts = ClipFacts(problem=str(error)[:200])
        self._facts[clip.key] = facts
        return facts

    def forget(self) -> None:
        """Keep nothing of the clips so far: those of a stream are gone, and their keys are given to others."""
        self._facts.clear()
        self._references.clear()

    def identical(self, first: Clip, second: Clip) -> bool:
        """Whether both clips have the same samples; of clips that can be used."""
        one, other = self.facts(first), self.facts(second)
        if one.digest == other.digest:
            return True
        if self._decode or (one.rate_hz, one.samples) != (other.rate_hz, other.samples):
            return False
        try:
            return torch.equal(*(read_clip(self.reader.encoded(clip.value))[0] for clip in (first, second)))
        except UNREADABLE:  # found, and raised, when the clip is used: only headers were to be checked
            return False

    def reference_problem(self, clip: Clip) -> str | None:
        """Why a reference clip cannot be used, or None."""
        if clip.key not in self._references:
            try:
                load_reference(self.reader.encoded(clip.value), self._mel_spec.sample_rate_hz, self._prepare)
                problem = None
            except UNREADABLE as error:
                problem = str(error)[:200]
            self._references[clip.key] = problem
        return self._references[clip.key]

    def _check(self, facts: ClipFacts) -> ClipFacts:
        """The facts, with a problem where no mel can be made of the clip."""
        self.rates_hz.add(facts.rate_hz)
        least = self._mel_spec.n_fft // 2  # log_mel mirrors as many samples at the edges
        if -(-facts.samples * self._mel_spec.sample_rate_hz // facts.rate_hz) <= least:
            problem = f"expected more than {least / self._mel_spec.sample_rate_hz:.3f} s, got {facts.samples} samples"
            return ClipFacts(problem=f"{problem} at {facts.rate_hz} Hz")
        return facts


def _decoded_facts(clip: Encoded) -> ClipFacts:
    waveform, rate_hz = read_clip(clip)
    digest = hashlib.blake2b(waveform.numpy().tobytes(), salt=rate_hz.to_bytes(16, "big"), digest_size=16)
    return ClipFacts(digest=digest.digest(), rate_hz=rate_hz, samples=waveform.numel())


def _header_facts(clip: Encoded) -> ClipFacts:
    import soundfile

    content = clip_bytes(clip)
    header = soundfile.info(BytesIO(content))
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return ClipFacts(digest=digest, rate_hz=header.samplerate, samples=header.frames)
