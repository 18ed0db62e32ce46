import numpy as np
import pytest
import torch

from duotok.lm.sheet.columns import write_sheet
from duotok.lm.sheet.plan import SongPlan
from duotok.lm.sheet.timeline import TimeLine, places_between
from duotok.recipes.accompany.hearing import describe_music
from duotok.recipes.accompany.mix import mix_down
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.chroma import (
    active_segments,
    at_chroma_rate,
    average_blocks,
    correlate_chroma,
    estimate_activity,
    measure_chroma,
)
from duotok.tokenizer.music.harmony import (
    HarmonyReader,
    HarmonyReaderConfig,
    Key,
    default_reader,
    estimate_chords,
    estimate_key,
    read_key,
    surroundings,
)
from duotok.tokenizer.music.labels import CHORD_NAMES, NO_CHORD
from duotok.tokenizer.music.pitch import PITCH_RATE_HZ, Coherence, measure_coherence, sung_pitch
from duotok.tokenizer.music.tempo import estimate_tempo, onset_envelope, track_beats
from duotok.tokenizer.spectra import Chroma

TRIADS = {"maj": (0, 4, 7), "min": (0, 3, 7)}


def tone(frequency_hz: float, seconds: float) -> torch.Tensor:
    times = torch.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    wave = sum(torch.sin(2 * torch.pi * k * frequency_hz * times) / k for k in range(1, 6))
    return (0.1 * wave)[None].repeat(2, 1)


def triad(root: int, mode: str) -> np.ndarray:
    chroma = np.full(12, 0.1)
    chroma[[(root + step) % 12 for step in TRIADS[mode]]] = 1.0
    return chroma


@pytest.mark.parametrize(
    ("tonic", "mode", "name"), [(0, "maj", "C:maj"), (9, "min", "A:min"), (6, "maj", "F#:maj")]
)
def test_key_of_its_own_scale_and_tonic_triad(tonic, mode, name):
    key = Key(tonic=tonic, mode=mode)
    chroma = np.array([float(pitch in key.scale) for pitch in range(12)]) + triad(tonic, mode)
    assert str(estimate_key(chroma)) == name


def test_no_key_without_pitch():
    assert estimate_key(np.ones((10, 12))) is None
    assert estimate_key(np.zeros((10, 12))) is None


def test_chords_follow_the_changes():
    rng = np.random.default_rng(0)
    wanted = [(0, "maj"), (9, "min"), (5, "maj"), (7, "maj")]
    chroma = np.concatenate([np.tile(triad(*chord), (100, 1)) for chord in wanted])
    chroma = np.clip(chroma + rng.normal(scale=0.25, size=chroma.shape), 0, None)
    chords = estimate_chords(chroma, 50.0)
    assert [name for _, _, name in chords] == ["C:maj", "A:min", "F:maj", "G:maj"]
    assert [start for start, _, _ in chords] == pytest.approx([0, 2, 4, 6], abs=0.2)
    assert chords[-1][1] == 8.0


def test_chords_cover_everything_and_silence_has_none():
    assert estimate_chords(np.zeros((123, 12)), 50.0) == [(0.0, 2.46, "N")]
    assert estimate_chords(np.zeros((0, 12)), 50.0) == []


def test_there_is_no_chord_where_nothing_sounds():
    chroma = np.tile(triad(2, "min"), (200, 1))
    sounding = np.arange(200) < 100
    assert estimate_chords(chroma, 50.0, sounding=sounding) == [(0.0, 2.0, "D:min"), (2.0, 4.0, "N")]


@pytest.mark.parametrize("mode", ["maj", "min"])
def test_every_triad_is_read(mode):
    chords = [estimate_chords(np.tile(triad(root, mode), (100, 1)), 50.0) for root in range(12)]
    names = [name for name in CHORD_NAMES if name.endswith(mode)]
    assert [[name for _, _, name in segments] for segments in chords] == [[name] for name in names]


def test_flat_chroma_has_no_chord():
    rng = np.random.default_rng(0)
    chroma = np.clip(0.4 + 0.02 * rng.normal(size=(200, 12)), 0, 1)
    assert [name for _, _, name in estimate_chords(chroma, 50.0)] == ["N"]


def test_the_reader_hears_a_transposed_song_transposed():
    reader = default_reader()
    blocks = torch.rand(40, 12, generator=torch.Generator().manual_seed(0))
    turned = torch.cat([torch.arange(12).roll(3), 12 + torch.arange(12).roll(3), torch.tensor([24])])
    assert torch.allclose(reader.judge(blocks.roll(3, dims=1)), reader.judge(blocks)[:, turned], atol=1e-5)
    for track in ("vocal", "accompaniment"):
        here, there = (
            reader.key_logits(reader.key_evidence(b, track)[None], track)
            for b in (blocks, blocks.roll(3, dims=1))
        )
        assert torch.allclose(there, here[:, turned[:-1]], atol=1e-4)


def test_the_reader_in_chunks_is_the_reader_of_one_pass():
    reader = HarmonyReader(HarmonyReaderConfig(hidden_dim=4))
    blocks = torch.rand(5_000, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(reader.judge(blocks), reader(surroundings(blocks)), atol=1e-5)
    assert reader.judge(blocks[:0]).shape == (0, 25)


def test_surroundings_are_means_of_neighbours():
    blocks = torch.arange(30.0)[:, None].repeat(1, 12)
    found = surroundings(blocks)[..., 0]
    assert found[15].tolist() == [5.5, 10, 12.5, 14, 15, 16, 17.5, 20, 24.5]
    assert found[0].tolist()[:5] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("track", ["vocal", "accompaniment"])
@pytest.mark.parametrize(("tonic", "mode"), [(0, "maj"), (4, "maj"), (9, "min"), (1, "min")])
def test_key_of_a_cadence(track, tonic, mode):
    fourth, fifth = (tonic + 5) % 12, (tonic + 7) % 12
    bars = [triad(root, mode) for root in (tonic, fourth, fifth, tonic)]
    if mode == "min":
        bars[2] = triad(fifth, "maj")
    key = read_key(np.repeat(np.stack(bars), 100, axis=0), 50.0, track)
    assert key is not None and key.probability is not None and 1 / 24 < key.probability <= 1
    relative = ((tonic + 9) % 12, "min") if mode == "maj" else ((tonic + 3) % 12, "maj")
    assert (key.tonic, key.mode) in ((tonic, mode), relative)


def test_only_what_sounds_has_a_key():
    chroma = np.concatenate([np.tile(triad(0, "maj"), (300, 1)), np.tile(triad(6, "maj"), (300, 1))])
    first = np.arange(600) < 300
    whole = [read_key(chroma, 50.0, "vocal", sounding=part) for part in (first, ~first)]
    assert whole == [read_key(part, 50.0, "vocal") for part in (chroma[:300], chroma[300:])]
    assert read_key(chroma, 50.0, "vocal", sounding=np.zeros(600, dtype=bool)) is None
    assert read_key(np.zeros((50, 12)), 50.0, "vocal") is None
    assert read_key(np.zeros((0, 12)), 50.0, "vocal") is None


def test_blocks_are_means_and_the_last_may_be_short():
    assert average_blocks(np.arange(12.0), 50.0).tolist() == [2, 7, 10.5]
    assert average_blocks(np.ones((3, 12)), 7.0).shape == (3, 12)


def test_activity_follows_the_level():
    loud, quiet = torch.full((40, 8), -1.6), torch.full((40, 8), -3.0)
    active = estimate_activity(torch.cat([quiet, loud, quiet]))
    assert active.tolist() == [False] * 10 + [True] * 10 + [False] * 10
    assert at_chroma_rate(active).sum() == 20


def test_segments_close_short_gaps_and_keep_long_ones():
    active = np.ones(100, dtype=bool)
    active[20:25] = active[50:60] = False  # 0.2 s and 0.4 s
    assert active_segments(active) == [(0.0, 2.0), (2.4, 4.0)]
    assert active_segments(np.zeros(10, dtype=bool)) == active_segments(np.zeros(0, dtype=bool)) == []


@pytest.mark.parametrize("tempo_bpm", [72.0, 96.5, 120.0, 141.0])
def test_tempo_and_beats_of_a_drum_pattern(tempo_bpm):
    rng = np.random.default_rng(1)
    beats = np.arange(0.3, 20.0, 60 / tempo_bpm)
    wave = np.zeros(20 * SAMPLE_RATE_HZ)
    for offset, level in ((0.0, 1.0), (30 / tempo_bpm, 0.2)):
        for beat in beats + offset:
            start = round(beat * SAMPLE_RATE_HZ)
            hit = rng.normal(size=3000) * np.exp(-np.arange(3000) / 500) * level
            wave[start : start + 3000] += hit[: len(wave[start : start + 3000])]
    envelope = onset_envelope(torch.from_numpy(0.2 * wave).float()[None])
    tempo = estimate_tempo(envelope)
    assert tempo == pytest.approx(tempo_bpm, rel=0.01)
    found = track_beats(envelope, tempo)
    near = [np.abs(found - beat).min() < 0.04 for beat in beats[1:-1]]
    assert np.mean(near) > 0.95
    assert len(found) < len(beats) + 3


def test_silence_has_no_tempo():
    assert estimate_tempo(onset_envelope(torch.zeros(2, 4 * SAMPLE_RATE_HZ))) is None


@pytest.mark.parametrize("pitch", [40, 57, 69, 80])
def test_sung_pitch(pitch):
    found = sung_pitch(tone(440 * 2 ** ((pitch - 69) / 12), 1.5))
    assert len(found) == 1.5 * PITCH_RATE_HZ
    assert np.isfinite(found).mean() > 0.9
    assert np.nanmax(np.abs(found[3:-5] - pitch)) < 0.3


def test_noise_and_silence_are_not_sung():
    noise = 0.1 * torch.randn(2, SAMPLE_RATE_HZ, generator=torch.Generator().manual_seed(0))
    assert np.isfinite(sung_pitch(noise)).mean() < 0.05
    assert np.isnan(sung_pitch(torch.zeros(2, SAMPLE_RATE_HZ))).all()


def test_chroma_in_chunks_is_the_chroma_of_one_pass():
    wave = 0.1 * torch.randn(2, 12 * SAMPLE_RATE_HZ + 100, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(wave.mean(dim=0), (0, -wave.shape[1] % 960))[None]
    assert np.allclose(measure_chroma(wave), Chroma()(padded)[0].numpy(), atol=1e-5)


def test_coherence_tells_the_right_key_from_a_wrong_one():
    pitches = np.tile([60.0, 64.0, 67.0, np.nan, 65.0], 40)
    right = np.tile(triad(0, "maj") + 0.5 * triad(5, "maj"), (200, 1))
    good, bad = measure_coherence(right, pitches), measure_coherence(np.roll(right, 6, axis=1), pitches)
    assert good.in_key == 1.0
    assert good.harmony > 1.5 > bad.harmony
    assert good.score > bad.score + 0.5


def test_coherence_without_singing():
    assert measure_coherence(np.ones((50, 12)), np.full(50, np.nan)) == Coherence(harmony=None, in_key=None)
    assert Coherence(harmony=None, in_key=None).score == 0.0


def test_chroma_correlation():
    chroma = np.random.default_rng(0).uniform(size=(50, 12))
    assert correlate_chroma(chroma, 2 * chroma + 1) == pytest.approx(1.0)
    assert correlate_chroma(chroma, np.ones((50, 12))) is None


def test_the_report_tells_what_sounds():
    vocal, band, pitches = tone(440.0, 2.0), tone(220.0, 2.0), np.full(100, 69.0)
    chroma = torch.from_numpy(np.tile(triad(9, "min"), (100, 1)))[None]
    silence, sound = torch.full((1, 200, 16), -4.0), torch.full((1, 200, 16), -1.0)
    half = torch.cat([sound[:, :100], silence[:, :100]], dim=1)
    mixdown = mix_down(vocal, band, accompaniment_db=0.0)
    read_outs = {"vocal": ReadOut(silence, chroma), "accompaniment": ReadOut(half, chroma)}
    told = describe_music(vocal=vocal, mixdown=mixdown, read_outs=read_outs, pitches=pitches)
    assert told["chords"] == [[0.0, 1.0, "A:min"], [1.0, 2.0, "N"]]
    assert told["vocal_key"] is None and told["vocal_key_probability"] is None
    assert told["activity"]["vocal"] == {"share": 0.0, "segments_seconds": []}
    assert told["activity"]["accompaniment"] == {"share": 0.5, "segments_seconds": [[0.0, 1.0]]}
    read_outs = dict.fromkeys(read_outs, ReadOut(sound, chroma))
    told = describe_music(vocal=vocal, mixdown=mixdown, read_outs=read_outs, pitches=pitches)
    assert told["chords"] == [[0.0, 2.0, "A:min"]]
    assert told["vocal_key"] is not None and 0 < told["vocal_key_probability"] <= 1


def test_tempo_beats_rests_and_spelling_follow_the_lead_sheet():
    vocal, band = tone(440.0, 6.0), tone(220.0, 6.0)
    chroma = torch.from_numpy(np.tile(triad(3, "maj"), (300, 1)))[None]
    read_outs = dict.fromkeys(("vocal", "accompaniment"), ReadOut(torch.full((1, 600, 16), -1.0), chroma))
    mixdown = mix_down(vocal, band, accompaniment_db=0.0)
    places, chords = places_between(np.arange(0, 151, 50.0), 150), np.full(150, 3)
    chords[100:] = NO_CHORD
    plan = SongPlan(
        sheet=write_sheet(places, chords),
        again=torch.full((150,), -1),
        time_line=TimeLine(beats=np.arange(-12.5, 170, 12.5), numbers=np.arange(3, 18) % 4, rate_hz=25.0),
        keys=[(0, 150, 3)],
        sections=[],
        other_tempo=None,
        two_tempi=None,
        has_singer=True,
    )
    pitches = np.full(300, 69.0)
    told = describe_music(vocal=vocal, mixdown=mixdown, read_outs=read_outs, pitches=pitches, plan=plan)
    assert told["tempo_bpm"] == told["lead_sheet"]["tempo_bpm"] == 120
    assert told["beats_seconds"] == [0.5 * beat for beat in range(12)]
    assert set(told["lead_sheet"]["bar_lines_seconds"]) <= {*told["beats_seconds"], 6.0}
    assert told["chords"] == [[0.0, 4.0, "Eb:maj"], [4.0, 6.0, "N"]]
    assert told["lead_sheet"]["chords"] == told["chords"]
    assert told["lead_sheet"]["keys"] == [[0.0, 6.0, "Eb:maj"]]
    assert told["activity"]["accompaniment"]["segments_seconds"] == [[0.0, 4.0]]
