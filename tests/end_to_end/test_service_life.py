"""The service with a model: songs by HTTP, from the upload to what can be heard."""

import io
import json
import threading
import time
import zipfile
from base64 import b64encode

import httpx
import pytest
import soundfile
import uvicorn
from fastapi.testclient import TestClient

from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.accompany.request import Request
from duotok.recipes.accompany.stream import WavStream
from duotok.recipes.evaluation.load import main as measure_load
from duotok.recipes.service.api import Limits, create_app
from duotok.recipes.service.queue import ENDED, SongQueue
from duotok.recipes.service.song_page import Desk, Offer


@pytest.fixture(scope="module")
def service(accompanist, tmp_path_factory):
    """(client, queue) of a service that two workers work in."""
    queue = SongQueue(tmp_path_factory.mktemp("service") / "data", bound=20)
    with TestClient(create_app(queue, accompanist, workers=2, limits=Limits(seconds=30))) as client:
        yield client, queue
    queue.close()


@pytest.fixture
def idle(accompanist, tmp_path):
    """(client, queue) of a service that is not started, and so has no workers."""
    queue = SongQueue(tmp_path / "data", bound=2)
    limits = Limits(seconds=5, megabytes=0.5)
    app = create_app(queue, accompanist, limits=limits, token="secret", hosts=["testserver"])
    yield TestClient(app, headers={"Authorization": "Bearer secret"}), queue
    queue.close()


@pytest.fixture
def sung(make_singing):
    def record(seconds: float = 1.5, level: float = 1.0) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, level * make_singing(seconds, rate_hz=16_000), 16_000, format="WAV")
        return file.getvalue()

    return record


def post(client, recording, name="my song.wav", **fields):
    return client.post("/songs", files={"vocal": (name, recording)}, data=fields)


def wait_until(is_so):
    end = time.monotonic() + 300
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def wait(client, song_id):
    wait_until(lambda: client.get(f"/songs/{song_id}").json()["state"] in ENDED)
    return client.get(f"/songs/{song_id}").json()


def test_the_whole_life_of_songs(service, accompanist, sung, tmp_path):
    client, queue = service
    fields = {"seed": 5, "candidates": 2, "export": "lab,click", "without": ["drums"], "chords": "0 1 C"}
    answers = [post(client, sung(), **fields) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    song_id, other_id = (answer.json()["id"] for answer in answers)
    assert answers[0].headers["location"] == f"/songs/{song_id}"
    lines = client.get(f"/songs/{song_id}/events").text.splitlines()
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    shares = [song["fraction"] for song in told]
    assert shares == sorted(shares) and len(set(shares)) > 1
    assert told[-1]["state"] == "done" and told[-1]["fraction"] == 1
    ranked = told[-1]["ranking"]
    assert sorted(entry["seed"] for entry in ranked) == [5, 6]
    song, other = wait(client, song_id), wait(client, other_id)
    assert song["files"] == [
        "accompaniment.wav",
        "chords.lab",
        "click.wav",
        "codes.safetensors",
        "mix.wav",
        "report.json",
    ]
    report = client.get(f"/songs/{song_id}/report.json").json()
    assert report == song["report"] and report["vocal"] == "my song.wav"
    assert report["band"]["without"] == ["drums"] and report["seed"] == ranked[0]["seed"]
    # Two workers at once make what one makes alone.
    (tmp_path / "my song.wav").write_bytes(sung())
    request = {"seed": 5, "candidates": 2, "without": ("drums",), "chords": [(0.0, 1.0, "C")]}
    accompanist.accompany(tmp_path / "my song.wav", **request).save(tmp_path / "alone")
    for each in (song, other):
        found = client.get(f"/songs/{each['id']}/mix.wav")
        assert found.headers["content-type"].startswith("audio/")
        assert found.content == (tmp_path / "alone" / "mix.wav").read_bytes()
    part = client.get(f"/songs/{song_id}/mix.wav", headers={"Range": "bytes=0-3"})
    assert (part.status_code, part.content) == (206, b"RIFF")
    with zipfile.ZipFile(io.BytesIO(client.get(f"/songs/{song_id}/all.zip").content)) as archive:
        assert archive.testzip() is None and archive.namelist() == song["files"]
        assert archive.read("mix.wav") == found.content
    assert client.delete(f"/songs/{song_id}").status_code == 204
    assert not (queue.folder / "songs" / song_id).exists()
    for path in ("", "/events", "/mix.wav", "/all.zip"):
        assert client.get(f"/songs/{song_id}{path}").status_code == 404
    assert client.delete(f"/songs/{song_id}").status_code == 404
    assert client.get(f"/songs/{other_id}/mix.wav").status_code == 200


class HeldAccompanist(Accompanist):
    """Goes on from what is composed when it may."""

    may_go_on: threading.Event

    def write_sketches(self, sketches, folder):
        self.may_go_on.wait()
        return super().write_sketches(sketches, folder)


def test_a_song_is_heard_while_it_is_made(accompanist, tmp_path, sung):
    queue, held = SongQueue(tmp_path / "data", bound=9), HeldAccompanist(accompanist.bundle)
    held.may_go_on = threading.Event()
    (tmp_path / "song.wav").write_bytes(sung(9))
    with WavStream(str(tmp_path / "alone.wav")) as stream:
        accompanist.compose(tmp_path / "song.wav", seed=5, stream=stream)
    song_id, unheard = (queue.submit({"seed": 5, "format": "flac"}, tmp_path / "song.wav") for _ in range(2))
    queue.listen(song_id)
    folder = queue.folder / "songs" / song_id
    server = uvicorn.Server(uvicorn.Config(create_app(queue, held), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with httpx.Client(base_url=address, timeout=300) as client:
        with client.stream("GET", f"/songs/{song_id}/stream") as leaves:
            assert next(leaves.iter_raw())[:4] == b"RIFF"
        with client.stream("GET", f"/songs/{song_id}/stream") as answer:
            pieces = answer.iter_raw()
            begun = next(pieces)
            assert client.get(f"/songs/{song_id}").json()["state"] == "running" and len(begun) > 44
            held.may_go_on.set()
            heard = begun + b"".join(pieces)
        assert answer.headers["content-type"] == "audio/wav"
        assert heard == (tmp_path / "alone.wav").read_bytes()
        # Done: all of the result, whatever it is written as.
        wait(client, unheard)
        flac, _ = soundfile.read(io.BytesIO(client.get(f"/songs/{song_id}/mix.flac").content))
        for each in (song_id, unheard):
            whole, rate_hz = soundfile.read(io.BytesIO(client.get(f"/songs/{each}/stream").content))
            assert rate_hz == 48_000 and abs(whole - flac).max() < 1 / 32_000
        assert sorted(path.name for path in folder.iterdir()) == ["given", "result"]
        client.delete(f"/songs/{song_id}")
        for gone in (song_id, "nothing"):
            assert client.get(f"/songs/{gone}/stream").status_code == 404
    server.should_exit = True
    thread.join()
    queue.close()


def test_a_stretch_is_made_anew_from_a_song_that_may_be_deleted_meanwhile(service, accompanist, sung):
    client, queue = service
    first = wait(client, post(client, sung(3), seed=5, variations=2, without="drums").json()["id"])
    before = {name: client.get(f"/songs/{first['id']}/{name}").content for name in first["files"]}

    def repaint(original, stretch="1.0-2.0", files=None, **fields):
        fields = {"original": original, "repaint": stretch, **fields}
        return client.post("/songs", files=files, data={k: v for k, v in fields.items() if v is not None})

    second = f"{first['id']}/accompaniment-2.wav"
    made = repaint(second, seed=9, without="bass", export="lab")
    assert made.status_code == 202, made.text
    song = wait(client, made.json()["id"])
    assert song["state"] == "done", song["error"]
    report = song["report"]
    assert report["repaints"][0]["seconds"] == pytest.approx([1, 2], abs=0.05)
    assert (report["vocal"], report["seed"], "chords.lab" in song["files"]) == ("my song.wav", 9, True)
    kept = before["accompaniment-2.wav"]
    new = client.get(f"/songs/{song['id']}/accompaniment.wav").content
    ends = round(0.9 * 48_000) * 4, round(2.1 * 48_000) * 4
    assert new != kept and len(new) == len(kept)
    assert (new[: ends[0]], new[ends[1] :]) == (kept[: ends[0]], kept[ends[1] :])

    # What cannot be is said at once.
    for status, field, answer in (
        (404, None, repaint("nothing")),
        (404, None, repaint(f"{first['id']}/../{first['id']}")),
        (404, None, repaint(f"{first['id']}/mix.wav")),
        (422, "repaint", repaint(first["id"], "2-4")),
        (422, "repaint", repaint(first["id"], "bridge")),
        (422, "original", repaint(first["id"], None)),
        (422, "original", repaint(None)),
        (422, "vocal", repaint(first["id"], files={"vocal": ("song.wav", sung(3))})),
        (422, "prefix", repaint(first["id"], files={"prefix": ("song.wav", sung(1))})),
        (422, "style", repaint(first["id"], style="polka")),
        (422, "accompaniment_db", repaint(first["id"], accompaniment_db=3)),
        (422, "repaint", repaint(first["id"], format="flac")),
    ):
        assert answer.status_code == status, answer.text
        told = answer.json()["detail"]
        assert field is None or field in [each["loc"][1] for each in told], told
        assert str(queue.folder) not in answer.text
    failed = wait(client, post(client, sung(level=0)).json()["id"])
    assert repaint(failed["id"]).status_code == 409

    # More like it on the page: the same stretch of the same song, other notes.
    desk = Desk(queue, Offer.of_model(accompanist), accompanist.bundle.lm.band, None, 30)
    alike = wait(client, desk.submit_alike(song["id"], 0)[0])["report"]
    assert [each["seconds"] for each in alike["repaints"]] == [report["repaints"][0]["seconds"]]
    assert alike["seed"] != report["seed"]

    # A stretch of the stretch; the song before it is deleted once it is accepted.
    again = repaint(song["id"], "0-0.8").json()["id"]
    assert client.delete(f"/songs/{song['id']}").status_code == 204
    song = wait(client, again)
    assert song["state"] == "done" and len(song["report"]["repaints"]) == 2
    assert client.get(f"/songs/{again}/original").status_code == 404
    assert {name: client.get(f"/songs/{first['id']}/{name}").content for name in first["files"]} == before


def test_a_stretch_of_what_another_model_made_is_refused(idle, accompanist, vocal_file):
    client, queue = idle
    song_id = queue.submit({"seed": 1}, vocal_file)
    assert client.post("/songs", data={"original": song_id, "repaint": "1-2"}).status_code == 409
    queue.claim("w")
    report = accompanist.write(Request(vocal=vocal_file, steps=1), queue.work_folder(song_id))
    written = queue.folder / "songs" / song_id / "work" / "report.json"
    report = {**json.loads(written.read_text()), "model": {"name": "big", "fingerprint": "x"}}
    written.write_text(json.dumps(report))
    queue.finish(song_id, "w", report)
    answer = client.post("/songs", data={"original": song_id, "repaint": "1-2"})
    assert answer.status_code == 409 and "the original was made by another model (big)" in answer.text


def test_a_mix_several_takes_and_a_start_are_taken(service, sung):
    client, _ = service
    takes = [("vocal", ("lead.wav", sung())), ("vocal", ("../high.wav", sung(1.2)))]
    start = ("prefix", ("start.wav", sung(0.5)))
    first = client.post("/songs", files=[*takes, start]).json()["id"]
    too_long = client.post("/songs", files=[takes[0], ("prefix", ("start.wav", sung(2)))]).json()["id"]
    song = wait(client, first)
    assert song["report"]["vocal"] == "lead.wav + ../high.wav" and song["report"]["prefix_seconds"] > 0.4
    failed = wait(client, too_long)
    assert failed["state"] == "failed" and failed["error"].startswith("the prefix has 2.00 s")


def test_what_is_wrong_with_a_song_is_said_in_one_line(service, sung):
    client, queue = service
    song = wait(client, post(client, sung(level=0), name="/root/quiet.wav").json()["id"])
    assert song["state"] == "failed" and song["files"] == []
    assert song["error"] == "/root/quiet.wav is silent; give a recording in which somebody sings"
    lost = post(client, sung(), style="nothing such")
    assert lost.status_code == 422 and lost.json()["detail"][0]["loc"] == ["body", "style"]
    assert str(queue.folder) not in song["error"] + lost.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_ours_costs_one_song_and_no_worker(service, vocal_file):
    client, queue = service
    broken = [queue.submit({"seed": 1, "no such field": 1}, vocal_file) for _ in range(2)]
    for song_id in broken:
        song = wait(client, song_id)
        assert song["error"] == "the service could not make this song (TypeError)"
    assert wait(client, queue.submit({"seed": 1}, vocal_file))["state"] == "done"


def test_a_song_being_made_can_be_deleted_and_waits_for_the_next_start(accompanist, tmp_path, sung):
    queue = SongQueue(tmp_path / "data", bound=9)
    folders = queue.folder / "songs"
    with TestClient(create_app(queue, accompanist)) as client:
        first, second = (post(client, sung(9), seed=n, candidates=16).json()["id"] for n in range(2))
        wait_until(lambda: queue.look(first).stage == "compose")
        assert client.delete(f"/songs/{first}").status_code == 204
        wait_until(lambda: queue.look(second).stage == "compose")
        assert [path.name for path in folders.iterdir()] == [second]
    assert queue.look(second).state == "queued" and queue.look(second).fraction == 0
    assert [path.name for path in (folders / second).iterdir()] == ["given"]
    queue.close()


def test_what_may_not_come_in_is_refused_before_it_is_read(idle, sung):
    client, queue = idle
    song = {"files": {"vocal": ("song.wav", sung())}}
    basic = b64encode(b"anybody:secret").decode()
    assert client.get("/styles", headers={"Authorization": f"Basic {basic}"}).status_code == 200
    for wrong in ("", "Bearer", "Bearer Secret", "Basic secret", f"Basic {b64encode(b'secret:x').decode()}"):
        refused = client.post("/songs", headers={"Authorization": wrong}, **song)
        assert refused.status_code == 401 and "Bearer" in refused.headers["www-authenticate"]
    assert client.get("/health", headers={"Authorization": ""}).json()["status"] == "ok"
    assert client.get("/styles", headers={"Host": "rebound.example"}).status_code == 400
    for elsewhere in ({"Origin": "https://other.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.post("/songs", headers=elsewhere, **song).status_code == 403
    assert "access-control-allow-origin" not in client.get("/styles", headers={"Origin": "x"}).headers
    assert client.post("/songs", headers={"Origin": "http://testserver"}, **song).status_code == 202
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for body, length in ((b"", {"Content-Length": "9000000"}), (iter([b"x" * 3_000_000]), {})):
        answer = client.post("/songs", content=body, headers={**form, **length})
        assert answer.status_code == 413 and "up to 0.5 MB" in answer.json()["detail"]
    assert client.post("/songs", **song).status_code == 202
    full = client.post("/songs", **song)
    assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
    assert queue.count("queued") == 2 and not list(queue.incoming.iterdir())


@pytest.mark.parametrize(
    ("files", "fields", "status", "field"),
    [
        ({}, {"seed": 1}, 422, "vocal"),
        ({"vocal": 1, "mix": 1}, {}, 422, "mix"),
        ({}, {"vocal": "/etc/passwd"}, 422, "vocal"),
        ({"vocal": b"some text"}, {}, 422, "vocal"),
        ({"vocal": 1, "prefix": b"RIFF"}, {}, 422, "prefix"),
        ({"vocal": 2, "prefix": 1}, {"intro": 1}, 422, "prefix"),
        ({"vocal": 1}, {"sed": 1}, 422, "sed"),
        ({"vocal": 1}, {"seed": "x"}, 422, "seed"),
        ({"vocal": 1}, {"meter": "2/4", "style": "polka"}, 422, "style"),
        ({"vocal": 1}, {"chords": "../../chart"}, 422, "chords"),
        ({"vocal": 6}, {}, 413, None),
        ({"vocal": 1}, {}, 202, None),
    ],
)
def test_wrong_uploads_and_fields_are_named(files, fields, status, field, idle, sung):
    client, queue = idle
    uploads = {
        name: (f"{name}.wav", sung(content + 0.1) if isinstance(content, int) else content)
        for name, content in files.items()
    }
    answer = client.post("/songs", files=uploads or None, data=fields)
    assert answer.status_code == status, answer.text
    if field is not None:
        told = answer.json()["detail"]
        assert field in [each["loc"][1] for each in told] and all("\n" not in each["msg"] for each in told)
    assert queue.count("queued") == (status == 202) and not list(queue.incoming.iterdir())


def test_no_path_of_a_client_reaches_the_files(idle, sung):
    client, queue = idle
    (queue.folder / "songs" / "report.json").write_text("{}")
    for path in ("%2e%2e", "..%2f..%2fsongs.sqlite", "../songs.sqlite", "report.json", "%2fetc%2fpasswd"):
        assert client.get(f"/songs/{path}").status_code == 404
        assert client.get(f"/songs/{path}/report.json").status_code == 404
        song_id = queue.look(client.post("/songs", files={"vocal": ("../../x", sung())}).json()["id"]).id
        assert client.get(f"/songs/{song_id}/{path}").status_code == 404
        assert client.delete(f"/songs/{song_id}/../x").status_code in (404, 405)
        client.delete(f"/songs/{song_id}")
    assert not (queue.folder.parent / "x").exists()


def test_the_description_has_every_way_and_setting(idle):
    described = idle[0].get("/openapi.json").json()
    assert {f"/songs{way}" for way in ("", "/{song_id}")} <= set(described["paths"])
    assert {f"/songs/{{song_id}}/{way}" for way in ("events", "stream", "all.zip")} <= set(described["paths"])
    assert "audio/wav" in described["paths"]["/songs/{song_id}/stream"]["get"]["responses"]["200"]["content"]
    form = described["components"]["schemas"]["SongForm"]["properties"]
    assert {"vocal", "mix", "prefix", "tempo_bpm", "style"} <= set(form)
    assert described["components"]["schemas"]["SongView"]["properties"]["state"]["examples"] == ["running"]
    assert {"202", "413", "422", "429"} <= set(described["paths"]["/songs"]["post"]["responses"])


def test_nothing_is_lost_or_made_twice_when_the_process_is_killed(tiny_bundle, tmp_path):
    out, bundle = tmp_path / "load.json", str(tiny_bundle)
    options = ["--jobs=3", "--kills=1", "--seconds=1.2", f"--bundle={bundle}", f"--out={out}"]
    assert measure_load(options) == 0
    figures = json.loads(out.read_text())
    assert figures["kills"] == 1 and figures["states"] == {"done": 3} and figures["of_their_own_seed"] == 3
    assert figures["lost"] == figures["made_again_after_done"] == figures["left_half_made"] == 0
    assert figures["begun_again_after_kill"] <= 1
