"""The listening page in a real browser, offline: rated by the keyboard, saved, scored.

Skipped where there is no Playwright (`pip install playwright`) or no Chromium (Debian's chromium, or Chrome).
"""

import shutil

import pytest

from duotok.recipes.listening import listen
from duotok.recipes.listening.page import PageSettings, key_path, read_key, write_page

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
OPTIONS += ["--disable-background-networking", "--disable-component-update"]
TITLE = "Bands & <b>voices</b> </script>"
GRADES = {"original": 5, "tokens": 3}
WAIT_MS = 120_000


@pytest.fixture
def browser_page():
    """A page of a browser without network; what it reports and asks for is in its lists."""
    if BROWSER is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        page = browser.new_context(offline=True, viewport={"width": 800, "height": 900}).new_page()
        page.set_default_timeout(WAIT_MS)
        yield page
        browser.close()


def test_a_listener_rates_all_clips_by_the_keyboard(listening_sounds, tmp_path, browser_page, capsys):
    out = tmp_path / "listen.html"
    key = write_page(listening_sounds, out, PageSettings(title=TITLE, seed=3))
    assert read_key(key_path(out)) == key
    problems: list[str] = []
    requests: list[str] = []
    browser_page.on("console", lambda message: problems.append(message.text))
    browser_page.on("pageerror", lambda error: problems.append(str(error)))
    browser_page.on("request", lambda request: requests.append(request.url))
    browser_page.goto(out.resolve().as_uri())
    assert browser_page.title() == browser_page.inner_text("#title") == TITLE

    browser_page.fill("#rater", "Ann, B.")
    browser_page.click("#begin")
    assert "letters, digits" in browser_page.inner_text("#start-told")
    browser_page.fill("#rater", "ann")
    browser_page.press("#rater", "Enter")
    heard = []
    for number in range(1, 5):
        assert browser_page.inner_text("#where") == f"Clip {number} of 4"
        browser_page.keyboard.press("4")
        assert browser_page.inner_text("#told") == "Play the clip first."
        assert browser_page.is_disabled("#next")
        browser_page.keyboard.press(" ")
        browser_page.locator("#grades:not([disabled])").wait_for()
        name = browser_page.evaluate("current()")
        heard.append(name)
        browser_page.keyboard.press("1")
        browser_page.keyboard.press(str(GRADES[key.stimuli[name][0]]))
        assert browser_page.is_checked(f"#grades input[value='{GRADES[key.stimuli[name][0]]}']")
        if number == 2:  # what was rated survives going back and a reload
            browser_page.keyboard.press("b")
            assert browser_page.inner_text("#told").startswith("Rated")
            browser_page.reload()
            browser_page.fill("#rater", "ann")
            browser_page.press("#rater", "Enter")
            assert browser_page.inner_text("#where") == "Clip 1 of 4"
            browser_page.keyboard.press("Enter")
        browser_page.keyboard.press("Enter")
    assert browser_page.is_visible("#done") and sorted(heard) == sorted(key.stimuli)
    with browser_page.expect_download() as download:
        browser_page.click("#save")
    ratings = tmp_path / download.value.suggested_filename
    download.value.save_as(ratings)
    assert ratings.name == f"ratings-{key.page}-ann.csv"
    assert problems == []
    assert all(url.startswith(("file:", "blob:", "data:")) for url in requests)

    # Another listener hears another order; the same one hears the same.
    orders = {
        rater: browser_page.evaluate(f"shuffled(page.stimuli, randomFrom(`${{page.seed}}:{rater}`))")
        for rater in ("ann", *(f"listener-{number}" for number in range(8)))
    }
    assert orders["ann"] == heard
    assert len({tuple(order) for order in orders.values()}) > 4

    options = ["--key", str(key_path(out)), "--out", str(tmp_path / "mos")]
    assert listen.main(["score", str(ratings), *options]) == 0
    told = capsys.readouterr().out
    assert "| original | 5.00 |" in told and "| tokens | 3.00 |" in told
