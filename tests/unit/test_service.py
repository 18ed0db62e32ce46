"""The queue of songs and what a client may ask for, without a model."""

import json
import sys
import threading
from dataclasses import fields

import pytest

from duotok.recipes.accompany.request import Request
from duotok.recipes.evaluation.fuzz import make_recording
from duotok.recipes.service.queue import MOST_ATTEMPTS, QueueFullError, SongQueue, UnknownSongError
from duotok.recipes.service.serve import main
from duotok.recipes.service.settings import (
    RECORDINGS,
    SongSettings,
    TooLongError,
    check_recording,
    check_settings,
    make_request,
    name_recordings,
)
from duotok.tokenizer.common.audio import audio_seconds
from duotok.tokenizer.common.errors import AudioError, ConfigError, DataError


@pytest.fixture
def queue(tmp_path):
    queue = SongQueue(tmp_path / "data", bound=20)
    yield queue
    queue.close()


@pytest.fixture
def song_id(queue, vocal_file):
    return queue.submit({"seed": 7}, vocal_file, names=["my song.wav"])


def make(queue: SongQueue, song_id: str, worker: str = "w") -> bool:
    """Do as a worker does."""
    work = queue.work_folder(song_id)
    report = {"files": ["mix.wav", "report.json"]}
    (work / "mix.wav").write_bytes(b"sound")
    (work / "report.json").write_text(json.dumps(report))
    return queue.finish(song_id, worker, report)


def files_of(queue: SongQueue) -> list[str]:
    root = queue.folder / "songs"
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_a_song_is_queued_made_and_shown_as_a_whole(queue, song_id, vocal_file):
    song = queue.look(song_id)
    assert (song.state, song.ahead, song.settings, song.files) == ("queued", 0, {"seed": 7}, ())
    assert queue.look(queue.submit({}, vocal_file)).ahead == 1
    claimed = queue.claim("w")
    assert claimed.id == song_id and claimed.names == {"vocal-1": "my song.wav"}
    assert queue.given(claimed)["vocal-1"].read_bytes() == vocal_file.read_bytes()
    assert queue.progress(song_id, "w", "compose", 0.25, [{"rank": 1}])
    assert queue.progress(song_id, "w", "paint", 0.5)
    song = queue.look(song_id)
    assert (song.state, song.stage, song.fraction, song.ranking) == ("running", "paint", 0.5, [{"rank": 1}])
    assert make(queue, song_id)
    song = queue.look(song_id)
    assert (song.state, song.fraction, song.files) == ("done", 1.0, ("mix.wav", "report.json"))
    assert queue.open_file(song_id, "mix.wav").read_bytes() == b"sound"
    assert not queue.progress(song_id, "w", "paint", 0.5)  # it is the worker's no more
    for name in ("../given/vocal-1", "vocal-1", "", "..", "/etc/passwd"):
        with pytest.raises(UnknownSongError):
            queue.open_file(song_id, name)


def test_ids_cannot_be_guessed_and_unknown_ones_are_told(queue, vocal_file):
    ids = {queue.submit({}, vocal_file) for _ in range(5)}
    assert len(ids) == 5 and all(len(each) == 24 for each in ids)
    for act in (queue.look, queue.cancel, queue.delete):
        with pytest.raises(UnknownSongError):
            act("../x")


def test_each_song_is_claimed_once_and_in_order(queue, vocal_file):
    ids = [queue.submit({"seed": number}, vocal_file) for number in range(20)]
    claimed: list[str] = []

    def work(name: str) -> None:
        while (song := queue.claim(name)) is not None:
            claimed.append(song.id)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(ids) and claimed[0] == ids[0]


def test_a_waiting_worker_is_woken(queue, vocal_file):
    found = []
    thread = threading.Thread(target=lambda: found.append(queue.claim("w", wait_seconds=30)))
    thread.start()
    song_id = queue.submit({}, vocal_file)
    thread.join(timeout=20)
    assert [song.id for song in found] == [song_id]


def test_a_full_queue_says_when_to_come_again_and_keeps_nothing(queue, vocal_file):
    queue.bound = 1
    queue.submit({}, vocal_file)
    with pytest.raises(QueueFullError, match="1 songs are waiting") as caught:
        queue.submit({}, vocal_file)
    assert caught.value.retry_seconds >= 1 and len(files_of(queue)) == 1
    queue.claim("w")
    queue.submit({}, vocal_file)


def test_what_cannot_be_kept_is_not_accepted(queue, tmp_path):
    with pytest.raises(DataError, match="cannot be kept"):
        queue.submit({}, tmp_path / "missing.wav")
    assert queue.count("queued") == 0 and list((queue.folder / "songs").iterdir()) == []


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_a_song_that_is_not_wanted_leaves_nothing_of_what_was_made(queue, song_id, end):
    queue.claim("w")
    work = queue.work_folder(song_id)
    (work / "mix.wav").write_bytes(b"half")
    getattr(queue, end)(song_id)
    assert not queue.progress(song_id, "w", "paint", 0.5)
    if end == "cancel":
        assert not make(queue, song_id) and queue.look(song_id).state == "cancelled"
        assert [name for name in files_of(queue) if "given" not in name] == []
    else:
        with pytest.raises(DataError, match="cannot be kept"):
            queue.work_folder(song_id)
        (queue.folder / "songs" / song_id / "work").mkdir(parents=True)  # the worker writes on
        queue.fail(song_id, "w", "cannot write")
        assert list((queue.folder / "songs").iterdir()) == []


def test_after_a_death_of_the_process_nothing_is_lost_or_made_twice(tmp_path, vocal_file):
    queue = SongQueue(tmp_path, bound=9)
    waiting, running, made, hopeless = (queue.submit({"seed": n}, vocal_file) for n in range(4))
    with pytest.raises(DataError, match="another process serves"):
        SongQueue(tmp_path, bound=9)
    for song_id in (running, made):
        while queue.claim("w").id != song_id:
            pass
    (queue.work_folder(running) / "mix.wav").write_bytes(b"half")
    # It dies between the renaming and the note of it.
    for name in ("mix.wav", "report.json"):
        result = tmp_path / "songs" / made / "result"
        result.mkdir(exist_ok=True)
        (result / name).write_text('{"files": ["mix.wav", "report.json"]}')
    (tmp_path / "songs" / "orphan").mkdir()
    (tmp_path / "incoming" / "upload").mkdir()
    queue._database.execute(
        "UPDATE songs SET state = 'running', worker = 'w', attempts = ? WHERE id = ?",
        (MOST_ATTEMPTS, hopeless),
    )
    queue.close()
    queue = SongQueue(tmp_path, bound=9)
    assert queue.recover() == 4  # the one that waited was claimed on the way
    states = [queue.look(each).state for each in (waiting, running, made, hopeless)]
    assert states == ["queued", "queued", "done", "failed"]
    assert "not tried again" in queue.look(hopeless).error
    assert queue.open_file(made, "mix.wav").is_file()
    assert not list(tmp_path.glob("songs/*/work")) and not list((tmp_path / "incoming").iterdir())
    assert not (tmp_path / "songs" / "orphan").exists()
    assert [queue.claim("w").id, queue.claim("w").id, queue.claim("w")] == [waiting, running, None]
    queue.close()


def test_songs_expire_when_they_have_ended(queue, vocal_file):
    ids = [queue.submit({}, vocal_file) for _ in range(3)]
    queue.claim("w")
    make(queue, ids[0])
    queue.claim("w")
    assert queue.expire(days=1) == 0
    queue._database.execute("UPDATE songs SET created = 0, ended = ended - 90000")
    assert queue.expire(days=1) == 1
    assert [queue.look(each).state for each in ids[1:]] == ["running", "queued"]
    assert {name.split("/")[0] for name in files_of(queue)} == set(ids[1:])


def test_a_folder_that_cannot_be_used_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "songs.sqlite").write_bytes(b"no database " * 100)
    for name in ("file", "other"):
        with pytest.raises(DataError, match=f"{name}.*--data"):
            SongQueue(tmp_path / name, bound=1)


def test_fields_of_a_request_are_settings_unless_they_could_name_a_file():
    told = {"chords", "original"}  # a chart; a song of the queue
    files = {field.name for field in fields(Request) if "Path" in str(field.type)} - told
    assert files >= set(RECORDINGS)
    assert set(SongSettings.model_fields) == {field.name for field in fields(Request)} - files


def test_settings_come_as_texts_and_become_a_request():
    texts = {
        "seed": "7",
        "tempo_bpm": "96.5",
        "stems": "true",
        "without": "drums, bass",
        "export": ["lab", "lab"],
    }
    settings = check_settings({**texts, "chords": "0 2 C\n2 4 Am", "tuning": "-12"})
    request = make_request(json.loads(json.dumps(settings)), vocal="song.wav")
    assert (request.seed, request.tempo_bpm, request.stems) == (7, 96.5, True)
    assert (request.without, request.export, request.tuning) == (("drums", "bass"), ("lab",), -12.0)
    assert request.chords == [(0.0, 2.0, "C"), (2.0, 4.0, "Am")] and request.steps is None


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"tempo": 90}, "tempo: Extra"),
        ({"vocal": "/etc/passwd"}, "vocal: Extra"),
        ({"seed": "x"}, "seed: Input should be a valid integer"),
        ({"seed": -1}, "seed: seed must be from 0"),
        ({"tempo_bpm": "nan"}, "tempo_bpm: the tempo must be"),
        ({"meter": "9/8"}, "meter: meter must be"),
        ({"chords": "/etc/passwd"}, "chords: the chart, line 1: '/etc/passwd' is not"),
        ({"chords": "0 1 C\n" * 20_000}, "chords: String should have at most"),
        ({"without": "drums,bass,chords"}, "without: without drums"),
        ({"export": "pdf"}, "export: export must name"),
        ({"variations": 2, "keep": 3}, "keep: keep must be from 1"),
        ({"variations": 10}, "variations: Input should be less"),
        ({"format": "exe"}, "format: format must be one of"),
        ({"separator": "../x"}, "separator: unknown separator"),
        ({"original": "x"}, "original: give both the stretch"),
        ({"repaint": "1-2"}, "original: give both the stretch"),
        ({"repaint": "2-1", "original": "x"}, "repaint: repaint must begin"),
        ({"repaint": "1-2", "original": "x", "tempo_bpm": 90}, "repaint: a repaint keeps what"),
        ({"repaint": "1-2", "original": "x" * 101}, "original: String should have at most"),
    ],
)
def test_a_wrong_setting_is_named(values, told):
    with pytest.raises(ConfigError) as caught:
        check_settings(values)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize("depth", [1, 12])
def test_messages_do_not_tell_where_recordings_lie(depth, tmp_path):
    folder = tmp_path.joinpath(*["a long way down"] * depth)
    folder.mkdir(parents=True)
    path = folder / "vocal-1"
    path.write_text("text")
    with pytest.raises(AudioError, match="^my song.wav is not readable as audio") as caught:
        check_recording(path, "my song.wav", 10)
    assert "a long" not in str(caught.value)
    other = path.with_name("vocal-10")
    called = {path: "vocal-1.wav", other: "x\ny"}
    told = name_recordings(f"vocal-1 + vocal-10 end, {path}", called)
    assert told == "vocal-1.wav + x\\ny end, vocal-1.wav"


@pytest.mark.parametrize("ending", ["wav", "m4a"])
def test_a_recording_is_measured_no_further_than_it_may_be_long(ending, tmp_path, make_singing):
    path = tmp_path / f"song.{ending}"
    make_recording(path, make_singing(3.0, rate_hz=16_000).T, 16_000)
    assert check_recording(path, "song", 3.2) == pytest.approx(3.0, abs=0.1)
    with pytest.raises(TooLongError, match="song is too long; this service takes up to 1.5 s"):
        check_recording(path, "song", 1.5)
    if ending == "m4a":
        assert 1.5 < audio_seconds(path, most_seconds=1.5) < 2.2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--host", "0.0.0.0"], "give a --token"),
        (["--host", "songs.example", "--token", ""], "give a --token"),
        (["--workers", "0"], "--workers must be above 0"),
        (["--most-seconds", "nan"], "--most-seconds must be above 0"),
        (["--port", "70000"], "--port must be"),
        (["--data", "{file}"], "--data"),
        (["--data", "{folder}/data", "--model", "{folder}"], "is not a model"),
    ],
)
def test_serve_tells_in_one_line_what_cannot_be(options, told, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DUOTOK_TOKEN", raising=False)
    file = tmp_path / "file"
    file.write_text("")
    assert main([option.format(file=file, folder=tmp_path) for option in options]) == 1
    errors = capsys.readouterr().err
    assert told in errors and errors.count("\n") == 1


def test_serve_without_its_packages_says_which_extra_brings_them(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([]) == 1
    assert "uvicorn is missing; in the checkout: pip install '.[serve]'" in capsys.readouterr().err
