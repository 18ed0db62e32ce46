"""The page: a singer gives a recording, sees how far the band is, listens, changes chords and plays again,
or has a stretch of a candidate composed anew.

mount_page(app, queue) puts it at the root of the application of api.py; it asks the same queue. It is Gradio
with a player and pictures of ours in it, asks nothing of other machines, and keeps what a visitor has only as
long as the page is open.
"""

import html
import io
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from torch.nn import functional

from duotok.recipes.accompany.arrangement import settle_band
from duotok.recipes.accompany.output import EXPORTED
from duotok.recipes.accompany.request import METER_NAMES, STEMS
from duotok.recipes.accompany.stages import STAGE_NAMES
from duotok.recipes.service.queue import ENDED, ORIGINAL, Song, SongQueue, UnknownSongError
from duotok.recipes.service.settings import (
    check_recording,
    check_settings,
    find_takes,
    make_request,
    read_request,
    submit_stretch,
)
from duotok.recipes.service.song_picture import chart_text, draw_song, file_peaks, wave_peaks
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DuoTokError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from torch import Tensor

    from duotok.lm.sheet.playing import BandConfig
    from duotok.recipes.accompany.pipeline import Accompanist
    from duotok.recipes.service.api import Limits

MOST_CANDIDATES, MOST_SHOWN = 3, 6  # of a song; with stretches made anew
AS_SUNG, DRAWN, OF_STYLE = "as it is sung", "what is usual at the tempo", "that of the style"
_TICK_SECONDS = 1.0
_KEEP_UPLOADS_SECONDS = 3600  # Gradio's own copies; the queue has its own
# A press waits until the recording has come and the field shows it, since only then it holds it (one that was
# refused is never shown). Meanwhile there is no other press: the buttons are off, and a second click that was
# on its way, of a double click, ends here, since Gradio would run it, too, or let it swallow a later one.
# Gradio turns the buttons off itself while a song is made; where none is, they are turned on again.
_ARRIVED_JS = """async () => {
  if (window.isSending) return new Promise(() => {});
  window.isSending = true;
  for (const button of document.querySelectorAll("#start, #again")) button.disabled = true;
  const sees = name => document.querySelector("#given ." + name);
  const wait = () => new Promise(wake => setTimeout(wake, 100));
  if (!sees("uploading")) return;
  while (sees("uploading")) await wait();
  for (let tries = 0; tries < 20 && !sees("file-preview"); tries++) await wait();
  await wait();
}"""
_SENDING = '<p class="told" role="status">Sending the recording</p>'
_SENT_JS = """told => {
  window.isSending = false;
  if (/role="alert"|Sending/.test(told))
    for (const button of document.querySelectorAll("#start, #again")) button.disabled = false;
}"""
Shown = list[tuple[str, int]]  # song and place among its candidates, of each candidate on the page
# Nothing from elsewhere, whatever a library asks for; Gradio makes functions out of text.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' blob: data:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a model can be asked for, as far as the page offers it."""

    styles: Sequence[str]
    meters: Sequence[str]
    exports: Sequence[str]
    level_db: float

    @classmethod
    def of_model(cls, accompanist: "Accompanist") -> "Offer":
        """Read it from a loaded model; all that can be written beside the sound is."""
        bundle = accompanist.bundle
        band = bundle.lm.band
        needs = {"midi": bundle.score_reader is not None}
        has_sheet = getattr(bundle.lm, "sheet", None) is not None
        return cls(
            styles=() if band is None else band.styles,
            meters=() if band is None else [METER_NAMES[beats] for beats in band.meters()],
            exports=[
                kind
                for kind, export in EXPORTED.items()
                if has_sheet and needs.get(kind, True) and all(map(find_spec, export.packages))
            ],
            level_db=accompanist.defaults.accompaniment_db,
        )


def mount_page(app: FastAPI, queue: SongQueue) -> FastAPI:
    """Put the page at the root of an application of create_app, and return it; ConfigError without Gradio."""
    try:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str((queue.folder / "uploads").resolve())  # that nobody else can read
        import gradio
        from gradio.themes import Base
    except ImportError as error:
        raise ConfigError(
            "gradio, which the page is made of, is missing; pip install 'duotok[serve]'"
        ) from error

    @app.get("/page/{song_id}/vocal.wav", include_in_schema=False)
    def get_vocal(song_id: str) -> Response:
        wave, file = read_voice(queue, queue.look(song_id)), io.BytesIO()
        soundfile.write(file, wave.numpy().T, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
        return Response(file.getvalue(), media_type="audio/wav", headers={"Cache-Control": "private"})

    accompanist: Accompanist = app.state.accompanist
    limits: Limits = app.state.limits
    bundle = accompanist.bundle
    desk = Desk(queue, Offer.of_model(accompanist), bundle.lm.band, bundle.fingerprint, limits.seconds)
    gradio.mount_gradio_app(
        app,
        build_page(desk),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size=limits.upload_bytes,
        theme=Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        head=files("duotok.recipes.service").joinpath("song_page.html").read_text(encoding="utf-8"),
        app_kwargs={"middleware": [Middleware(_PolicyMiddleware)]},
    )
    return app


class _PolicyMiddleware:
    """Tells the browser what the page may ask for.

    Bare ASGI: Starlette's BaseHTTPMiddleware would stand between Gradio and the stream of its answers.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def send_with_policy(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self._app(scope, receive, send_with_policy)


def read_voice(queue: SongQueue, song: Song) -> "Tensor":
    """Return the singer [2, samples] of a song that is done, from where the band begins."""
    given = {stored: path for stored, path in queue.given(song).items() if stored in find_takes(song.names)}
    wave = read_request({}, given, {stored: song.names[stored] for stored in given}).song.wave
    report = song.report or {}
    intro = round((report.get("band") or {}).get("intro_seconds", 0.0) * SAMPLE_RATE_HZ)
    return functional.pad(wave, (intro, report.get("samples", wave.shape[-1]) - intro - wave.shape[-1]))


class Desk:
    """What the page asks of the queue, and what it shows of a song."""

    def __init__(
        self,
        queue: SongQueue,
        offer: Offer,
        band: "BandConfig | None",
        fingerprint: str | None,
        most_seconds: float,
    ) -> None:
        self.queue, self.offer, self._band = queue, offer, band
        self._fingerprint, self._most_seconds = fingerprint, most_seconds

    def submit(self, wishes: Mapping[str, Any], path: Path) -> str:
        """Put a recording into the queue with wishes, fields of Request, and return the song's id."""
        settings = self._check(wishes)
        check_recording(path, path.name, self._most_seconds)
        return self.queue.submit(settings, path, names=[path.name])

    def submit_alike(self, song_id: str, rank: int) -> tuple[str, dict[str, Any]]:
        """Ask for more like one candidate of a song: its style and meter, the same wishes, new seeds.

        Of one whose stretch was made anew: that stretch again. Returns the id and the wishes.
        """
        song = self.queue.look(song_id)
        given, stored = self.queue.given(song), find_takes(song.names)
        takes, names = [given[name] for name in stored], [song.names[name] for name in stored]
        if ORIGINAL in given:
            wishes = {name: value for name, value in song.settings.items() if name != "seed"}
            return self.queue.submit(
                wishes, takes, names=names, original=sorted(given[ORIGINAL].iterdir())
            ), {}
        candidates = find_candidates(song.report or {})
        seeds = [each["seed"] for each in (*candidates, *(song.report or {}).get("not_rendered", ()))]
        wishes = {name: value for name, value in song.settings.items() if name != "export"}
        wishes["seed"] = max(seeds) + 1
        band = candidates[rank]["band"]
        if band["style"] is not None:
            wishes |= {"style": band["style"], "meter": band["meter"]}
        return self.queue.submit(self._check(wishes), takes, names=names), wishes

    def submit_stretch(
        self, song_id: str, rank: int, stretch: tuple[float | None, float | None], wishes: Mapping[str, Any]
    ) -> str:
        """Ask for a stretch of a candidate of a song anew, in seconds, with wishes; return the id."""
        start, end = (at or 0.0 for at in stretch)
        if not end:
            raise ConfigError("mark a stretch first: drag over a picture, or say from where to where")
        name = find_candidates(self.queue.look(song_id).report or {})[rank]["accompaniment"]
        asked = {"repaint": f"{start:g}-{end:g}", "original": f"{song_id}/{name}"}
        return submit_stretch(self.queue, self._check({**asked, **wishes}), self._fingerprint)

    def _check(self, wishes: Mapping[str, Any]) -> dict[str, Any]:
        settings = check_settings({**wishes, "export": tuple(self.offer.exports)})
        settle_band(make_request(settings), self._band)
        return settings

    def read_chart(self, song: Song) -> str:
        """Return the chords that a song was played from, as the lines of a chart."""
        report = song.report or {}
        chords = (report.get("lead_sheet") or {}).get("chords") or ()
        return chart_text(chords, (report.get("band") or {}).get("intro_seconds", 0.0))

    def show_progress(self, song: Song) -> tuple[str, str]:
        """Return what a song waits for or is at, in a line, and a bar with a clock."""
        seconds = max(0, round(time.time() - song.created))
        if song.state == "queued":
            told = "Next in the queue" if not song.ahead else f"In the queue: {song.ahead} before yours"
        else:
            told = STAGE_NAMES[song.stage].capitalize() if song.stage else "Beginning"
            told = "Writing" if song.fraction >= 1 else told
            styles = [each["style"] for each in song.ranking[: song.settings.get("variations", 1)]]
            told += f" (composed: {', '.join(styles)})" if styles and all(styles) else ""
        percent, clock = (
            round(100 * song.fraction),
            f'<song-clock data-seconds="{seconds}">{seconds} s</song-clock>',
        )
        return f'<p class="told" role="status">{html.escape(told)}</p>', (
            f'<div class="bar-of-progress"><progress max="100" value="{percent}" aria-label="Progress">'
            f"</progress><span>{percent} %, {clock}</span></div>"
        )

    def show_facts(self, song: Song, shown: Shown) -> str:
        """Return what is said of the candidates of a song that is done, and links to all files shown."""
        report = song.report or {}
        first = find_candidates(report)[0]
        facts = [f"{report['seconds']:.1f} s"]
        facts.append(f"{report['tempo_bpm']:.0f} beats per minute" if report["tempo_bpm"] else "free tempo")
        facts += [name_of_key(key)] if (key := first["accompaniment_key"]) else []
        facts += [meter] if (meter := first["band"]["meter"]) else []
        told = "".join(f"<li>{html.escape(warning)}</li>" for warning in report["warnings"])
        return (
            f'<p class="facts" role="status"><b>{html.escape(report["vocal"])}</b>: {", ".join(facts)}</p>'
            f'<ul class="notes">{told}</ul>{self._link_files(shown)}'
        )

    def _link_files(self, shown: Shown) -> str:
        numbers: dict[str, list[str]] = {}
        for number, (song_id, _) in enumerate(shown, start=1):
            numbers.setdefault(song_id, []).append(str(number))
        links = []
        for song_id, its in numbers.items():
            what = "all" if len(numbers) == 1 else ", ".join(its)
            told = f"Download {what} (zip, {len(self.queue.look(song_id).files)} files)"
            address = f"songs/{song_id}/all.zip"
            links.append(f'<a class="zip" href="{address}" download>{told}</a>')
        return f"<p>{' '.join(links)}</p>"

    def show_candidates(self, song: Song, first: int = 1) -> list[str]:
        """Return a player with its picture for each candidate of a song that is done, numbered from first."""
        voice = wave_peaks(read_voice(self.queue, song))
        candidates = find_candidates(song.report or {})
        return [
            self._show_candidate(song, number, report, voice)
            for number, report in enumerate(candidates, start=first)
        ]

    def _show_candidate(self, song: Song, rank: int, report: Mapping[str, Any], voice: np.ndarray) -> str:
        name = report["accompaniment"]
        band, style = file_peaks(self.queue.open_file(song.id, name)), report["band"]["style"]
        label = f"candidate {rank}" + (f", {style}" if style else "")
        facts = ["style drawn" if report["band"]["drawn"] else "", f"seed {report['seed']}"]
        for repainted in report.get("repaints", ())[-1:]:
            facts[0] = "{:.1f}–{:.1f} s anew".format(*repainted["seconds"])
        in_key = report["coherence"]["in_key"]
        facts.append(f"{in_key:.0%} of the voice in its key" if in_key is not None else "")
        title = html.escape(f"{rank}. {style.capitalize()}" if style else f"Candidate {rank}")
        gain = 10 ** ((report["levels"]["mix_gain_db"] or 0.0) / 20)
        label = html.escape(label)
        return (
            f'<song-player data-voice="page/{song.id}/vocal.wav" data-band="songs/{song.id}/{name}" '
            f'data-gain="{gain:.4f}" data-seconds="{report["seconds"]:.3f}" data-label="{label}">'
            f"<h3>{title} <small>{html.escape(', '.join(filter(None, facts)))}</small></h3>"
            f'<div class="picture" tabindex="0" role="region" aria-label="Picture of {label}">'
            f'<div class="inside">{draw_song(report, voice, band)}</div></div></song-player>'
        )


def find_candidates(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what a report says of each accompaniment that was rendered, best first."""
    return list(report.get("variations") or [{"accompaniment": "accompaniment.wav", **report}])


def name_of_key(label: str) -> str:
    """Return a key in words: "Eb:min" is Eb minor."""
    root, _, mode = label.partition(":")
    return f"{root} {'minor' if mode == 'min' else 'major'}"


def build_page(desk: Desk) -> Any:
    """Return the page as Gradio's Blocks."""
    import gradio as gr

    offer = desk.offer
    with gr.Blocks(
        title="DuoTok", analytics_enabled=False, delete_cache=(600, _KEEP_UPLOADS_SECONDS)
    ) as page:
        song_id = gr.State(None)  # that is made, or was made last
        shown = gr.State([])  # Shown
        stage = gr.State("")  # that is shown, so that a screen reader hears each once
        gr.HTML("<h1>DuoTok</h1><p>Give it a sung vocal; it plays the band.</p>")
        fields: dict[str, Any] = {}  # of Request
        with gr.Row():
            with gr.Column(min_width=300):
                given = gr.File(label="A recording of the singer alone", height=150, elem_id="given")
                recorded = gr.Audio(
                    sources=["microphone"], type="filepath", label="or sing here", elem_id="recorded",
                    editable=False, buttons=[],
                )  # fmt: skip
            with gr.Column(min_width=300):
                if offer.styles:
                    fields["style"] = gr.Dropdown([(DRAWN, ""), *offer.styles], value="", label="Style")
                    fields["meter"] = gr.Dropdown([(OF_STYLE, ""), *offer.meters], value="", label="Meter")
                fields["variations"] = gr.Radio(
                    list(range(1, MOST_CANDIDATES + 1)), value=MOST_CANDIDATES, label="Candidates",
                    info="side by side" + (", in different styles" if offer.styles else ""),
                )  # fmt: skip
                start = gr.Button("Play the band", variant="primary", elem_id="start")
                stop = gr.Button("Stop", visible=False, elem_id="stop")
        told, bar = gr.HTML(elem_id="told"), gr.HTML(elem_id="progress")
        facts = gr.HTML(elem_id="facts")
        with gr.Row(visible=False) as marking:
            infos = {
                "from": "drag over a picture to mark one, or say it",
                "to": "then have it composed anew below",
            }
            stretch = [
                gr.Number(
                    label=f"Stretch {end}, in seconds", info=info, elem_id=f"stretch-{end}", value=None,
                    minimum=0, min_width=140,
                )
                for end, info in infos.items()
            ]  # fmt: skip
        cards, mores, anews, columns = [], [], [], []
        with gr.Row():
            for number in range(1, MOST_SHOWN + 1):
                with gr.Column(min_width=300, visible=False) as column:
                    cards.append(gr.HTML(elem_id=f"candidate-{number}"))
                    with gr.Row():
                        mores.append(
                            gr.Button(f"More like {number}", elem_id=f"more-{number}", min_width=120)
                        )
                        text = f"Stretch anew in {number}"
                        anews.append(gr.Button(text, elem_id=f"anew-{number}", min_width=120))
                columns.append(column)
        with gr.Accordion("Chords, tempo, key and more", open=False, elem_id="more") as known:
            fields["chords"] = gr.Textbox(
                label="Chords, a line for each", lines=6, max_lines=12, elem_id="chords",
                placeholder="0.0 2.5 C:min7\n2.5 5.0 F\n(empty: what fits)",
                info="from and to in seconds; what was played comes here, to be changed and played again",
            )  # fmt: skip
            with gr.Row():
                fields["tempo_bpm"] = gr.Textbox(
                    label="Tempo in beats per minute", placeholder=AS_SUNG, min_width=220, max_lines=1
                )
                fields["key"] = gr.Textbox(
                    label="Key, such as Am or Eb", placeholder=AS_SUNG, min_width=220, max_lines=1
                )
                fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=220)
            with gr.Row():
                fields["accompaniment_db"] = gr.Slider(
                    -12, 12, offer.level_db, step=0.5, label="Band over voice, dB", min_width=260
                )
                if offer.styles:
                    fields["without"] = gr.CheckboxGroup(list(STEMS), label="Without", min_width=260)
            again = gr.Button("Play with these", elem_id="again")
        timer = gr.Timer(_TICK_SECONDS, active=False)

        buttons = (start, again, *mores, *anews)

        def show_busy(new_id: str, now: Shown) -> dict[Any, Any]:
            """now: candidates that stay."""
            line, progress = desk.show_progress(desk.queue.look(new_id))
            cleared = {} if now else {facts: "", marking: gr.Row(visible=False)} | dict.fromkeys(stretch)
            return cleared | {
                song_id: new_id,
                shown: now,
                stage: line,
                told: line,
                bar: progress,
                **{button: gr.Button(interactive=False) for button in buttons},
                stop: gr.Button("Stop", visible=True),
                timer: gr.Timer(active=True),
                **{column: gr.Column(visible=False) for column in columns[len(now) :]},
                **dict.fromkeys(cards[len(now) :], ""),
            }

        def show_rest(now: Shown) -> dict[Any, Any]:
            """The page while nothing is made; now: its candidates."""
            return {
                song_id: now[-1][0] if now else None,
                shown: now,
                told: "",
                bar: "",
                **{button: gr.Button(interactive=True) for button in buttons},
                stop: gr.Button("Delete this song", visible=bool(now)),
                timer: gr.Timer(active=False),
            }

        def show_error(error: str) -> dict[Any, Any]:
            return {told: f'<p class="told" role="alert">{html.escape(error)}</p>'}

        def begin(file: str | None, sung: str | None, *values: Any) -> dict[Any, Any]:
            wishes = {n: v for n, v in zip(fields, values, strict=True) if v not in (None, "", [])}
            path = sung or file
            if path is None:
                return show_error("give a recording first: drop a file, or sing")
            try:
                return show_busy(desk.submit(wishes, Path(path)), [])
            except DuoTokError as error:
                return show_error(str(error))

        def begin_alike(place: int, now: Shown) -> dict[Any, Any]:
            try:
                new_id, wishes = desk.submit_alike(*now[place])
                kept = [] if wishes else now
                return show_busy(new_id, kept) | {fields[n]: v for n, v in wishes.items() if n in fields}
            except DuoTokError as error:
                return show_error(str(error))

        def begin_stretch(
            place: int, now: Shown, known_id: str, start: float | None, end: float | None, *values: Any
        ) -> dict[Any, Any]:
            given = dict(zip(fields, values, strict=True))
            wishes = {n: given[n] for n in ("style", "without", "chords") if given.get(n)}
            try:
                if wishes.get("chords") == desk.read_chart(desk.queue.look(known_id)):
                    del wishes["chords"]  # are still those that were played, or of another candidate
                return show_busy(desk.submit_stretch(*now[place], (start, end), wishes), now)
            except DuoTokError as error:
                return show_error(str(error))

        def look(known_id: str | None, line_shown: str, now: Shown) -> dict[Any, Any]:
            try:
                song = desk.queue.look(known_id or "")
                if song.state not in ENDED:
                    line, progress = desk.show_progress(song)
                    return {bar: progress} | ({} if line == line_shown else {told: line, stage: line})
                if song.state != "done":
                    return show_rest(now) | show_error(song.error or "the song was stopped")
                count = len(find_candidates(song.report or {}))
                first = min(len(now), MOST_SHOWN - count)  # where there is no room left, the last gives way
                now = now[:first] + [(song.id, rank) for rank in range(count)]
                return show_rest(now) | {
                    facts: desk.show_facts(song, now),
                    fields["chords"]: desk.read_chart(song),
                    known: gr.Accordion(open=True),
                    marking: gr.Row(visible=True),
                    **{column: gr.Column(visible=True) for column in columns[first : len(now)]},
                    **dict(zip(cards[first:], desk.show_candidates(song, first + 1), strict=False)),
                }
            except DuoTokError as error:
                return show_rest(now) | show_error(str(error))

        def remove(known_id: str | None, now: Shown) -> dict[Any, Any]:
            is_made = known_id in {each for each, _ in now}  # else only what is being made is stopped
            for each in {each for each, _ in now} if is_made else {known_id or ""}:
                with suppress(UnknownSongError):
                    desk.queue.delete(each)
            if now and not is_made:
                return show_rest(now)
            return show_rest([]) | {
                facts: "",
                marking: gr.Row(visible=False),
                **{column: gr.Column(visible=False) for column in columns},
                **dict.fromkeys(cards, ""),
            }

        outputs = [
            *(song_id, shown, stage, told, bar, facts, *buttons, stop, known, timer, marking),
            *(*stretch, *columns, *cards, *fields.values()),
        ]
        options: dict[str, Any] = {"outputs": outputs, "show_progress": "hidden", "api_visibility": "private"}
        for button in (start, again):
            button.click(None, None, [told], js=f"() => '{_SENDING}'", api_visibility="private")
            arrived = button.click(None, js=_ARRIVED_JS, api_visibility="private")
            sent = arrived.then(begin, [given, recorded, *fields.values()], **options)
            sent.then(None, [told], js=_SENT_JS, api_visibility="private")
        for place, (more, anew) in enumerate(zip(mores, anews, strict=True)):
            more.click(partial(begin_alike, place), [shown], **options)
            anew.click(partial(begin_stretch, place), [shown, song_id, *stretch, *fields.values()], **options)
        timer.tick(look, [song_id, stage, shown], **options)
        stop.click(remove, [song_id, shown], **options)
        # One recording at a time, and chords belong to it. In the browser alone: where one of Gradio's events
        # ends in the moment in which a press begins the next, it may close the stream that brings the answer.
        quiet: dict[str, Any] = {"js": "() => [null, '']", "api_visibility": "private"}
        given.upload(None, None, [recorded, fields["chords"]], **quiet)
        recorded.stop_recording(None, None, [given, fields["chords"]], **quiet)
    page.queue(default_concurrency_limit=None)
    return page
