"""A stretch composed anew: the rest to the bit as it was, joints like any place, refusals in one line."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from duotok.lm.sheet.columns import CHORD, STYLE
from duotok.recipes.accompany.original import Take, describe_recording, find_original
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.accompany.rank import measure_pulse
from duotok.recipes.accompany.repaint import FADE_SECONDS
from duotok.recipes.accompany.request import Request
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, write_audio
from duotok.tokenizer.common.errors import ConfigError, DuoTokError

SECONDS, STRETCH = 7.02, (2.8, 4.4)
FADE = round(FADE_SECONDS * SAMPLE_RATE_HZ)


@pytest.fixture(scope="module")
def vocal(make_singing) -> torch.Tensor:
    return torch.from_numpy(make_singing(SECONDS).T)


@pytest.fixture(scope="module")
def original(accompanist, vocal, tmp_path_factory):
    return accompanist.accompany(vocal, seed=3, steps=1).save(tmp_path_factory.mktemp("original") / "song")


@pytest.fixture(scope="module")
def repainted(accompanist, vocal, original, tmp_path_factory):
    made = accompanist.repaint(original, STRETCH, vocal, seed=9, steps=1, candidates=3)
    return made.save(tmp_path_factory.mktemp("repainted") / "song")


def read(folder, kind="accompaniment") -> np.ndarray:
    """The samples of a file as they stand in it [samples, 2]."""
    (path,) = folder.glob(f"{kind}.*")
    dtype = "float32" if soundfile.info(path).subtype == "FLOAT" else "int32"
    return soundfile.read(path, dtype=dtype)[0]


def changed(before, after) -> tuple[int, int]:
    """The first and the last sample in which two results differ, in either of their waves."""
    ends = []
    for kind in ("accompaniment", "mix"):
        a, b = read(before, kind), read(after, kind)
        assert a.shape == b.shape
        ends.append(np.flatnonzero((a != b).any(axis=1))[[0, -1]])
    assert np.abs(ends[0] - ends[1]).max() < FADE
    return int(np.min(ends)), int(np.max(ends))


def test_all_but_the_stretch_is_the_same_to_the_bit(original, repainted):
    first, last = changed(original, repainted)
    start, end = (round(time * SAMPLE_RATE_HZ) for time in STRETCH)
    assert start - FADE <= first < start and end - FADE < last < end
    same = np.mean(read(original)[start:end] == read(repainted)[start:end])
    assert same < 0.1
    for number, (before, after) in enumerate(
        zip(*(Take.read(f / "codes.safetensors").codes for f in (original, repainted)), strict=True)
    ):
        assert before == after or 70 <= number < 110


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"format": "wav24"}, {}),
        ({"format": "float", "variations": 2}, {"format": "float", "variations": 2}),
        ({"format": "flac"}, {}),
        ({"tuning": -37.0}, {}),
        ({"intro": 1}, {}),
        ({"accompaniment_db": 9.0}, {}),
    ],
)  # fmt: skip
def test_whatever_the_original_is_like(accompanist, vocal, tmp_path, given, asked):
    accompanist.write(Request(vocal=vocal, seed=3, steps=1, **given), _new(tmp_path / "a"))
    request = Request(vocal=vocal, original=tmp_path / "a", repaint=STRETCH, steps=1, **asked)
    accompanist.write(request, _new(tmp_path / "b"))
    first, last = changed(tmp_path / "a", tmp_path / "b")
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    (told,) = report["repaints"]
    start, end = (round(time * SAMPLE_RATE_HZ) for time in told["seconds"])
    assert told["seconds"] == pytest.approx(STRETCH, abs=0.03)
    assert start - FADE - 1 <= first < start and end - FADE < last <= end
    assert np.abs(read(tmp_path / "b", "mix")).max() < (1 if given.get("format") == "float" else 2**31 - 1)
    original = json.loads((tmp_path / "a" / "report.json").read_text())
    assert told["seed"] != report["original_seed"] == original["seed"]
    if "variations" in given:  # the second one as well
        assert report["variations"][1]["repaints"][0]["ranking"] == report["variations"][1]["ranking"]
        second = accompanist.repaint(tmp_path / "a" / "accompaniment-2.wav", STRETCH, vocal, steps=1)
        kept = soundfile.read(tmp_path / "a" / "accompaniment-2.wav", dtype="float32")[0].T
        assert np.array_equal(second.accompaniment[:, : start - FADE], kept[:, : start - FADE])


def _new(folder):
    folder.mkdir()
    return folder


def test_a_song_and_its_separated_vocal(accompanist, vocal, tmp_path, tiny_separator, tiny_components):
    from duotok.recipes.accompany.bundle import assemble_bundle

    bundle = assemble_bundle(tmp_path / "bundle", name="tiny", separator=tiny_separator, **tiny_components)
    own, song = Accompanist.from_pretrained(bundle), vocal[:, : 3 * SAMPLE_RATE_HZ]
    folder = own.accompany(Request(mix=song, steps=1)).save(tmp_path / "a")
    made = own.accompany(Request(mix=song, original=folder, repaint="1-2", steps=1))
    assert changed(folder, made.save(tmp_path / "b"))[0] >= SAMPLE_RATE_HZ - FADE
    assert np.array_equal(read(folder, "separated-vocal"), read(tmp_path / "b", "separated-vocal"))


def test_the_beginning_and_the_end(accompanist, vocal, original, tmp_path):
    for name, stretch in (("beginning", (0.0, 1.0)), ("end", (6.0, SECONDS)), ("all", (0.0, SECONDS))):
        made = accompanist.repaint(original, stretch, vocal, seed=9, steps=1)
        first, last = changed(original, made.save(tmp_path / name))
        assert first < 10 if stretch[0] == 0 else first >= 6 * SAMPLE_RATE_HZ - FADE
        assert last < SAMPLE_RATE_HZ if name == "beginning" else last > vocal.shape[1] - 4_000
        assert made.accompaniment.shape == (2, vocal.shape[1])
        assert ("joint_bits" in made.report["ranking"]) == (name == "beginning")
        assert float(made.accompaniment[:, -1].abs().max()) == 0


def test_joints_are_like_any_other_place(original, repainted):
    size = 960  # 20 ms

    def measure(folder):
        wave = read(folder).mean(axis=1) / 2**31
        frames = wave[: len(wave) // size * size].reshape(-1, size)
        levels = 10 * np.log10(np.square(frames).mean(axis=1) + 1e-12)
        spectra = np.log(np.abs(np.fft.rfft(frames * np.hanning(size))) + 1e-4)
        jumps = np.abs(np.diff(frames.reshape(-1))[:-1]).reshape(-1, 2).max(axis=1)
        return np.abs(np.diff(levels)), np.clip(np.diff(spectra, axis=0), 0, None).mean(axis=1), jumps

    for usual, found in zip(measure(original), measure(repainted), strict=True):
        rate = len(found) / SECONDS
        largest = usual[round(0.5 * rate) : round(6 * rate)].max()  # of what was composed at once
        for time in STRETCH:
            near = slice(round((time - 0.06) * rate), round((time + 0.02) * rate))
            assert found[near].max() <= 1.2 * largest  # a random band has no steady level


def test_candidates_are_ranked_by_what_follows(accompanist, vocal, original, repainted):
    request = Request(vocal=vocal, original=original, repaint=STRETCH, seed=9, candidates=3)
    sketches = accompanist.compose(request)
    scores = [each.fit.score for each in sketches.ranked]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    best, take = sketches.ranked[0], Take.read(original / "codes.safetensors")
    likely = accompanist.bundle.lm.judge(
        take.vocal_codes[:160], best.codes[None, :160], first=110, sheet=best.sheet[:160]
    )
    assert best.fit.joint_bits == pytest.approx(float(likely) / np.log(2), abs=1e-4)
    beats = np.array(json.loads((original / "report.json").read_text())["beats_seconds"])
    assert best.fit.pulse_bits == measure_pulse(best.told.mel[0], beats) is not None
    worse = replace(best.fit, joint_bits=best.fit.joint_bits - 1)
    assert worse.score < best.fit.score
    assert torch.equal(best.codes, Take.read(repainted / "codes.safetensors").codes)


def test_wishes_hold_for_the_stretch_only(accompanist, vocal, original):
    chart = [(0.0, 3.4, "D:min7"), (3.4, 9.0, "N")]
    made = accompanist.repaint(
        original, STRETCH, vocal, steps=1, chords=chart, style="waltz", without=("drums",)
    )  # fmt: skip
    before, after = Take.read(original / "codes.safetensors").sheet, made.take.sheet
    assert before is not None and after is not None
    assert torch.equal(before[:70], after[:70]) and torch.equal(before[110:], after[110:])
    assert after[70:85, CHORD].unique().tolist() == [14] and len(after[70:110, STYLE].unique()) == 1
    rows = made.report["lead_sheet"]["chords"]
    assert [row for row in rows if row[0] < 4.4 and row[1] > 2.8][:2] != rows[:2]
    assert any(row[0] <= 2.8 and row[1] == 3.4 and row[2] == "D:min" for row in rows)
    assert all(first[1] == second[0] for first, second in zip(rows[:-1], rows[1:], strict=True))
    levels = [row for row in made.report["band"]["levels"] if row[0] >= 2.8 and row[1] <= 4.4]
    assert levels and all(row[2]["drums"] == "out" for row in levels)
    silent = made.accompaniment[:, round(3.6 * SAMPLE_RATE_HZ) : round(4.2 * SAMPLE_RATE_HZ)]
    assert not silent.any()  # "N" is kept
    assert made.report["repaints"][0]["style"] == "waltz"


def test_again_and_with_a_score(accompanist, vocal, repainted, tmp_path):
    fields = {"steps": 1, "export": ("midi", "lab", "click")}
    made = accompanist.repaint(repainted, (5.0, 6.0), vocal, **fields)
    made.save(tmp_path / "out")
    assert len(made.report["repaints"]) == 2 and made.report["original_seed"] == 3
    assert changed(repainted, tmp_path / "out")[0] >= 5 * SAMPLE_RATE_HZ - FADE
    assert {"song.mid", "chords.lab", "click.wav"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_only_the_window_is_composed_and_rendered(accompanist, make_singing, tmp_path, monkeypatch):
    vocal = torch.from_numpy(make_singing(35.0).T)
    folder = accompanist.accompany(vocal, seed=3, steps=1).save(tmp_path / "a")
    bundle, seen = accompanist.bundle, []
    for part, name in (
        (bundle.lm, "compose"),
        (bundle.renderer, "render_latents"),
        (bundle.renderer.vae, "encode_song"),
    ):
        real = getattr(part, name)

        def spy(given, *rest, real=real, **options):
            seen.append(given.shape)
            return real(given, *rest, **options)

        monkeypatch.setattr(part, name, spy)
    request = Request(vocal=vocal, original=folder, repaint=(32.0, 33.0), steps=1, candidates=1)
    sketches = accompanist.compose(request)
    begin, told = sketches.low / sketches.rate_hz, json.loads((folder / "report.json").read_text())
    beats = [at for at in told["beats_seconds"] if at >= begin > 0]
    assert (sketches.beats_seconds + begin).tolist() == pytest.approx(beats) and len(beats) > 4
    made = accompanist.perform(sketches, sketches.ranked[0])
    composed, encoded, rendered = seen
    assert composed[0] <= 750 and rendered[0] <= 25 + 150 and encoded[1] <= 1_920 * 185
    first, last = changed(folder, made.save(tmp_path / "b"))
    assert first >= 32 * SAMPLE_RATE_HZ - FADE and last < 33 * SAMPLE_RATE_HZ


@pytest.mark.parametrize(
    ("stretch", "fields", "told"),
    [
        ("2-1", {}, "end after that"),
        ((1.0, 1.2), {}, "0.5 s or longer"),
        ("-1-2", {}, "repaint must be START-END"),
        ("bridge", {}, "repaint must be START-END"),
        ((float("nan"), 2.0), {}, "repaint must begin"),
        ((6.0, 9.0), {}, "outside of .*7.02 s"),
        ((8.0, 9.0), {}, "outside of"),
        ((1.0, 2.0), {"tempo_bpm": 90.0, "intro": 1}, "leave out --intro, --tempo"),
        ((1.0, 2.0), {"tuning": "off"}, "leave out --tuning"),
        ((1.0, 2.0), {"format": "flac"}, "of the format wav; leave out --format"),
        ((1.0, 2.0), {"style": "polka"}, "style must be one of"),
        ((1.0, 2.0), {"chords": [(4.0, 5.0, "C")]}, "no chord of the chart is in the stretch"),
        ((1.0, 2.0), {"original": None}, "give both"),
        ((1.0, 2.0), {"original": "nowhere"}, "nowhere is no result of generate"),
    ],
)
def test_what_cannot_be_repainted_is_one_line(accompanist, vocal, original, stretch, fields, told):
    with pytest.raises(DuoTokError, match=told) as caught:
        accompanist.accompany(Request(vocal=vocal, **{"original": original, "repaint": stretch, **fields}))
    assert "\n" not in str(caught.value)


def test_another_recording_model_or_folder_is_one_line(accompanist, vocal, original, tmp_path, make_singing):
    def refuse(told, source, given=vocal, stretch=(4.0, 5.0)):
        with pytest.raises(DuoTokError, match=told) as caught:
            accompanist.repaint(source, stretch, given, steps=1)
        assert "\n" not in str(caught.value)

    other = torch.from_numpy(make_singing(SECONDS, seed=1).T).flip(-1)
    refuse("another recording, a wave of 7.020 s", original, other)
    refuse("this one has 7.000 s", original, vocal[:, : 7 * SAMPLE_RATE_HZ])
    for name, edit in (
        ("older", lambda folder: (folder / "codes.safetensors").unlink()),
        ("damaged", lambda folder: (folder / "codes.safetensors").write_bytes(b"{")),
        ("model", lambda folder: _edit(folder, model={"name": "big", "fingerprint": "x"})),
        ("prefix", lambda folder: _edit(folder, prefix_seconds=4.5)),
        ("lost", lambda folder: (folder / "mix.wav").unlink()),
        ("cut", lambda folder: write_audio(folder / "mix.wav", torch.zeros(2, 48_000))),
        ("foreign", lambda folder: _edit(folder, made_by="somebody")),
    ):
        shutil.copytree(original, tmp_path / name)
        edit(tmp_path / name)
        told = {
            "older": "older version", "damaged": "is damaged", "model": r"another model \(big\)",
            "prefix": "4.5 s of .* by --prefix; repaint from 4.62 s on", "lost": "has lost its mix",
            "cut": "do not belong together", "foreign": "no result of generate",
        }[name]  # fmt: skip
        refuse(told, tmp_path / name)
    mp3 = accompanist.accompany(vocal, steps=1, format="mp3").save(tmp_path / "mp3")
    refuse("holds an MP3", mp3)


def _edit(folder, **changes):
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, **changes}))


def test_a_recording_is_known_again_by_what_other_decoders_make_of_it(original, vocal):
    found = find_original(original).read()
    noise = 1e-4 * torch.randn(2, vocal.shape[1], generator=torch.Generator().manual_seed(0))
    found.require_recording(vocal + noise)
    assert describe_recording(vocal)["samples"] == vocal.shape[1]
    with pytest.raises(ConfigError, match="another recording"):
        found.require_recording(0.8 * vocal)
