"""The REST interface: songs are posted, looked at, listened to and deleted by their ids.

curl -F vocal=@song.wav -F seed=7 http://127.0.0.1:7860/songs
curl -F original=ID -F repaint=32.0-48.0 http://127.0.0.1:7860/songs
"""

import asyncio
import io
import secrets
import shutil
import zipfile
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO
from urllib.parse import urlsplit

import soundfile
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, create_model
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duotok.recipes.accompany.arrangement import settle_band
from duotok.recipes.accompany.bundle import read_styles
from duotok.recipes.accompany.stream import HEADER_BYTES, wav_header
from duotok.recipes.service.queue import ENDED, QueueFullError, Song, SongQueue, UnknownSongError
from duotok.recipes.service.settings import (
    RECORDINGS,
    NotDoneError,
    SongSettings,
    TooLongError,
    check_recording,
    make_request,
    submit_stretch,
)
from duotok.recipes.service.worker import Workers
from duotok.tokenizer.common.errors import AudioError, CheckpointError, ConfigError, DataError
from duotok.tokenizer.common.files import shown_name

if TYPE_CHECKING:
    from duotok.recipes.accompany.pipeline import Accompanist

_LOOK_SECONDS = 0.25  # between two looks at a song whose events are followed
_QUIET_SECONDS = 15.0  # after which a line says that the connection lives
_CARE_SECONDS = 1.0  # between two looks at the workers
_EXPIRE_SECONDS = 600.0
_CHUNK_BYTES = 1 << 16
_FORM_BYTES = 1 << 20  # of all that is not a recording
_HEARD: dict[int | str, dict[str, Any]] = {
    200: {"description": "16-bit stereo at 48 kHz", "content": {"audio/wav": {}}}
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the service takes."""

    seconds: float = 600.0  # of a recording
    megabytes: float = 200.0  # of an upload, all of its recordings
    keep_days: float = 7.0  # songs are deleted after that

    @property
    def upload_bytes(self) -> int:
        return round(self.megabytes * 1e6)


class SongView(BaseModel):
    """What a client is told of a song."""

    id: str = Field(examples=["pH3fT0wVn1cQk9sXb2Lz7aRd"])
    state: str = Field(description="queued, running, done, failed or cancelled", examples=["running"])
    stage: str | None = Field(description="listen, compose, paint, sound or mix", examples=["compose"])
    fraction: float = Field(description="of all its work, 0 to 1", examples=[0.31])
    ahead: int = Field(description="songs that are made before this one", examples=[0])
    ranking: list[dict[str, Any]] = Field(description="candidates, best first, once they are composed")
    report: dict[str, Any] | None = Field(description="report.json, when it is done")
    error: str | None = Field(description="one line, when it failed")
    created: float = Field(description="seconds since 1970")
    ended: float | None
    files: list[str] = Field(description="what GET /songs/ID/NAME has", examples=[["mix.wav", "report.json"]])


_SongForm: Any = create_model(
    "SongForm",
    __base__=SongSettings,
    vocal=(list[UploadFile], Field(default=[], description="the singer alone, in one take or several")),
    mix=(UploadFile | None, Field(default=None, description="a whole song instead of a vocal")),
    prefix=(UploadFile | None, Field(default=None, description="a given start of the accompaniment")),
)


def create_app(
    queue: SongQueue,
    accompanist: "Accompanist",
    *,
    workers: int = 1,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Sequence[str] | None = None,
) -> FastAPI:
    """Return the application, which makes the songs of the queue while it runs.

    token: what clients must send; hosts: names under which it may be called, None: any.
    """
    limits = limits or Limits()
    styles = read_styles(accompanist.bundle.folder)
    crew = Workers(queue, accompanist, workers)

    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        queue.recover()
        crew.start()
        care = asyncio.create_task(_take_care(queue, crew, limits.keep_days))
        yield
        care.cancel()
        await to_thread.run_sync(crew.stop)

    app = FastAPI(
        title="DuoTok",
        summary="Listens to a singer and plays the band",
        version=version("duotok"),
        lifespan=live,
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.styles, app.state.limits, app.state.accompanist = styles, limits, accompanist
    app.add_middleware(_Door, token=token, hosts=hosts, most_bytes=limits.upload_bytes, queue=queue)
    app.add_exception_handler(RequestValidationError, _tell_fields)
    for kind, status in {
        UnknownSongError: 404,
        NotDoneError: 409,
        CheckpointError: 409,  # an original of another model
        QueueFullError: 429,
        TooLongError: 413,
        AudioError: 422,
        ConfigError: 422,
        DataError: 507,
    }.items():
        app.add_exception_handler(kind, _answer(status))
    checking = CapacityLimiter(2)  # recordings that are decoded at once

    @app.post("/songs", status_code=202, responses=_refusals(404, 409, 413, 422, 429))
    async def post_song(
        form: Annotated[_SongForm, Form(media_type="multipart/form-data")],  # pyright: ignore[reportInvalidTypeForm]
        response: Response,
    ) -> SongView:
        """Accept a song: `vocal` or `mix`, and what is asked of the band; or a stretch of a finished one."""
        if form.original and (form.vocal or form.mix):
            raise _field_error(
                "mix" if form.mix else "vocal", "a stretch is made of the original's recording"
            )
        if not form.original and bool(form.vocal) == bool(form.mix):
            raise _field_error("mix" if form.mix else "vocal", "give either a vocal or a mix, and not both")
        settings = form.model_dump(exclude=set(RECORDINGS), exclude_unset=True)
        try:
            given = {"vocal": "vocal", "prefix": "prefix"} if form.prefix else {}  # not looked at yet
            settle_band(make_request(settings, **given), accompanist.bundle.lm.band)
        except ConfigError as error:
            raise _field_error(_guess_field(settings, accompanist.bundle.lm.band), str(error)) from error
        if form.original:
            again = partial(submit_stretch, queue, settings, accompanist.bundle.fingerprint)
            try:
                return _accepted(queue, await to_thread.run_sync(again, limiter=checking), response)
            except ConfigError as error:
                raise _field_error("repaint", str(error)) from error
        uploads = [("mix", form.mix)] if form.mix else [("vocal", take) for take in form.vocal]
        uploads += [("prefix", form.prefix)] if form.prefix else []
        submit = partial(_submit, queue, settings, uploads, limits.seconds)
        song_id = await to_thread.run_sync(submit, limiter=checking)
        return _accepted(queue, song_id, response)

    @app.get("/songs/{song_id}", responses=_refusals(404))
    def get_song(song_id: str) -> SongView:
        """What is known of a song."""
        return _view(queue.look(song_id))

    @app.get("/songs/{song_id}/events", responses=_refusals(404), response_class=StreamingResponse)
    async def get_events(song_id: str) -> StreamingResponse:
        """Every change of a song as server-sent events `song`, until it has ended."""
        await to_thread.run_sync(queue.look, song_id)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_follow(queue, song_id), media_type="text/event-stream", headers=headers)

    @app.get("/songs/{song_id}/stream", responses=_HEARD | _refusals(404), response_class=StreamingResponse)
    async def get_stream(song_id: str) -> StreamingResponse:
        """The mix as a WAV that grows while it is composed; of a finished song, all of it at once.

        Like --stream it plays the candidate that fits best at its beginning. It ends where the song does, is
        cancelled, deleted or fails. Some songs come only once they are made: a stretch anew, and those of a
        model that composes all of a song before it sounds.
        """
        await to_thread.run_sync(queue.listen, song_id)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_hear(queue, song_id), media_type="audio/wav", headers=headers)

    @app.get("/songs/{song_id}/all.zip", responses=_refusals(404), response_class=StreamingResponse)
    def get_all(song_id: str) -> StreamingResponse:
        """All files of a song in one."""
        files = queue.look(song_id).files
        if not files:
            raise UnknownSongError
        paths = [queue.open_file(song_id, name) for name in files]
        headers = {"Content-Disposition": 'attachment; filename="duotok-song.zip"'}
        return StreamingResponse(_zip(paths), media_type="application/zip", headers=headers)

    @app.get("/songs/{song_id}/{name}", responses=_refusals(404), response_class=FileResponse)
    def get_file(song_id: str, name: str) -> FileResponse:
        """One file of a song, by a name out of `files`."""
        return FileResponse(queue.open_file(song_id, name), headers={"X-Content-Type-Options": "nosniff"})

    @app.delete("/songs/{song_id}", status_code=204, responses=_refusals(404))
    def delete_song(song_id: str) -> None:
        """Cancel a song and remove all that is known of it."""
        queue.delete(song_id)

    @app.get("/styles")
    def get_styles() -> dict[str, list[str]]:
        """The styles that the band can be asked for."""
        return {"styles": styles}

    @app.get("/health")
    def get_health() -> dict[str, Any]:
        """Whether the service lives, and what it does."""
        counts = {state: queue.count(state) for state in ("queued", "running")}
        model = {"name": accompanist.bundle.name, "device": str(accompanist.device)}
        return {"status": "ok", "version": version("duotok"), "model": model, "workers": workers, **counts}

    return app


async def _take_care(queue: SongQueue, crew: Workers, keep_days: float) -> None:
    """Replace workers that have died, and delete songs that are old, as long as the service runs."""
    seconds = 0.0
    while True:
        crew.start()
        if seconds % _EXPIRE_SECONDS == 0:
            await to_thread.run_sync(queue.expire, keep_days)
        await asyncio.sleep(_CARE_SECONDS)
        seconds += _CARE_SECONDS


def _submit(
    queue: SongQueue,
    settings: dict[str, Any],
    uploads: Sequence[tuple[str, UploadFile]],
    most_seconds: float,
) -> str:
    """Check the recordings of a song, each with its field, and put it into the queue; return its id."""
    with TemporaryDirectory(dir=queue.incoming) as folder:
        paths, names, prefix = [], [], None
        for number, (field, upload) in enumerate(uploads):
            path, name = Path(folder) / f"upload-{number}", shown_name(upload.filename or f"the {field}")
            with open(path, "wb") as file:
                shutil.copyfileobj(upload.file, file)
            try:
                check_recording(path, name, most_seconds)
            except TooLongError:
                raise
            except AudioError as error:
                raise _field_error(field, str(error)) from error
            if field == "prefix":
                prefix = path
            else:
                paths.append(path)
                names.append(name)
        is_mix = uploads[0][0] == "mix"
        return queue.submit(settings, paths, is_mix=is_mix, prefix=prefix, names=names)


def _accepted(queue: SongQueue, song_id: str, response: Response) -> SongView:
    response.headers["Location"] = f"/songs/{song_id}"
    return _view(queue.look(song_id))


def _view(song: Song) -> SongView:
    return SongView(**{name: getattr(song, name) for name in SongView.model_fields})


async def _follow(queue: SongQueue, song_id: str) -> AsyncIterator[str]:
    """Server-sent events of a song: one for each change."""
    told, quiet_seconds = "", 0.0
    while True:
        try:
            song = await to_thread.run_sync(queue.look, song_id)
        except UnknownSongError:
            yield "event: deleted\ndata: {}\n\n"
            return
        now = _view(song).model_dump_json()
        if now != told or quiet_seconds >= _QUIET_SECONDS:
            yield f"event: song\ndata: {now}\n\n" if now != told else ": here\n\n"
            told, quiet_seconds = now, 0.0
        if song.state in ENDED:
            return
        await asyncio.sleep(_LOOK_SECONDS)
        quiet_seconds += _LOOK_SECONDS


async def _hear(queue: SongQueue, song_id: str) -> AsyncIterator[bytes]:
    """The bytes of a song's mix, as they come."""
    file: BinaryIO | None = None
    try:
        while True:
            try:
                song = await to_thread.run_sync(queue.look, song_id)
            except UnknownSongError:
                return
            if file is None and song.state == "done":
                whole = _read_mix(queue, song)
                while piece := await to_thread.run_sync(next, whole, b""):
                    yield piece
                return
            file = file or await to_thread.run_sync(_open_live, queue.live_file(song_id))
            # What is there since the song was looked at: of an ended one, all.
            while file is not None and (piece := await to_thread.run_sync(file.read, _CHUNK_BYTES)):
                yield piece
            if song.state in ENDED:
                return
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        if file is not None:
            file.close()


def _open_live(path: Path) -> BinaryIO | None:
    """A song that grows, once more than its header is there."""
    with suppress(FileNotFoundError):
        return path.open("rb") if path.stat().st_size > HEADER_BYTES else None


def _read_mix(queue: SongQueue, song: Song) -> Iterator[bytes]:
    """A 16-bit WAV of a finished song, piece by piece."""
    name = next(name for name in song.files if Path(name).stem == "mix")
    with soundfile.SoundFile(queue.open_file(song.id, name)) as file:
        yield wav_header(file.frames)
        while len(wave := file.read(_CHUNK_BYTES // 4, dtype="float32", always_2d=True)):
            yield (32_768 * wave).round().clip(-32_768, 32_767).astype("<i2").tobytes()


class _Sink(io.RawIOBase):
    """Keeps what is written until it is taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken, self._parts = b"".join(self._parts), []
        return taken


def _zip(paths: Sequence[Path]) -> Iterator[bytes]:
    """The bytes of an archive of files, piece by piece; sound does not get smaller and is stored as it is."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for path in paths:
            entry = zipfile.ZipInfo.from_file(path, path.name)
            with open(path, "rb") as file, archive.open(entry, "w") as target:
                while chunk := file.read(_CHUNK_BYTES):
                    target.write(chunk)
                    yield sink.take()
    yield sink.take()


class _Door:
    """Refuses what may not come in before anything of its body is read, and bodies that are too large."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        hosts: Sequence[str] | None,
        most_bytes: int,
        queue: SongQueue,
    ) -> None:
        self._app, self._token, self._hosts, self._queue = app, token, hosts, queue
        self._most_bytes = most_bytes + _FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        refusal = await self._refuse(scope)
        if refusal is None:
            return await self._app(scope, self._bounded(receive), send)
        if scope["type"] == "http":
            return await refusal(scope, receive, send)
        await receive()
        await send({"type": "websocket.close", "code": 1008})

    async def _refuse(self, scope: Scope) -> Response | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._hosts is not None and urlsplit(f"//{host}").hostname not in self._hosts:
            # A page elsewhere may have let its own name point here.
            return _refusal(400, f"call this service by the name {self._hosts[0]}")
        if self._token is not None and scope["path"] != "/health" and not _holds(headers, self._token):
            refusal = _refusal(401, "send the token of this service: Authorization: Bearer TOKEN")
            for way in ("Bearer", 'Basic realm="DuoTok, any name, the token"'):  # the second is for browsers
                refusal.headers.append("WWW-Authenticate", way)
            return refusal
        if scope.get("method", "GET") not in ("GET", "HEAD", "OPTIONS") and _is_from_elsewhere(headers, host):
            return _refusal(403, "this comes from a page of somebody else")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most_bytes:
            return self._too_large()
        if (scope.get("method"), scope["path"]) == ("POST", "/songs"):
            try:
                await to_thread.run_sync(self._queue.require_room)
            except QueueFullError as error:
                return _refusal(429, str(error), {"Retry-After": str(error.retry_seconds)})
        return None

    def _bounded(self, receive: Receive) -> Receive:
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body") or b"")
            if taken > self._most_bytes:
                raise HTTPException(413, self._too_large_text)
            return message

        return bounded

    @property
    def _too_large_text(self) -> str:
        return (
            f"the upload is too large; this service takes up to {(self._most_bytes - _FORM_BYTES) / 1e6:g} MB"
        )

    def _too_large(self) -> Response:
        return _refusal(413, self._too_large_text)


def _holds(headers: dict[str, str], token: str) -> bool:
    """Whether a request brings the token, as a bearer or as the password that a browser asks for."""
    way, _, value = headers.get("authorization", "").partition(" ")
    if way.lower() == "basic":
        try:
            value = b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except ValueError:
            return False
    elif way.lower() != "bearer":
        return False
    return secrets.compare_digest(value.strip().encode(), token.encode())


def _is_from_elsewhere(headers: dict[str, str], host: str) -> bool:
    """Whether a browser says that a page of another origin asks."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    return "origin" in headers and urlsplit(headers["origin"]).netloc != host


def _refusal(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"detail": text}, status, headers)


def _answer(status: int) -> Any:
    """A handler that answers with what an error says."""

    def answer(_: Request, error: Exception) -> Response:
        headers = {"Retry-After": str(error.retry_seconds)} if isinstance(error, QueueFullError) else None
        return _refusal(status, str(error), headers)

    return answer


def _field_error(name: str, text: str) -> RequestValidationError:
    return RequestValidationError([{"type": "value_error", "loc": ("body", name), "msg": text}])


def _tell_fields(_: Request, error: Exception) -> Response:
    """Which fields are wrong and why; what was sent is not sent back."""
    assert isinstance(error, RequestValidationError)
    told = [
        {"loc": list(each["loc"]), "msg": each["msg"].removeprefix("Value error, "), "type": each["type"]}
        for each in error.errors()
    ]
    return JSONResponse({"detail": told}, 422)


def _guess_field(settings: dict[str, Any], band: Any) -> str:
    """Which of the settings a band cannot play; none of them: it is what begins the song."""
    pair = {name: settings[name] for name in ("repaint", "original") if name in settings}
    for name in settings:
        try:
            settle_band(make_request({**pair, name: settings[name]}), band)
        except ConfigError:
            return name
    return "prefix"


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI description says of answers that are none."""
    words = {
        409: (
            "the original is not made yet, or by another model",
            "the original is running; a stretch can be made anew once it is done",
        ),
        404: ("there is no such song", "there is no such song; it may have been deleted"),
        413: ("too many bytes or seconds", "the upload is too large; this service takes up to 200 MB"),
        429: (
            "too many songs wait; Retry-After says when",
            "100 songs are waiting already; try again in 30 s",
        ),
    }
    return {
        status: {
            "description": words[status][0],
            "content": {"application/json": {"example": {"detail": words[status][1]}}},
        }
        for status in statuses
        if status in words
    }
