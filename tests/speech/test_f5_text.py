"""F5-TTS's pinyin and bytes: the tokens of f5-tts 1.1.22 (tests/make_fixtures.py); text as its inference joins it."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest

from rlhf_mel.speech.f5_text import byte_vocab, f5_reference_text
from rlhf_mel.speech.text import Tokenizer, load_tokenizer, load_vocab, tokens_to_ids

LINES = (Path(__file__).parents[1] / "fixtures/f5_tts_pinyin.jsonl").read_text(encoding="utf-8").splitlines()
RECORDED = [json.loads(line) for line in LINES]


@pytest.fixture
def pinyin() -> Tokenizer:
    pytest.importorskip("pypinyin")
    pytest.importorskip("rjieba")
    return load_tokenizer("pinyin")


@pytest.mark.parametrize("row", RECORDED, ids=[row["text"] for row in RECORDED])
def test_pinyin_is_that_of_f5_tts(row: dict, pinyin: Tokenizer) -> None:
    assert pinyin(row["text"]) == row["tokens"]


def test_pinyin_can_be_copied_and_pickled(pinyin: Tokenizer) -> None:
    for copied in (copy.deepcopy(pinyin), pickle.loads(pickle.dumps(pinyin))):
        assert copied("你好") == [" ", "ni2", " ", "hao3"]  # the first of two third tones becomes a second


def test_pinyin_joins_a_reference_and_a_text_as_inference_does(pinyin: Tokenizer) -> None:
    assert "".join(pinyin.prompt("Feed me", "Go on.", 10, 30)) == "Feed me.  Go on."
    assert pinyin.prompt("好。", "Go", 10, 30) == [" ", "hao3", "。", " ", "G", "o"]


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        ("Hi", "Hi.  "),
        ("Hi.", "Hi.  "),
        ("Hi. ", "Hi.  "),
        ("Hi?", "Hi?.  "),
        ("你好。", "你好。"),
        ("你好", "你好.  "),
    ],
)
def test_reference_text_ends_as_in_f5_tts(given: str, joined: str) -> None:
    """preprocess_ref_audio_text closes the sentence with ". ", infer_batch_process adds a space after ASCII."""
    assert f5_reference_text(given) == joined


def test_without_its_packages_pinyin_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(ImportError, match=r"pip install 'rlhf-mel\[pinyin\]', or pass tokenizer='char'"):
        load_tokenizer("pinyin")


def test_bytes_are_their_own_ids(tmp_path: Path) -> None:
    """A newline among the tokens must survive a file of one token a line."""
    text, vocab = "hé\n", byte_vocab()
    assert tokens_to_ids([load_tokenizer("byte")(text)], vocab).tolist() == [list(text.encode())]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab))
    assert load_vocab(tmp_path / "vocab.txt") == vocab
