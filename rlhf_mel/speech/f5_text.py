"""The tokenizers of F5-TTS besides its characters: pinyin for Chinese, and UTF-8 bytes.

`pinyin`   Chinese words become syllables with a tone number, a space before each; all else stays characters. Tokens
           equal those of f5-tts 1.1.22's `convert_char_to_pinyin` (tests/fixtures/f5_tts_pinyin.jsonl). Needs the
           extra `pinyin`: rjieba finds the words, pypinyin reads them and applies tone sandhi.
`byte`     UTF-8 bytes, 256 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF_WIDTH = str.maketrans({";": ",", "“": '"', "”": '"', "‘": "'", "’": "'"})
"""What F5-TTS's vocabulary lacks, as what it has."""


class PinyinTokenizer:
    """F5-TTS's pinyin; speech time is taken to be proportional to UTF-8 bytes.

    Raises:
        ImportError: pypinyin or rjieba is missing.
    """

    name = "pinyin"

    def __init__(self) -> None:
        try:
            import pypinyin
            import rjieba
        except ImportError as error:
            raise ImportError(
                f"tokenizer 'pinyin': expected pypinyin and rjieba, got: {error}; pip install 'rlhf-mel[pinyin]', or"
                " pass tokenizer='char' to load_policy for text without Chinese"
            ) from error
        self._cut: Any = rjieba.cut
        self._pypinyin: Any = pypinyin

    def __call__(self, text: str, frames: int | None = None) -> list[str]:
        """Syllables with tone numbers, a space before each; else characters. `frames` changes nothing."""
        tokens: list[str] = []
        for word in self._cut(text.translate(HALF_WIDTH)):
            if word.isascii():
                if tokens and len(word) > 1 and tokens[-1] not in " :'\"":
                    tokens.append(" ")
                tokens.extend(word)
            else:
                tokens += self._spell(word)
        return tokens

    def prompt(self, reference_text: str, text: str, reference_frames: int, frames: int) -> list[str]:
        """Tokens of both texts, joined as f5-tts's inference joins them. Frames change nothing."""
        return self(f5_reference_text(reference_text) + text)

    def spoken_length(self, text: str) -> float:
        """UTF-8 bytes."""
        return float(len(text.encode("utf-8")))

    def __reduce__(self) -> Any:
        return PinyinTokenizer, ()  # modules can be neither copied nor pickled

    def _spell(self, word: str) -> list[str]:
        """A word with characters beyond ASCII; its Chinese read as one word where it is nothing but East Asian."""
        readings = self._read(word) if all(len(char.encode("utf-8")) == 3 for char in word) else []
        if len(readings) != len(word):
            readings = [self._read(char)[0] if is_chinese(char) else char for char in word]
        tokens = []
        for char, reading in zip(word, readings, strict=True):
            tokens += [" ", reading] if is_chinese(char) else [reading]
        return tokens

    def _read(self, word: str) -> Sequence[str]:
        readings: list[str] = self._pypinyin.lazy_pinyin(word, style=self._pypinyin.Style.TONE3, tone_sandhi=True)
        return readings


def is_chinese(char: str) -> bool:
    """F5-TTS's range: from bopomofo to the unified ideographs."""
    return "\u3100" <= char <= "\u9fff"


def f5_reference_text(text: str) -> str:
    """The transcript of a reference clip as f5-tts's inference puts it before the text to speak.

    It ends in ". " or "。"; and where its last character is ASCII, in one space more.
    """
    if not text.endswith((". ", "。")):
        text += " " if text.endswith(".") else ". "
    return f"{text} " if text[-1].isascii() else text


class ByteTokenizer:
    """UTF-8 bytes, written <0x00> to <0xFF> so that a vocabulary file can hold them."""

    name = "byte"

    def __call__(self, text: str, frames: int | None = None) -> list[str]:
        """A token a byte. `frames` changes nothing."""
        return [f"<0x{byte:02X}>" for byte in text.encode("utf-8")]

    def prompt(self, reference_text: str, text: str, reference_frames: int, frames: int) -> list[str]:
        """Tokens of both texts, joined as f5-tts's inference joins them. Frames change nothing."""
        return self(f5_reference_text(reference_text) + text)

    def spoken_length(self, text: str) -> float:
        """UTF-8 bytes."""
        return float(len(text.encode("utf-8")))


def byte_vocab() -> dict[str, int]:
    """Token to id: a byte's id is its value, as in F5-TTS."""
    return {f"<0x{byte:02X}>": byte for byte in range(256)}
