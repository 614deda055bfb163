"""The labelling page: gradio's components around labelling.py. It holds no state that a reload or a restart would lose.

What an answer needs (`where`: the annotator, the task, the axis) goes with the click, so that a page that was open when
the server died can go on with the next one. Clips have neither names nor addresses: they are in the page, as FLAC.
"""

from __future__ import annotations

import json
import os
from functools import partial
from html import escape
from typing import Any

from rlhf_mel.annotate.labelling import Labelling, Step, check_name
from rlhf_mel.annotate.media import clips_html, equally_loud
from rlhf_mel.evaluation.report_media import player
from rlhf_mel.speech.audio import resample
from rlhf_mel.storage import ASSETS

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: nothing is reported anywhere

SIDES = {"left": "A", "right": "B"}
"""What annotators read for each clip, whichever of the pair it is."""

BUTTONS = {"left": "A is better", "tie": "Tie", "right": "B is better", "both_bad": "Both bad"}
"""Of labelling.CHOICES, in the order of the page."""

KEYS = {"1 2 3": "play A, B, the reference", "a b": "A or B is better", "t": "tie", "x": "both bad", "u": "undo"}

WELCOME = """<p>You will hear the same sentence twice, A and B, and say which one is better. Listen to both to the end;
the order is random and says nothing. Where there is a reference clip, it is the voice that both should have. Every
answer is saved at once: you can close the page and go on later under the same name.</p>"""

DONE = "<p class='said'>All done, thank you. You can close this page.</p>"


def build_page(labelling: Labelling) -> Any:
    """The page as `gradio.Blocks`; server.py serves it.

    Raises:
        ImportError: gradio is not installed.
    """
    gr = _gradio()
    with gr.Blocks(title="Which is better?", analytics_enabled=False) as page:
        remembered = gr.BrowserState("", storage_key="rlhf-mel-annotator", secret="a name, not a secret")
        where = gr.JSON(visible=False)
        heard = gr.JSON(visible=False)
        with gr.Column(elem_id="welcome") as welcome:
            gr.HTML(WELCOME)
            name = gr.Textbox(label="Your name", max_length=64, elem_id="name", autofocus=True)
            start = gr.Button("Start", variant="primary", elem_id="start")
        with gr.Column(visible=False) as work:
            progress = gr.HTML(elem_id="progress")
            pair = gr.HTML(elem_id="pair")
            with gr.Column(visible=False) as asking:
                question = gr.HTML(elem_id="question")
                notice = gr.HTML(elem_id="notice")
                with gr.Row(elem_id="answers"):
                    buttons = {choice: gr.Button(text, elem_id=f"answer-{choice}") for choice, text in BUTTONS.items()}
            with gr.Row(elem_id="below"):
                undo = gr.Button("Undo", size="sm", elem_id="undo", scale=0, min_width=90)
                gr.HTML(_keys(), elem_id="keys")

        shown = [where, welcome, work, asking, progress, pair, question, notice]
        options: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")
        begin = partial(_begin, labelling)
        for event in (start.click, name.submit):
            event(begin, [name], [remembered, *shown], **options)
        for choice, button in buttons.items():
            button.click(
                partial(_answer, labelling, choice),
                [where, heard],
                shown,
                js="(where) => [where, window.secondsPlayed()]",
                **options,
            )
        undo.click(partial(_undo, labelling), [where], shown, **options)
        page.load(None, [remembered, name], [name], js="(kept, typed) => typed || kept", **options)
    return page


def page_options() -> dict[str, Any]:
    """Style and script, for `gradio.mount_gradio_app` or `Blocks.launch`: fonts of the system, no address outside."""
    gr = _gradio()
    assets = ASSETS / "annotate"
    return dict(
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=(assets / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(assets / 'page.js').read_text(encoding='utf-8')}</script>",
        footer_links=[],
    )


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            "the labelling page: expected the package gradio, found none; pip install 'rlhf-mel[annotate]'"
        ) from error
    return gradio


def _begin(labelling: Labelling, name: str) -> list[Any]:
    try:
        annotator = check_name(name or "")
    except ValueError as error:
        raise _gradio().Error(f"Please give a name. {error}", print_exception=False) from error
    return [annotator, *_show(labelling, annotator, shown=None)]


def _answer(labelling: Labelling, choice: str, where: Any, heard: Any) -> list[Any]:
    """Write the answer, then show the next question; where a clip was not played, ask for that instead."""
    where, heard = _value(where), _value(heard)
    if not where or where["task"] is None:
        return _unchanged("")
    step = labelling.step(where["annotator"], where["task"], where["axis"])
    left_s, right_s = (float(seconds) for seconds in heard)
    if not (left_s > 0 and right_s > 0):
        return _unchanged("Please play both clips first.")
    new = labelling.answer(step, choice, heard_s=(left_s, right_s))
    return _show(labelling, step.annotator, shown=step.task.id, notice="" if new else "That was answered already.")


def _undo(labelling: Labelling, where: Any) -> list[Any]:
    where = _value(where)
    done = labelling.undo(where["annotator"])
    notice = "" if done else "There is no answer to take back."
    return _show(labelling, where["annotator"], shown=where["task"], notice=notice)


def _show(labelling: Labelling, annotator: str, *, shown: str | None, notice: str = "") -> list[Any]:
    """What is on the page now; the clips stay, and what was played of them counts on, where the pair does."""
    gr = _gradio()
    step = labelling.next_step(annotator)
    work = [gr.update(visible=False), gr.update(visible=True)]
    if step is None:
        return [
            {"annotator": annotator, "task": None, "axis": None},
            *work,
            gr.update(visible=False),
            "",
            DONE,
            "",
            notice,
        ]
    pair = gr.skip() if step.task.id == shown else pair_html(labelling, step)
    where = {"annotator": annotator, "task": step.task.id, "axis": step.axis}
    return [where, *work, gr.update(visible=True), _progress(step, annotator), pair, _question(step), notice]


def _unchanged(notice: str) -> list[Any]:
    return [_gradio().skip()] * 7 + [escape(notice)]


def pair_html(labelling: Labelling, step: Step) -> str:
    """The text, both clips and the reference, equally loud and at one sample rate; nothing says which clip is which."""
    row = labelling.pairs.rows[step.task.row]
    clips = labelling.clips(step.task)
    rate_hz = max(rate for _, rate in clips.values())
    sounds = equally_loud([resample(clip[None], rate, rate_hz)[0] for clip, rate in clips.values()], rate_hz)
    heard = dict(zip(clips, sounds, strict=True))
    views = clips_html({SIDES[side]: heard[side] for side in SIDES}, rate_hz)
    sides = "".join(f'<div data-clip="{side}"><h3>{label}</h3>{views[label]}</div>' for side, label in SIDES.items())
    reference = ""
    if "reference" in clips:
        text = row.get("reference_text")
        said = f"“{escape(str(text))}”" if text else "the voice that both should have"
        sound = player(heard["reference"], rate_hz)
        reference = f'<div class="reference" data-clip="reference"><p>Reference: {said}</p>{sound}</div>'
    return f'<p class="said">{escape(row["prompt"])}</p><div class="clips">{sides}</div>{reference}'


def _progress(step: Step, annotator: str) -> str:
    return f"<p>{step.number} of {step.total} · {escape(annotator)}</p>"


def _question(step: Step) -> str:
    return f"<p>Which one is better: {escape(step.axis.replace('_', ' '))}?</p>"


def _keys() -> str:
    def named(keys: str) -> str:
        return " ".join(f"<kbd>{key}</kbd>" for key in keys.split())

    return " &nbsp; ".join(f"{named(keys)} {meaning}" for keys, meaning in KEYS.items())


def _value(sent: Any) -> Any:
    """What a JSON component sent, which may be the text of it."""
    return json.loads(sent) if isinstance(sent, str) else sent
