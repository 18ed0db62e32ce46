"""The page of the service in a real browser that reaches nothing else, with a real service behind it.

Skipped where there is no Playwright (`pip install playwright`) or no Chromium (Debian's chromium, or Chrome).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import soundfile

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio", reason="the page is made of gradio: pip install '.[serve]'")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]
# A microphone that beeps, and a player that needs no loudspeaker.
OPTIONS += ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
WAIT_MS = 180_000
CHART = "0.00 1.20 F:maj\n1.20 9.00 A:min"
# Roles of what people operate: each must have a name for those who do not see it.
OPERATED = {"button", "textbox", "slider", "combobox", "radio", "checkbox", "spinbutton", "link", "listbox"}


@pytest.fixture(scope="module")
def address(tiny_bundle, tmp_path_factory):
    """Where a service with a tiny model answers."""
    if BROWSER is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("service")
    command = [sys.executable, "-m", "duotok.recipes.service.serve", "--port", "0"]
    command += ["--data", str(folder / "data"), "--model", str(tiny_bundle), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://"), (folder / "log").read_text()
        yield line.partition(": ")[0]
    finally:
        process.terminate()
        process.wait(60)
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="module")
def browser(address):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """visit(width) -> the page of a new visitor; whatever goes wrong or elsewhere in it fails the test."""
    wrong: list[str] = []
    contexts = []

    def visit(width: int = 1280):
        context = browser.new_context(viewport={"width": width, "height": 844}, permissions=["microphone"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("request", lambda asked: wrong.append(asked.url) if is_elsewhere(asked.url) else None)
        page.goto(f"{address}/")
        page.locator("#start").wait_for()
        return page

    def is_elsewhere(url: str) -> bool:
        return not url.startswith((f"{address}/", "blob:", "data:"))

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def play(page, button: str = "#start", *, count: int, kept: bool = False) -> list[str]:
    """Press a button and wait for the candidates; return what was shown of the progress meanwhile.

    kept: whether those that are there stay.
    """
    before = page.locator("song-player").element_handles()
    page.click(button)
    shown: list[str] = []
    ends = time.monotonic() + WAIT_MS / 1000
    while time.monotonic() < ends:
        assert not page.locator("[role=alert]:visible").count(), page.inner_text("[role=alert]:visible")
        text = page.evaluate(
            "document.querySelector('#told').innerText + document.querySelector('#progress').innerText"
        )
        shown += [text] if text.strip() and text not in shown[-1:] else []
        players = page.locator("song-player").element_handles()
        stayed = bool(before) and before[0].evaluate("e => e.isConnected")
        if shown and len(players) == count and stayed == kept:
            return shown
        page.wait_for_timeout(200)
    raise AssertionError(f"no candidates after {WAIT_MS / 1000:g} s: {shown[-1:]}")


def await_alert(page, text: str) -> str:
    """Wait for a line that says what is wrong, with a text in it; return the line."""
    try:
        page.get_by_role("alert").filter(has_text=text).wait_for()
    except playwright.TimeoutError as error:
        shown = {name: page.inner_text(name) for name in ("#told", "#given")}
        raise AssertionError(f"no alert of {text!r}: {shown}, start {page.is_enabled('#start')}") from error
    return page.inner_text("[role=alert]")


def read_report(page) -> dict:
    """The report of the song that is shown."""
    link = page.get_attribute("a.zip", "href").replace("all.zip", "report.json")
    return page.request.get(f"{page.url}{link}").json()


def unnamed(page) -> list[str]:
    """What can be operated on a page and has no name."""
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    seen = [node for node in nodes if not node["ignored"] and node["role"]["value"] in OPERATED]
    assert len(seen) > 10
    return [
        f"{node['role']['value']} {node}"
        for node in seen
        if not node.get("name", {}).get("value", "").strip()
    ]


def test_a_singer_listens_changes_the_chords_and_takes_all_home(visit, vocal_file, tmp_path):
    page = visit()
    page.set_input_files("#given input[type=file]", vocal_file)
    page.get_by_text("song.wav").wait_for()
    page.get_by_role("radio", name="2").check()
    shown = play(page, count=2)
    assert any("%" in text for text in shown), shown
    report = read_report(page)
    styles = [each["band"]["style"] for each in report["variations"]]
    assert len(set(styles)) == 2
    for number, style in enumerate(styles, start=1):
        assert style in page.inner_text(f"#candidate-{number} h3").lower()
        assert page.locator(f"#candidate-{number} svg .bar").count() == len(
            report["lead_sheet"]["bar_lines_seconds"]
        )

    # One fader from the voice to the band, which are heard from the same sample on.
    player = page.locator("song-player").first
    player.get_by_role("button", name="Play candidate 1").press("Enter")
    page.wait_for_function("document.querySelector('song-player').loudness > 0.001")
    lengths = player.evaluate("e => e.sources.map(each => each.buffer.duration)")
    assert lengths == [pytest.approx(report["seconds"], abs=0.001)] * 2
    levels = "e => e.gains.map(each => each.gain.value > 0)"
    for key, expected in (("Home", [True, False]), ("End", [False, True])):
        player.get_by_role("slider", name="Fader from voice to band").press(key)
        assert player.evaluate(levels) == expected

    # What was played can be changed, and is then played as it was written.
    chords = page.locator("#chords textarea")
    written = [line.split() for line in chords.input_value().splitlines()]
    told = report["lead_sheet"]["chords"]
    assert [[float(a), float(b), name] for a, b, name in written] == [
        [*(pytest.approx(at, abs=0.01) for at in t[:2]), t[2]] for t in told
    ]
    chords.fill(CHART)
    page.get_by_role("radio", name="1").check()
    play(page, "#again", count=1)
    told = read_report(page)["lead_sheet"]["chords"]
    assert [name for *_, name in told] == ["F:maj", "A:min"] and told[0][1] == pytest.approx(1.2, abs=0.04)
    assert page.locator("#candidate-1 .chord-name").all_text_contents() == ["F", "Am"]
    with page.expect_download() as download:
        page.click("a.zip")
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as file:
        names = set(file.namelist())
        assert json.loads(file.read("report.json"))["lead_sheet"]["chords"] == told
    assert {"accompaniment.wav", "mix.wav", "song.mid", "chords.lab", "click.wav"} <= names

    # More like it: the same style and chords, other notes.
    seed, style = (read_report(page)[name] for name in ("seed", "band"))
    play(page, "#more-1", count=1)
    report = read_report(page)
    assert (report["seed"], report["band"]["style"]) == (seed + 1, style["style"])
    assert report["lead_sheet"]["chords"] == told

    # A stretch of it anew, marked in its picture: one more candidate, which sounds as before elsewhere.
    box = page.locator("#candidate-1 .inside").bounding_box()
    start, end = (box["x"] + share * box["width"] for share in (0.4, 0.8))
    page.mouse.move(start, box["y"] + 80)
    page.mouse.down()
    page.mouse.move(end, box["y"] + 80, steps=3)
    page.mouse.up()
    fields = [float(page.input_value(f"#stretch-{name} input")) for name in ("from", "to")]
    assert fields == [pytest.approx(share * report["seconds"], abs=0.03) for share in (0.4, 0.8)]
    assert page.locator("#candidate-1 .mark").bounding_box()["width"] == pytest.approx(end - start, abs=4)
    page.get_by_label("Stretch to").fill("2")
    song = page.get_attribute("a.zip", "href")
    play(page, "#anew-1", count=2, kept=True)
    links = [link.get_attribute("href") for link in page.locator("a.zip").all()]
    assert links[0] == song and len(links) == 2 and "anew" in page.inner_text("#candidate-2 h3")
    told = page.request.get(f"{page.url}{links[1].replace('all.zip', 'report.json')}").json()
    assert told["repaints"][0]["seconds"] == [pytest.approx(at, abs=0.05) for at in (fields[0], 2)]
    assert told["repaints"][0]["chords_given"] is False

    # Nobody else sees any of it, and what is deleted is gone.
    assert visit().locator("song-player").count() == 0
    page.get_by_role("button", name="Delete this song").click()
    page.locator("song-player").first.wait_for(state="detached")
    assert [page.request.get(f"{page.url}{link}").status for link in links] == [404, 404]
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_a_singer_sings_into_a_phone(visit):
    page = visit(390)
    page.get_by_role("button", name="Record").click()
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Stop").click()
    page.locator("#recorded").get_by_role("button", name="Play", exact=True).wait_for()
    page.get_by_role("radio", name="1").check()
    play(page, count=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert unnamed(page) == []
    page.click("#anew-1")
    page.get_by_role("alert").filter(has_text="mark a stretch first").wait_for()


def test_what_is_no_recording_is_told_in_one_line(visit, tiny_bundle, tmp_path):
    page = visit()
    for path in (tiny_bundle / "bundle.json", "/etc/hosts"):  # no path that is asked for is ever read
        assert page.request.get(f"{page.url}gradio_api/file={path}").status in (403, 404)
    headers = page.request.get(page.url).headers
    assert "frame-ancestors 'self'" in headers["content-security-policy"]
    page.click("#start")
    assert page.inner_text("[role=alert]") == "give a recording first: drop a file, or sing"
    (tmp_path / "words.txt").write_text("la la la\n" * 100)
    held, upload = [], re.compile(r"/upload\?")  # not what asks how far it has come
    page.route(upload, lambda route: held.append(route))
    joined: list[str] = []
    page.on("request", lambda asked: joined.append(asked.post_data or "") if "/join" in asked.url else None)
    page.set_input_files("#given input[type=file]", tmp_path / "words.txt")
    page.get_by_text("words.txt").wait_for()
    page.dblclick("#start")  # before the file has come
    page.get_by_text("Sending the recording").wait_for()
    page.wait_for_timeout(500)
    assert not page.locator("[role=alert]").count()
    for route in held:
        route.continue_()
    page.unroute(upload)
    told = await_alert(page, "words.txt")
    assert "\n" not in told and "/" not in told and re.match(r"words\.txt", told)
    assert sum("words.txt" in sent for sent in joined) == 1
    assert page.is_enabled("#start")
    soundfile.write(tmp_path / "silence.wav", np.zeros(96_000), 48_000)
    page.get_by_role("button", name="Clear").first.click()
    page.set_input_files("#given input[type=file]", tmp_path / "silence.wav")
    page.get_by_text("silence.wav").wait_for()
    page.click("#start")
    await_alert(page, "silence.wav is silent")
