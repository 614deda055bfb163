"""The page in a headless Chromium, driven by selenium: keys, sound, undo, two at once, a killed server, small screens.

apt-get install chromium chromium-driver
python -m pytest -m browser
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pair_tables import encoded, pair_rows, tone

from rlhf_mel.annotate.store import Answers

pytestmark = pytest.mark.browser

WAIT_S = 60

SCREENSHOTS = os.environ.get("SCREENSHOTS")
"""A folder for pictures of each test's end, to look at."""


class Server:
    """`rlhf-mel annotate` in a process of its own."""

    def __init__(self, folder: Path, *options: str, port: int = 0, pairs: Path | None = None) -> None:
        self.answers = Answers(folder / "answers.sqlite")
        given = [str(pairs or folder / "pairs.parquet"), "--answers", str(self.answers.path), "--port", str(port)]
        command = [sys.executable, "-m", "rlhf_mel.cli", "annotate", *given, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("labelling page: http://"), line
        self.address = line.split()[-1]
        self.port = int(self.address.split(":")[2].split("/")[0])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Visitor:
    """One annotator's browser."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        self.address = address

    def wait(self, true: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, WAIT_S, 0.05, [StaleElementReferenceException, AssertionError])
        return waiting.until(lambda _: true())

    def find(self, selector: str) -> Any:
        found = self.driver.find_elements("css selector", selector)
        return found[0] if found and found[0].is_displayed() else None

    def text(self, selector: str) -> str:
        element = self.find(selector)
        return element.text if element else ""

    def script(self, code: str) -> Any:
        return self.driver.execute_script(code)

    def begin(self, name: str | None) -> None:
        """Give a name, or take the one that is there."""
        self.driver.get(self.address)
        field = self.wait(lambda: self.find("#name input, #name textarea"))
        if name is None:
            self.wait(lambda: field.get_attribute("value"))
        else:
            field.clear()
            field.send_keys(name)
        self.wait(lambda: self.find("#start")).click()
        self.wait(lambda: self.find("#pair audio"))

    def press(self, keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(keys).perform()

    def state(self, side: str) -> dict[str, Any]:
        code = f"""const a = document.querySelector('#pair [data-clip="{side}"] audio');
            return {{paused: a.paused, time: a.currentTime, ready: a.readyState, error: a.error && a.error.message,
                duration: a.duration, played: a.played.length}}"""
        found: dict[str, Any] = self.script(code)
        return found

    def hear(self) -> None:
        """Play both clips, each until it has sounded."""
        for key, side in (("1", "left"), ("2", "right")):
            self.press(key)
            self.wait(lambda side=side: self.state(side)["time"] > 0.05)

    def asked(self) -> tuple[str, str]:
        return self.text("#progress"), self.text("#question")

    def answer(self, key: str) -> None:
        """Hear both, press a key, and wait for the next question."""
        before = self.asked()
        self.hear()
        self.press(key)
        self.wait(lambda: self.asked() != before)

    def screen(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@pytest.fixture
def open_browser() -> Iterator[Callable[[str], Visitor]]:
    from selenium import webdriver

    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    assert all(programs.values()), f"{programs}: expected both on the path; apt-get install chromium chromium-driver"
    drivers = []

    def opened(address: str) -> Visitor:
        options = webdriver.ChromeOptions()
        options.binary_location = str(programs["chromium"])
        flags = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "disable-background-networking")
        for flag in (*flags, "autoplay-policy=no-user-gesture-required"):  # keys of a driver are no gestures to it
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(executable_path=str(programs["chromedriver"]))
        drivers.append(webdriver.Chrome(options=options, service=service))
        visitor = Visitor(drivers[-1], address)
        visitor.screen(1280, 900)
        return visitor

    yield opened
    for number, driver in enumerate(drivers):
        if SCREENSHOTS:
            name = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split(" ")[0]
            driver.save_screenshot(f"{SCREENSHOTS}/{name}-{number}.png")
        driver.quit()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with four pairs of tones."""
    write_pairs(tmp_path / "pairs.parquet", pair_rows(4))
    return tmp_path


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., Server]]:
    servers = []

    def started(*options: str, port: int = 0) -> Server:
        servers.append(Server(folder, *options, port=port))
        return servers[-1]

    yield started
    for server in servers:
        server.kill()


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(path)


def outside(visitor: Visitor) -> set[str]:
    """Addresses of other hosts that the browser asked for."""
    events = [json.loads(entry["message"])["message"] for entry in visitor.driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return {url for url in asked if url.startswith("http") and not url.startswith(visitor.address.split("?")[0])}


def test_keys_play_and_answer(serve: Any, open_browser: Any) -> None:
    server = serve("--axes", "naturalness,similarity", "--checks", "0")
    visitor = open_browser(server.address)
    visitor.begin("ann")
    assert visitor.asked() == ("1 of 4 · ann", "Which one is better: naturalness?")
    for side in ("left", "right", "reference"):  # loaded: metadata and at least the current frame, no error
        visitor.wait(lambda side=side: visitor.state(side)["ready"] >= 2)
        assert visitor.state(side)["error"] is None and visitor.state(side)["paused"]
    lengths = sorted(visitor.state(side)["duration"] for side in ("left", "right"))
    assert lengths == pytest.approx([0.6, 0.9], abs=1e-3)

    visitor.press("a")  # before a clip was heard
    visitor.wait(lambda: visitor.text("#notice") == "Please play both clips first.")
    visitor.press("1")
    visitor.wait(lambda: visitor.state("left")["time"] > 0.05)
    visitor.press("2")  # one at a time
    visitor.wait(lambda: visitor.state("right")["time"] > 0.05)
    assert visitor.state("left")["paused"]
    visitor.press("3")
    visitor.wait(lambda: visitor.state("reference")["played"] == 1)
    line = visitor.script("return document.querySelector('#pair [data-clip=right] .cursor').style.left")
    assert 0 < float(line.removesuffix("%")) <= 100

    visitor.press("a")
    visitor.wait(lambda: "similarity" in visitor.text("#question"))
    (kept,) = server.answers.all()  # on disk, since the next question is there
    assert kept.answer == kept.left_clip and kept.axis == "naturalness" and min(kept.heard_a_s, kept.heard_b_s) > 0
    assert visitor.state("left")["played"] == 1  # the same sounds are still there
    visitor.press("b")
    visitor.wait(lambda: visitor.asked()[0] == "2 of 4 · ann")
    assert visitor.state("left")["played"] == 0
    for key in "tx":
        visitor.answer(key)
    assert [answer.answer for answer in server.answers.all()][2:] == ["tie", "both_bad"]
    assert server.answers.all()[1].answer == {"a": "b", "b": "a"}[kept.left_clip]
    assert not outside(visitor)
    errors = [entry for entry in visitor.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors


def test_undo_by_key_and_by_button_to_the_first_answer(serve: Any, open_browser: Any) -> None:
    server = serve("--checks", "0")
    visitor = open_browser(server.address)
    visitor.begin("ann")
    for key in "abt":
        visitor.answer(key)
    visitor.press("u")
    visitor.wait(lambda: visitor.text("#progress") == "3 of 4 · ann")
    visitor.find("#undo").click()
    visitor.wait(lambda: visitor.text("#progress") == "2 of 4 · ann")
    visitor.answer("x")
    assert [answer.answer for answer in server.answers.all()][1:] == ["both_bad"] and server.answers.undone() == 2
    for number in (2, 1):
        visitor.press("u")
        visitor.wait(lambda number=number: visitor.text("#progress") == f"{number} of 4 · ann")
    visitor.press("u")
    visitor.wait(lambda: visitor.text("#notice") == "There is no answer to take back.")
    for key in "abtx":
        visitor.answer(key)
    visitor.wait(lambda: "All done" in visitor.text("#pair"))
    assert not visitor.find("#answer-left") and len(server.answers.all()) == 4


def test_a_key_pressed_in_haste_answers_one_question(serve: Any, open_browser: Any) -> None:
    server = serve("--checks", "0")
    visitor = open_browser(server.address)
    visitor.begin("ann")
    visitor.hear()
    visitor.press("abatx")
    visitor.wait(lambda: visitor.text("#progress") == "2 of 4 · ann")
    visitor.wait(lambda: visitor.text("#notice") != "")
    assert len(server.answers.all()) == 1


def test_two_annotators_at_once(serve: Any, open_browser: Any) -> None:
    server = serve("--checks", "0.25")
    visitors = {name: open_browser(server.address) for name in ("ann", "ben")}
    for name, visitor in visitors.items():
        visitor.begin(name)
    for key in "atbxa":
        before = [visitor.text("#progress") for visitor in visitors.values()]
        for visitor in visitors.values():
            visitor.hear()
        for visitor in visitors.values():  # on both pages at once
            visitor.press(key)
        for visitor, number in zip(visitors.values(), before, strict=True):
            visitor.wait(lambda visitor=visitor, number=number: visitor.text("#progress") != number)
    assert all("All done" in visitor.text("#pair") for visitor in visitors.values())
    by_name = {name: server.answers.all(name) for name in visitors}
    assert [len(answers) for answers in by_name.values()] == [5, 5]
    tasks = [[answer.task for answer in answers] for answers in by_name.values()]
    assert sorted(tasks[0]) == sorted(tasks[1]) and tasks[0] != tasks[1]
    command = [sys.executable, "-m", "rlhf_mel.cli", "annotate", str(server.answers.path.parent / "pairs.parquet")]
    command += ["--answers", str(server.answers.path), "--report"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "ann: 4 of 4 answers" in said and "ben: 4 of 4 answers" in said and "4 pairs answered by two" in said


def test_a_killed_server_loses_nothing_and_the_page_goes_on(serve: Any, open_browser: Any) -> None:
    server = serve("--checks", "0")
    visitor = open_browser(server.address)
    visitor.begin("ann")
    for key in "at":
        visitor.answer(key)
    before = server.answers.all()
    visitor.hear()
    server.kill()  # SIGKILL
    visitor.press("b")  # nobody is there to take it
    visitor.wait(lambda: "Connection" in visitor.script("return document.body.innerText"))
    assert visitor.text("#progress") == "3 of 4 · ann"  # not shown as answered
    again = serve("--checks", "0", port=server.port)
    assert again.answers.all() == before and len(before) == 2
    visitor.begin(None)  # the page remembers the name
    assert visitor.text("#progress") == "3 of 4 · ann"
    visitor.answer("b")
    assert len(again.answers.all()) == 3


def test_beyond_localhost_the_printed_token_opens_the_page(serve: Any, open_browser: Any) -> None:
    server = serve("--host", "0.0.0.0")
    token = server.address.split("?")[1]
    stranger = open_browser(f"http://127.0.0.1:{server.port}/")
    stranger.driver.get(stranger.address)
    assert stranger.text("body") == "Open the address with the token that the server printed."
    visitor = open_browser(f"http://127.0.0.1:{server.port}/?{token}")
    visitor.begin("ann")
    assert visitor.driver.current_url == f"http://127.0.0.1:{server.port}/"  # the token is no longer in the address
    visitor.answer("a")
    assert len(server.answers.all()) == 1 and not outside(visitor)


@pytest.mark.parametrize("width", [1280, 400, 320])
def test_nothing_is_cut_or_covered(serve: Any, open_browser: Any, folder: Path, width: int) -> None:
    rows = pair_rows(1)
    rows[0]["prompt"] = (
        "A long sentence with Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamter in it."
    )
    rows[0]["reference_text"] = "x" * 80
    rows[0]["audio_b"] = encoded(tone(300, 2.0))
    (folder / "pairs.parquet").unlink()
    write_pairs(folder / "pairs.parquet", rows)
    server = serve("--axes", "naturalness_of_the_intonation,similarity")
    visitor = open_browser(server.address)
    visitor.screen(width, 800)
    visitor.begin("an annotator with a rather long name")
    visitor.press("a")
    visitor.wait(lambda: visitor.text("#notice"))
    assert visitor.script("return document.documentElement.scrollWidth") <= width
    shown = "#progress p, #pair .said, #pair h3, #pair .view, #pair audio, #question p, #notice, #answers button, #undo"
    boxes = visitor.script(
        f"""return [...document.querySelectorAll('{shown}')].filter(e => e.offsetParent !== null && e.offsetHeight > 0)
            .map(e => [e.getBoundingClientRect(), e.scrollWidth - e.clientWidth])
            .map(([box, hidden]) => [box.left, box.top, box.right, box.bottom, hidden])"""
    )
    # progress, text, two titles, two views, three players, question, notice, four answers, undo
    assert len(boxes) == 16
    for number, (left, top, right, bottom, hidden) in enumerate(boxes):
        assert 0 <= left < right <= width and hidden <= 0
        for other in boxes[:number]:
            apart = right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
            assert apart, (boxes[number], other)
