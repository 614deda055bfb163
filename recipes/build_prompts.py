"""Choose the bundled prompts from a corpus: sentences to speak, and reference clips of each voice.

Writes `train.jsonl` (168 sentences), `tuning.jsonl` (32, to choose settings by), `heldout.jsonl` (50, to report) and
`references/*.flac` into --out; a line is `{"id", "text", "voice", "reference_audio", "reference_text"}`, the path
relative to the file. Training prompts are sentences that the corpus holds; the others no voice of it has said, and
their reference clips are of its held-out side. Voices alternate. Clips are short, so that a solve on a CPU is: a
reference of about a second, and texts that will take 2.3 to 2.9 s after it. (DNSMOS, which repeats a clip to 9 s by
doubling it, takes three times as long for 2.2 s as for 2.5 s.)
Hardware: any; seconds.
    python recipes/build_prompts.py --data data/corpus --text books/*.txt --out rlhf_mel/assets/prompts
"""

from __future__ import annotations

import argparse
import functools
import json
import random
from pathlib import Path

import soundfile
from build_corpus import sentences
from corpus_data import is_held_out

from rlhf_mel.f5.checkpoints import load_policy
from rlhf_mel.speech.text import load_lexicon
from rlhf_mel.speech.token_cache import CachedTokenizer, cached

REFERENCE_S = (1.0, 1.6)
SPEECH_S = (2.3, 2.9)
"""What the bundled policy takes for a text on average; takes differ by a tenth."""
WORDS = (4, 10)


def references(clips: list[dict], voice: str, count: int, rng: random.Random) -> list[dict]:
    """`count` clips of a voice, of a length that is cheap to condition on."""
    low, high = REFERENCE_S
    fitting = [clip for clip in clips if clip["voice"] == voice and low <= clip["duration_s"] <= high]
    return rng.sample(fitting, count)


def prompts(
    texts: list[str], clips: list[dict], count: int, references_per_voice: int, rng: random.Random
) -> list[dict]:
    """`count` sentences, each with the next voice and one of its reference clips, which say something else."""
    voices = sorted({clip["voice"] for clip in clips})
    known = {voice: references(clips, voice, references_per_voice, rng) for voice in voices}
    taken = {clip["text"] for clips_of_voice in known.values() for clip in clips_of_voice}
    pool = [text for text in texts if text not in taken and WORDS[0] <= len(text.split()) <= WORDS[1]]
    rng.shuffle(pool)
    rows = []
    for index in range(count):
        voice = voices[index % len(voices)]
        reference = known[voice][index // len(voices) % references_per_voice]
        text = next(text for text in pool if SPEECH_S[0] <= seconds_of(text, reference) <= SPEECH_S[1])
        pool.remove(text)
        rows.append({"text": text, "voice": voice, "reference": reference})
    return rows


def seconds_of(text: str, reference: dict) -> float:
    """How long the bundled policy takes for a text after a reference clip (speech/durations.py)."""
    tokenizer = bundled_tokenizer()
    return reference["duration_s"] * tokenizer.spoken_length(text) / tokenizer.spoken_length(reference["text"])


@functools.cache
def bundled_tokenizer() -> CachedTokenizer:
    return cached(load_policy("tiny").tokenizer)


def write(rows: list[dict], side: str, data: Path, out: Path) -> None:
    lines = []
    for index, row in enumerate(rows):
        clip = row["reference"]
        path = Path("references") / f"{clip['id']}.flac"
        speech, sample_rate_hz = soundfile.read(data / clip["file"], dtype="int16")
        soundfile.write(out / path, speech, sample_rate_hz)
        line = {"id": f"{side}_{index:03d}", "text": row["text"], "voice": row["voice"]}
        lines.append(json.dumps(line | {"reference_audio": path.as_posix(), "reference_text": clip["text"]}))
    (out / f"{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="the books that the corpus was taken from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=168)
    parser.add_argument("--tuning", type=int, default=32)
    parser.add_argument("--held_out", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    lines = (args.data / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    clips = [json.loads(line) for line in lines]
    (args.out / "references").mkdir(parents=True, exist_ok=True)
    train = [clip for clip in clips if not is_held_out(clip["text"])]
    held_out = [clip for clip in clips if is_held_out(clip["text"])]
    lexicon, spoken = set(load_lexicon()), {clip["text"] for clip in clips}
    books = [sentences(path.read_text(encoding="utf-8", errors="replace"), lexicon) for path in args.text]
    unspoken = sorted({text for book in books for text in book} - spoken)
    rows = prompts(sorted({clip["text"] for clip in train}), train, args.train, 4, rng)
    write(rows, "train", args.data, args.out)
    rows = prompts(unspoken, held_out, args.tuning + args.held_out, 3, rng)
    write(rows[: args.tuning], "tuning", args.data, args.out)
    write(rows[args.tuning :], "heldout", args.data, args.out)


if __name__ == "__main__":
    main()
