"""The page without a browser: what a click does, what the page says and does not say, who may see it."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from pair_tables import encoded, labelling_of, pair_rows, tone

from rlhf_mel.annotate import page
from rlhf_mel.annotate.labelling import Labelling
from rlhf_mel.annotate.server import POLICY, TokenGate, build_app, token_for
from rlhf_mel.annotate.store import Answers
from rlhf_mel.annotate.tasks import Pairs
from rlhf_mel.speech.audio import loudness_lufs
from rlhf_mel.storage import ASSETS

WHERE, PAIR, QUESTION, NOTICE = 0, 5, 6, 7
"""Places of what a click changes."""


def sounds(html: str) -> list[tuple[torch.Tensor, int]]:
    """The clips of a page, in its order."""
    files = re.findall(r'src="data:audio/flac;base64,([^"]+)"', html)
    read = [soundfile.read(BytesIO(base64.b64decode(file)), dtype="float32") for file in files]
    return [(torch.from_numpy(samples), rate_hz) for samples, rate_hz in read]


def begun(labelling: Labelling) -> list[Any]:
    return page._begin(labelling, " ann ")


def test_an_answer_is_written_before_the_next_question_is_shown(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, axes=["naturalness", "voice_similarity"])
    name, *shown = begun(labelling)
    first = shown[WHERE]
    assert name == "ann" and "Which one is better: naturalness?" in shown[QUESTION] and len(sounds(shown[PAIR])) == 3
    shown = page._answer(labelling, "left", first, [0.5, 0.4])
    (kept,) = labelling.answers.all()
    assert (kept.task, kept.axis, kept.answer) == (first["task"], "naturalness", kept.left_clip)
    assert "voice similarity" in shown[QUESTION] and not isinstance(shown[PAIR], str)  # the same pair stays
    shown = page._answer(labelling, "both_bad", shown[WHERE], [0.5, 0.4])
    assert len(labelling.answers.all()) == 2 and len(sounds(shown[PAIR])) == 3
    shown = page._undo(labelling, shown[WHERE])
    assert shown[WHERE] == first | {"axis": "voice_similarity"} and len(sounds(shown[PAIR])) == 3
    assert len(labelling.answers.all()) == 1


def test_both_clips_are_to_be_played_first(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path)
    _, *shown = begun(labelling)
    for heard in ([0, 0], [0.5, 0], [0, 0.5]):
        said = page._answer(labelling, "left", shown[WHERE], heard)
        assert said[NOTICE] == "Please play both clips first." and not labelling.answers.all()


def test_a_page_of_yesterday_answers_its_own_question(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path)
    _, *shown = begun(labelling)
    old = shown[WHERE]
    page._answer(labelling, "left", old, [1, 1])
    again = page._answer(labelling_of(tmp_path), "tie", old, [1, 1])  # after a restart
    assert again[NOTICE] == "That was answered already." and again[WHERE] != old
    assert [answer.answer for answer in labelling.answers.all()] != ["tie"]


def test_all_done_is_said_and_can_be_undone(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, 1)
    _, *shown = begun(labelling)
    shown = page._answer(labelling, "tie", shown[WHERE], [1, 1])
    assert shown[WHERE]["task"] is None and "All done" in shown[PAIR]
    assert page._answer(labelling, "tie", shown[WHERE], [0, 0])[NOTICE] == ""  # a key too many
    assert page._undo(labelling, shown[WHERE])[WHERE]["axis"] == "overall"
    assert page._undo(labelling, shown[WHERE])[NOTICE] == "There is no answer to take back."


def test_the_clips_are_equally_loud_whatever_their_rate(tmp_path: Path) -> None:
    row = pair_rows(1)[0]
    row["audio_a"] = encoded(tone(300, 1.0, 0.9, 16_000), 16_000)
    row["audio_b"] = encoded(tone(400, 1.0, 0.01))
    labelling = Labelling(Pairs([row]), Answers(tmp_path / "a.sqlite"), check_share=0)
    heard = sounds(begun(labelling)[1 + PAIR])
    assert [rate_hz for _, rate_hz in heard] == [24_000] * 3
    assert [float(loudness_lufs(*clip)) for clip in heard] == pytest.approx([-23] * 3, abs=0.01)  # 16-bit rounding


def test_the_page_does_not_say_which_clip_is_which(tmp_path: Path) -> None:
    labelling = labelling_of(tmp_path, 8, check_share=0)
    texts = {}
    for task in labelling.plan("ann"):
        html = page.pair_html(labelling, labelling.step("ann", task.id, "overall"))
        left, right, _ = (len(samples) for samples, _ in sounds(html))
        assert (left, right) == ((14_400, 21_600) if task.left_clip == "a" else (21_600, 14_400))
        plain = re.sub(r'"data:[^"]+"|<path [^>]+>|width:[\d.]+%|viewBox="[^"]+"', "", html)
        texts[task.left_clip] = plain.replace(labelling.pairs.rows[task.row]["prompt"], "")
    assert texts["a"] == texts["b"]


def test_texts_are_shown_as_they_are(tmp_path: Path) -> None:
    row = pair_rows(1)[0] | {"prompt": "<b>1 & 2</b> {{x}} ${y}", "reference_text": "<script>alert(1)</script>"}
    labelling = Labelling(Pairs([row]), Answers(tmp_path / "a.sqlite"), axes=["<i>"], check_share=0)
    shown = begun(labelling)[1:]
    assert "&lt;b&gt;1 &amp; 2&lt;/b&gt; {{x}} ${y}" in shown[PAIR] and "<script>" not in shown[PAIR]
    assert "&lt;i&gt;" in shown[QUESTION]


def test_nothing_of_the_page_lies_elsewhere() -> None:
    own = [file.read_text() for file in (ASSETS / "annotate").iterdir()]
    options = page.page_options()
    assert len(own) == 2 and not any("//" in text.replace("// ", "") for text in own)
    named = set(re.findall(r"https?://[^/'\")]+", options["theme"]._get_theme_css()))
    assert named == {"http://www.w3.org"} and not options["theme"]._stylesheets  # the name of SVG, which no one loads
    assert set(page.BUTTONS) == {"left", "right", "tie", "both_bad"}


@pytest.mark.parametrize(
    "host, needed", [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True), ("10.1.2.3", True)]
)
def test_a_token_is_needed_beyond_localhost(host: str, needed: bool) -> None:
    assert (token_for(host) is not None) == needed
    if needed:
        assert token_for(host) != token_for(host) and len(token_for(host) or "") >= 20


def test_the_token_opens_the_page_and_nothing_else_does(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    app = build_app(labelling_of(tmp_path), "the token")
    with TestClient(app, follow_redirects=False) as client:
        for path in ("/", "/config", "/gradio_api/info", "/assets/x.js", "/?token=other", "/?token="):
            refused = client.get(path)
            assert refused.status_code == 401 and "token" in refused.text and "set-cookie" not in refused.headers
        assert client.post("/gradio_api/queue/join?token=the+token").status_code == 401
        opened = client.get("/?token=the+token&other=1")
        assert opened.status_code == 307 and opened.headers["location"] == "/?other=1"
        cookie = opened.headers["set-cookie"]
        assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
        shown = client.get("/")
        assert shown.status_code == 200 and "Which is better?" in shown.text
        assert shown.headers["content-security-policy"] == POLICY
        client.cookies.set("rlhf-mel-token", "other")
        client.cookies.delete("rlhf-mel-token", domain="testserver.local")
        assert client.get("/config").status_code == 401


def test_on_this_machine_alone_no_token_is_needed(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    with TestClient(build_app(labelling_of(tmp_path), None)) as client:
        assert client.get("/").status_code == 200


def test_a_websocket_is_behind_the_gate_too() -> None:
    from starlette.testclient import TestClient
    from starlette.websockets import WebSocketDisconnect

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("reached")

    with pytest.raises(WebSocketDisconnect), TestClient(TokenGate(app, "t")).websocket_connect("/ws?token=t"):
        pass
