"""The page: a singer gives a recording, sees how far the band is, listens, changes chords and plays again.

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
from torch.nn import functional

from duotok.recipes.accompany.arrangement import settle_band
from duotok.recipes.accompany.output import EXPORTED
from duotok.recipes.accompany.request import METER_NAMES, STEMS
from duotok.recipes.accompany.stages import STAGE_NAMES
from duotok.recipes.service.queue import ENDED, Song, SongQueue, UnknownSongError
from duotok.recipes.service.settings import check_recording, check_settings, make_request, read_request
from duotok.recipes.service.song_picture import chart_text, draw_song, file_peaks, wave_peaks
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DuoTokError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.lm.sheet.playing import BandConfig
    from duotok.recipes.accompany.pipeline import Accompanist
    from duotok.recipes.service.api import Limits

MOST_CANDIDATES = 3
AS_SUNG, DRAWN, OF_STYLE = "as it is sung", "what is usual at the tempo", "that of the style"
_TICK_SECONDS = 1.0
_KEEP_UPLOADS_SECONDS = 3600  # Gradio's own copies; the queue has its own
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
    desk = Desk(queue, Offer.of_model(accompanist), accompanist.bundle.lm.band, limits.seconds)
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
        app_kwargs={"middleware": [_policy()]},
    )
    return app


def _policy() -> Any:
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware

    async def add(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return Middleware(BaseHTTPMiddleware, dispatch=add)


def read_voice(queue: SongQueue, song: Song) -> "Tensor":
    """Return the singer [2, samples] of a song that is done, from where the band begins."""
    wave = read_request(song.settings, queue.given(song), song.names).song.wave
    report = song.report or {}
    intro = round((report.get("band") or {}).get("intro_seconds", 0.0) * SAMPLE_RATE_HZ)
    return functional.pad(wave, (intro, report.get("samples", wave.shape[-1]) - intro - wave.shape[-1]))


class Desk:
    """What the page asks of the queue, and what it shows of a song."""

    def __init__(
        self, queue: SongQueue, offer: Offer, band: "BandConfig | None", most_seconds: float
    ) -> None:
        self.queue, self.offer, self._band, self._most_seconds = queue, offer, band, most_seconds

    def submit(self, wishes: Mapping[str, Any], path: Path) -> str:
        """Put a recording into the queue with wishes, fields of Request, and return the song's id."""
        settings = check_settings({**wishes, "export": tuple(self.offer.exports)})
        settle_band(make_request(settings), self._band)
        check_recording(path, path.name, self._most_seconds)
        return self.queue.submit(settings, path, names=[path.name])

    def submit_alike(self, song_id: str, rank: int) -> tuple[str, dict[str, Any]]:
        """Ask for more like one candidate of a song: its style and meter, the same wishes, new seeds.

        Returns the id and the wishes.
        """
        song = self.queue.look(song_id)
        candidates = find_candidates(song.report or {})
        seeds = [each["seed"] for each in (*candidates, *(song.report or {}).get("not_rendered", ()))]
        wishes = {name: value for name, value in song.settings.items() if name != "export"}
        wishes["seed"] = max(seeds) + 1
        band = candidates[rank]["band"]
        if band["style"] is not None:
            wishes |= {"style": band["style"], "meter": band["meter"]}
        settings = check_settings({**wishes, "export": tuple(self.offer.exports)})
        takes, names = list(self.queue.given(song).values()), list(song.names.values())
        return self.queue.submit(settings, takes, names=names), wishes

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

    def show_facts(self, song: Song) -> str:
        """Return what is said of all candidates of a song that is done, and the link to all of its files."""
        report = song.report or {}
        first = find_candidates(report)[0]
        facts = [f"{report['seconds']:.1f} s"]
        facts.append(f"{report['tempo_bpm']:.0f} beats per minute" if report["tempo_bpm"] else "free tempo")
        facts += [name_of_key(key)] if (key := first["accompaniment_key"]) else []
        facts += [meter] if (meter := first["band"]["meter"]) else []
        told = "".join(f"<li>{html.escape(warning)}</li>" for warning in report["warnings"])
        return (
            f'<p class="facts" role="status"><b>{html.escape(report["vocal"])}</b>: {", ".join(facts)}</p>'
            f'<ul class="notes">{told}</ul>'
            f'<p><a class="zip" href="songs/{song.id}/all.zip" download>Download all (zip, '
            f"{len(song.files)} files)</a></p>"
        )

    def show_candidates(self, song: Song) -> list[str]:
        """Return a player with its picture for each candidate of a song that is done."""
        voice = wave_peaks(read_voice(self.queue, song))
        candidates = find_candidates(song.report or {})
        return [
            self._show_candidate(song, rank, report, voice) for rank, report in enumerate(candidates, start=1)
        ]

    def _show_candidate(self, song: Song, rank: int, report: Mapping[str, Any], voice: np.ndarray) -> str:
        name = report["accompaniment"]
        band, style = file_peaks(self.queue.open_file(song.id, name)), report["band"]["style"]
        label = f"candidate {rank}" + (f", {style}" if style else "")
        facts = ["style drawn" if report["band"]["drawn"] else "", f"seed {report['seed']}"]
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
        song_id = gr.State(None)
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
        cards, mores, columns = [], [], []
        with gr.Row():
            for number in range(1, MOST_CANDIDATES + 1):
                with gr.Column(min_width=300, visible=False) as column:
                    cards.append(gr.HTML(elem_id=f"candidate-{number}"))
                    mores.append(gr.Button(f"More like {number}", elem_id=f"more-{number}"))
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

        def show_busy(new_id: str) -> dict[Any, Any]:
            line, progress = desk.show_progress(desk.queue.look(new_id))
            return {
                song_id: new_id,
                stage: line,
                told: line,
                bar: progress,
                facts: "",
                **{button: gr.Button(interactive=False) for button in (start, again)},
                stop: gr.Button("Stop", visible=True),
                timer: gr.Timer(active=True),
                **{column: gr.Column(visible=False) for column in columns},
                **dict.fromkeys(cards, ""),
            }

        def show_error(error: str) -> dict[Any, Any]:
            return {
                told: f'<p class="told" role="alert">{html.escape(error)}</p>',
                bar: "",
                **{button: gr.Button(interactive=True) for button in (start, again)},
                timer: gr.Timer(active=False),
            }

        def begin(file: str | None, sung: str | None, *values: Any) -> dict[Any, Any]:
            wishes = {n: v for n, v in zip(fields, values, strict=True) if v not in (None, "", [])}
            path = sung or file
            if path is None:
                return show_error("give a recording first: drop a file, or sing")
            try:
                return show_busy(desk.submit(wishes, Path(path)))
            except DuoTokError as error:
                return show_error(str(error))

        def begin_alike(rank: int, old_id: str) -> dict[Any, Any]:
            try:
                new_id, wishes = desk.submit_alike(old_id, rank)
                return show_busy(new_id) | {fields[n]: v for n, v in wishes.items() if n in fields}
            except DuoTokError as error:
                return show_error(str(error))

        def look(known_id: str | None, shown: str) -> dict[Any, Any]:
            try:
                song = desk.queue.look(known_id or "")
                if song.state not in ENDED:
                    line, progress = desk.show_progress(song)
                    return {bar: progress} | ({} if line == shown else {told: line, stage: line})
                if song.state != "done":
                    return show_error(song.error or "the song was stopped") | {stop: gr.Button(visible=False)}
                players = desk.show_candidates(song)
                chords = ((song.report or {}).get("lead_sheet") or {}).get("chords") or ()
                intro = (song.report or {})["band"]["intro_seconds"]
                return {
                    told: "",
                    bar: "",
                    facts: desk.show_facts(song),
                    fields["chords"]: chart_text(chords, intro),
                    known: gr.Accordion(open=True),
                    **{button: gr.Button(interactive=True) for button in (start, again)},
                    stop: gr.Button("Delete this song", visible=True),
                    timer: gr.Timer(active=False),
                    **{columns[n]: gr.Column(visible=True) for n in range(len(players))},
                    **dict(zip(cards, players, strict=False)),
                }
            except DuoTokError as error:
                return show_error(str(error)) | {stop: gr.Button(visible=False)}

        def remove(known_id: str | None) -> dict[Any, Any]:
            with suppress(UnknownSongError):
                desk.queue.delete(known_id or "")
            return {
                song_id: None,
                told: "",
                bar: "",
                facts: "",
                **{button: gr.Button(interactive=True) for button in (start, again)},
                stop: gr.Button(visible=False),
                timer: gr.Timer(active=False),
                **{column: gr.Column(visible=False) for column in columns},
                **dict.fromkeys(cards, ""),
            }

        outputs = [
            *(song_id, stage, told, bar, facts, start, again, stop, known, timer),
            *(*columns, *cards, *fields.values()),
        ]
        options: dict[str, Any] = {"outputs": outputs, "show_progress": "hidden", "api_visibility": "private"}
        sending = 'async () => \'<p class="told" role="status">Sending the recording</p>\''
        for button in (start, again):
            button.click(None, None, [told], js=sending, api_visibility="private")
            button.click(begin, [given, recorded, *fields.values()], **options)
        for rank, more in enumerate(mores):
            more.click(partial(begin_alike, rank), [song_id], **options)
        timer.tick(look, [song_id, stage], **options)
        stop.click(remove, [song_id], **options)
        # One recording at a time, and chords belong to it.
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        given.upload(lambda: (None, ""), None, [recorded, fields["chords"]], **quiet)
        recorded.stop_recording(lambda: (None, ""), None, [given, fields["chords"]], **quiet)
    page.queue(default_concurrency_limit=None)
    return page
