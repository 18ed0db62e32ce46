"""What sheet readers and language models learn sheets from."""

from dataclasses import replace
from pathlib import Path

import mido
import numpy as np
import pytest
import torch

from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import LMObjective
from duotok.lm.sheet.columns import (
    BASS,
    CHORD,
    CHORD_TRUST,
    COLUMNS,
    DRUMS,
    HARMONY,
    METER,
    METERS,
    PLACE,
    PLACE_TRUST,
    PLACES,
    STYLE,
    TEMPO,
    UNKNOWN,
    WRITTEN,
    write_sheet,
)
from duotok.lm.sheet.playing import LEVELS, tempo_class
from duotok.lm.sheet.reader import SheetReader, SheetReaderConfig
from duotok.recipes.corpus.manifest import Item, read_manifest, write_manifest
from duotok.recipes.corpus.scores.song import Note, Song, Songs, Span
from duotok.recipes.lm import train_sheet_reader as recipe
from duotok.recipes.lm.data import DataConfig, WindowSource
from duotok.recipes.lm.score_singing import CodeSinger, ScoreWindows
from duotok.recipes.lm.sheets import (
    SheetConfig,
    SheetLabels,
    SheetSource,
    find_levels,
    label_frames,
    label_playing,
    measure_agreement,
)
from duotok.recipes.lm.tokenize import main as tokenize
from duotok.recipes.lm.tokens import TokenIndex, TokenShards, append_shard
from duotok.recipes.lm.train_sheet_reader import SheetDataConfig, SheetObjective, SheetWindows
from duotok.recipes.training.loop import run_training
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def item(tiny_corpus: Path) -> Item:
    """Four seconds: bars of 1 s and 2 s from 0.5 s on, and three chords."""
    return replace(
        read_manifest(tiny_corpus / "train.jsonl")[0],
        id="item0",
        seconds=4.0,
        downbeats_seconds=[0.5, 1.5, 3.5],
        chords=[(0.0, 1.0, "C:maj"), (1.0, 2.0, "A:min7"), (2.0, 3.0, "N"), (3.0, 4.0, "C:sus4")],
    )


@pytest.fixture
def labels(tmp_path: Path, shards: TokenShards, item: Item) -> SheetLabels:
    write_manifest(tmp_path / "some.jsonl", [item])
    return SheetLabels.of_tokens(tmp_path / "some.jsonl", shards)


@pytest.fixture
def shards(tmp_path: Path, make_shards) -> TokenShards:
    return make_shards(tmp_path / "tokens")


def make_reader() -> SheetReader:
    torch.manual_seed(0)
    reader = SheetReader(
        SheetReaderConfig(vocal_codes=11, code_dim=4, dim=24, dilations=(1, 2, 4), dropout=0.0)
    )
    reader.vectors[:-1] = torch.randn(11, 4)
    return reader


def test_places_and_chords_follow_the_score(item: Item) -> None:
    sheet = label_frames(item, 32.0)  # two frames per place in the bar of 1 s, four in that of 2 s
    place, chord = sheet[:, PLACE], sheet[:, CHORD]
    assert sheet.shape == (128, COLUMNS)
    assert place[:16].eq(UNKNOWN).all() and place[112:].eq(UNKNOWN).all()
    assert place[16:48].tolist() == sorted([*range(PLACES)] * 2)
    assert place[48:112].tolist() == sorted([*range(PLACES)] * 4)
    assert chord.tolist() == [0] * 32 + [12 + 9] * 32 + [24] * 32 + [UNKNOWN] * 32


def test_labels_are_cut_as_codes_are(labels: SheetLabels, item: Item) -> None:
    whole = label_playing(label_frames(item, 25.0), item, 25.0, ())
    for start, frames in ((0, 30), (13, 20)):
        assert torch.equal(labels.cut("item0", start, frames), whole[start : start + frames])
    beyond = labels.cut("item0", 90, 20)
    assert beyond.shape == (20, COLUMNS) and beyond[10:].eq(UNKNOWN).all()
    assert labels.cut("item1", 0, 10).eq(UNKNOWN).all()  # not in the manifest


def test_levels_tell_what_each_stem_plays() -> None:
    lines = np.array([0.0, 2.0, 4.0, 6.0, 8.0])
    beat = [[0.5 * step, 0.5 * step + 0.1, 38, 90] for step in range(8)]  # four strokes in each of two bars
    band = {
        "drums": [[0, True, beat + [[4.0 + 0.1 * step, 4.1, 42, 60] for step in range(20)]]],
        "bass": [[33, False, [[-0.01, 1.9, 30, 90], [4.0, 5.9, 30, 90], [5.0, 5.9, 31, 90]]]],
        "other": [[0, False, [[2.01, 6.5, pitch, 70] for pitch in (60, 64, 67)]]],
    }
    found = {stem: [LEVELS[level] for level in each] for stem, each in find_levels(band, lines, 4).items()}
    assert found == {
        "drums": ["light", "light", "full", "out"],
        "bass": ["held", "out", "light", "out"],
        "chords": ["out", "held", "held", "held"],  # what was struck before rings on
    }


def test_what_the_band_plays_is_written_beside_the_score(item: Item) -> None:
    strokes = [(0.5 + 0.1 * step, 0.6 + 0.1 * step, 38, 90) for step in range(10)]
    played = replace(
        item, style="bossa", tempo_bpm=90.0, beats_per_bar=3, band={"drums": [[0, True, strokes]]}
    )
    sheet = label_playing(label_frames(played, 25.0), played, 25.0, ("ballad", "bossa"))
    assert torch.equal(sheet[:, :METER], label_frames(item, 25.0)[:, :METER])
    assert set(sheet[:, METER].tolist()) == {1} and set(sheet[:, STYLE].tolist()) == {1}
    assert set(sheet[:, TEMPO].tolist()) == {tempo_class(90.0)}
    assert sheet[:12, DRUMS].eq(UNKNOWN).all() and sheet[14:36, DRUMS].eq(LEVELS.index("full")).all()
    unknown = label_playing(
        label_frames(item, 25.0), replace(played, style="polka", band={}), 25.0, ("bossa",)
    )
    assert unknown[:, [STYLE, DRUMS, BASS, HARMONY]].eq(UNKNOWN).all()


def test_a_manifest_of_other_items_is_refused(tmp_path: Path, shards: TokenShards, item: Item) -> None:
    write_manifest(tmp_path / "other.jsonl", [replace(item, id="nothing")])
    with pytest.raises(DataError, match=r"no item of .*other\.jsonl is in .*tokens"):
        SheetLabels.of_tokens(tmp_path / "other.jsonl", shards)


def test_windows_keep_codes_and_sheets_together(shards: TokenShards, labels: SheetLabels) -> None:
    songs = [song for song in shards.index.songs if song.id == "item0"]
    codes, sheet = shards.codes(songs[0])["vocal"], labels.cut("item0", 0, songs[0].frames)
    plain = SheetDataConfig(
        tokens="", manifest="", seconds=((0.8, 1.0), (0.4, 1.0)), stretch=0.0, hidden=0.0, confused=0.0
    )
    source = SheetWindows(shards, labels, songs, plain, 3, make_reader())
    shapes = set()
    for seed in range(8):
        batch = source.make_batch(np.random.default_rng(seed))
        shapes.add(tuple(batch["codes"].shape))
        frames = batch["codes"].shape[1]
        for row, notes in zip(batch["codes"], batch["sheet"], strict=True):
            starts = [
                n for n in range(len(codes) - frames + 1) if torch.equal(codes[n : n + frames].long(), row)
            ]
            assert any(torch.equal(sheet[n : n + frames], notes) for n in starts)
    assert shapes == {(3, 20), (6, 10)}


def test_windows_are_stretched_and_hidden_in_part(shards: TokenShards, labels: SheetLabels) -> None:
    songs = [song for song in shards.index.songs if song.id == "item0"]
    config = SheetDataConfig(
        tokens="", manifest="", seconds=((1.2, 1.0),), stretch=0.5, hidden=1.0, confused=0.0
    )
    batch = SheetWindows(shards, labels, songs, config, 64, make_reader()).make_batch(
        np.random.default_rng(0)
    )
    share = (batch["codes"] == 11).float().mean(dim=1)
    assert 0.1 < share.mean() < 0.45 and share.max() > share.min()
    # The faster, the further the window reaches; behind the end of the item nothing is known.
    reached = batch["sheet"][..., PLACE].max(dim=1).values
    assert reached.unique().numel() > 2
    assert (batch["sheet"][:, -1] == UNKNOWN).all(dim=1).any()


def test_scores_are_sung_by_codes_of_notes_that_were_sung_so(tmp_path: Path, make_shards, item: Item) -> None:
    index = TokenIndex(
        tokenizer_fingerprint="x", codebook_sizes={"vocal": 99, "accompaniment": 99}, frame_rate_hz=25.0
    )
    notes = [(0.4, 1.2, 60, "a"), (1.2, 2.0, 62, "a"), (2.4, 3.6, 64, "a")]
    codes = torch.zeros(100, dtype=torch.long)
    for start, end, pitch, _ in notes:
        codes[round(start * 25) : round(end * 25)] = pitch
    append_shard(
        tmp_path / "sung", index, {"item0": ("1", "train", {"vocal": codes, "accompaniment": codes})}
    )
    shards = TokenShards(tmp_path / "sung")
    singer = CodeSinger(shards, {"item0": replace(item, notes=notes)}, shards.index.songs)
    rng = np.random.default_rng(0)
    heard = {
        tuple(singer.sing(np.array([[3.2, 8, 60], [8, 20, 63], [20, 30, 64]]), 40, rng)) for _ in range(40)
    }
    wanted = [0] * 3 + [60] * 5 + [0] * 12 + [64] * 10 + [0] * 10
    assert heard == {tuple(wanted)}  # of a pitch that nobody sang: a rest
    assert singer.sing(np.zeros((0, 3)), 40, rng).tolist() == [0] * 40


def test_windows_of_scores_are_in_any_key_and_their_own_meter(
    tmp_path: Path, shards: TokenShards, item: Item
) -> None:
    class Waltzes(Songs):
        source = "pop909"

        def split_of(self, name: str) -> str:
            return "train" if name != "test" else "test"

        def read(self, name: str) -> Song:
            assert name != "test"
            if name == "empty":
                raise DataError("nothing to sing")
            beats = tuple(0.5 * n for n in range(60))
            return Song(
                name=name,
                beats_per_bar=3,
                melody=tuple(Note(start=beat, end=beat + 0.5, pitch=60, velocity=9) for beat in beats),
                piano=(),
                beats=beats,
                downbeats=tuple(range(0, 60, 3)),
                chords=(Span(start=0.0, end=30.0, label="C:maj"),),
                keys=(),
            )

    singer = CodeSinger(shards, {"item0": replace(item, notes=[(0.4, 1.0, 60, "a")])}, shards.index.songs)
    windows = ScoreWindows(Waltzes(tmp_path, ["waltz", "empty", "test"]), singer, 25.0)
    keys = set()
    for seed in range(100):
        codes, sheet = windows.draw(np.random.default_rng(seed), 200, 0.1)
        assert codes.shape == (200,) and sheet.shape == (200, COLUMNS)
        assert set(sheet[:, METER]) == {METERS.index(3)}
        bars = np.flatnonzero(np.diff(sheet[:, PLACE]) < 0)
        assert np.diff(bars).min() >= 34 and np.diff(bars).max() <= 42  # 1.5 s, by a tenth more or less
        keys |= set(sheet[:, CHORD])
    assert len(keys - {UNKNOWN}) == 12
    with pytest.raises(DataError, match="holds no song that can be sung"):
        ScoreWindows(Waltzes(tmp_path, ["empty"]), singer, 25.0).draw(np.random.default_rng(0), 200, 0.1)


def test_the_meter_is_learned_where_it_is_known() -> None:
    reader = make_reader().learn_meters((3, 4))
    codes = torch.randint(0, 11, (2, 32))
    sheet = torch.stack([write_sheet(np.arange(32) // 2, np.zeros(32, dtype=int))] * 2)
    told = reader(codes)["place"].detach()

    def nats(meter: int) -> float:
        sheet[..., METER] = meter
        return float(SheetObjective(reader)(codes, sheet)["place_nats"].detach())

    at = told[:, torch.arange(32), :, torch.arange(32) // 2].transpose(0, 1)  # [batch, frames, METERS]
    assert nats(METERS.index(3)) == pytest.approx(-float(at[..., METERS.index(3)].mean()))
    assert nats(UNKNOWN) == pytest.approx(-float(at.logsumexp(dim=-1).mean()))
    assert nats(METERS.index(6)) == 0.0  # is not learned


def test_the_reader_learns_what_codes_tell(tmp_path: Path) -> None:
    reader = make_reader()

    def make_batch(rng: np.random.Generator) -> dict[str, torch.Tensor]:
        places = (torch.arange(64) + torch.from_numpy(rng.integers(64, size=(8, 1)))) % PLACES
        return {
            "codes": (places // 2).clone(),
            "sheet": torch.stack([write_sheet(row.numpy(), np.full(64, UNKNOWN)) for row in places]),
        }

    objective = SheetObjective(reader)
    config = TrainConfig(steps=60, learning_rate=1e-2, warmup_steps=5, log_every=10)
    losses = run_training(Task(objective, make_batch, reader.save_pretrained), config, tmp_path / "run")
    assert losses["place_nats"] < 1.5 and losses["place_accuracy"] > 0.3  # 2.77 and 0.06 by guessing
    assert losses["chord_nats"] == 0
    back = SheetReader.from_pretrained(tmp_path / "run" / "final")
    codes = make_batch(np.random.default_rng(5))["codes"][:1]
    assert torch.allclose(back(codes)["place"], reader.eval()(codes)["place"], atol=1e-5)


def test_agreement_counts_known_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make_reader()
    found = torch.tensor([[[0, 3], [15, 3], [8, 24], [5, 1]]])
    monkeypatch.setattr(reader, "read", lambda codes: found)
    written = torch.tensor([[1, 3], [0, 4], [10, UNKNOWN], [UNKNOWN, 1]])
    figures = measure_agreement(reader, [(torch.zeros(4), written)])
    assert figures == {"bar_agreement": pytest.approx(2 / 3), "chord_agreement": pytest.approx(2 / 3)}


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A folder with one song for training, as POP909 has them."""
    folder = tmp_path / "pop909" / "001"
    folder.mkdir(parents=True)
    track = mido.MidiTrack([mido.MetaMessage("track_name", name="MELODY")])
    for pitch in (60, 62, 64, 65) * 4:
        track.append(mido.Message("note_on", note=pitch, velocity=90))
        track.append(mido.Message("note_off", note=pitch, time=480))
    midi = mido.MidiFile(ticks_per_beat=480)
    midi.tracks.append(track)
    midi.save(folder / "001.mid")
    beats = [f"{beat / 2} {float(beat % 2 == 0)} {float(beat % 4 == 0)}" for beat in range(16)]
    (folder / "beat_midi.txt").write_text("\n".join(beats), encoding="utf-8")
    (folder / "chord_midi.txt").write_text("0.0 8.0 C:maj\n", encoding="utf-8")
    (folder / "key_audio.txt").write_text("0.0 8.0 C:maj\n", encoding="utf-8")
    return folder.parent


def test_the_recipe_trains_from_a_corpus_and_scores(
    tmp_path: Path, tiny_corpus: Path, tiny_components, scores: Path
) -> None:
    tokens = tmp_path / "tokens"
    manifest = str(tiny_corpus / "train.jsonl")
    arguments = ["--tokenizer", str(tiny_components["tokenizer"]), "--manifest", manifest]
    assert tokenize([*arguments, "--out", str(tokens)]) == 0
    (tmp_path / "tiny.yaml").write_text(
        f"tokenizer: {tiny_components['tokenizer']}\n"
        f"data: {{tokens: {tokens}, manifest: {manifest}, seconds: [[2.0, 1]], hold_out: 0.5}}\n"
        "model: {dim: 8, dilations: [1, 2]}\ntrain: {steps: 4, batch_size: 2, validate_every: 2}\n",
        encoding="utf-8",
    )
    run = ["--out", str(tmp_path / "run")]
    assert recipe.main([str(tmp_path / "tiny.yaml"), *run]) == 0
    assert "validation/chord_agreement" in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8")
    reader = SheetReader.from_pretrained(tmp_path / "run" / "final")
    lm = DualTrackLM.from_pretrained(tiny_components["lm"])
    lm.add_sheet_reader(reader)  # of the same tokenizer
    more = ["--set", f"start_from={tmp_path / 'run' / 'final'}", "--out", str(tmp_path / "more")]
    more += ["--set", "model.meters=[3, 4]", "--set", f"data.scores=[[{scores}, 0.7]]"]
    assert recipe.main([str(tmp_path / "tiny.yaml"), *more]) == 0
    assert SheetReader.from_pretrained(tmp_path / "more" / "final").config.meters == (3, 4)


def test_sheets_are_the_corpus_own_the_readers_or_none(
    tmp_path: Path, shards: TokenShards, labels: SheetLabels
) -> None:
    reader = make_reader().eval()
    song = next(song for song in shards.index.songs if song.id == "item0")
    read = reader.read(shards.codes(song)["vocal"][None].long())[0]
    manifest, rng = str(tmp_path / "some.jsonl"), np.random.default_rng(0)
    config = SheetConfig(manifest=manifest, written=1.0, dropout=0.0, playing_dropout=0.0, no_playing=0.0)
    own = SheetSource(shards, config, reader, labels)
    assert torch.equal(own.draw(rng, song, 5, 20), labels.cut("item0", 5, 20))
    trusts = own.draw(rng, song, 5, 20)[:, [PLACE_TRUST, CHORD_TRUST]]
    assert set(trusts.unique().tolist()) <= {UNKNOWN, WRITTEN}
    for config in (
        SheetConfig(manifest=manifest, written=0.0, dropout=0.0, damage=0.0),
        SheetConfig(dropout=0.0, damage=0.0),
    ):
        drawn = SheetSource(shards, config, reader).draw(rng, song, 5, 20)
        assert torch.equal(drawn, read[5:25])
    hidden = SheetSource(shards, SheetConfig(dropout=0.5), reader)
    drawn = torch.stack([hidden.draw(rng, song, 0, 30) for _ in range(200)])
    for column, trust in ((PLACE, PLACE_TRUST), (CHORD, CHORD_TRUST)):
        share = (drawn[..., column] == UNKNOWN).all(dim=1).float().mean()
        assert 0.4 < share < 0.6
        assert torch.equal(drawn[..., column] == UNKNOWN, drawn[..., trust] == UNKNOWN)
    assert (read[:, :METER] != UNKNOWN).all()  # dropping must not spoil what is kept


def test_rests_of_bass_and_chords_are_always_told(tmp_path: Path, shards: TokenShards, item: Item) -> None:
    held = [[0.5, 1.4, 60, 90]]  # in the first bar of two
    item = replace(item, band={name: [[0, name == "drums", held]] for name in ("drums", "bass", "other")})
    write_manifest(tmp_path / "some.jsonl", [item])
    labels = SheetLabels.of_tokens(tmp_path / "some.jsonl", shards)
    song = next(song for song in shards.index.songs if song.id == "item0")
    nothing = SheetConfig(manifest=str(tmp_path / "some.jsonl"), no_playing=1.0)
    sheet = SheetSource(shards, nothing, make_reader().eval(), labels).draw(
        np.random.default_rng(0), song, 0, 60
    )
    assert sheet[:, [METER, TEMPO, STYLE, DRUMS]].eq(UNKNOWN).all()
    assert sheet[:36, [BASS, HARMONY]].eq(UNKNOWN).all()
    assert sheet[40:, [BASS, HARMONY]].eq(LEVELS.index("out")).all()


def test_half_of_what_is_read_is_of_damaged_vocals(shards: TokenShards) -> None:
    song = next(song for song in shards.index.songs if song.id == "item0")
    sources = [
        SheetSource(shards, SheetConfig(dropout=0.0, damage=1.0), make_reader().eval()) for _ in range(2)
    ]
    plain, damaged = sources[0].read(song), sources[0].read(song, damaged=True)
    assert not torch.equal(plain, damaged) and len(plain) == len(damaged)
    assert torch.equal(sources[1].read(song, damaged=True), damaged)  # the same in every run
    rng = np.random.default_rng(0)
    drawn = [torch.equal(sources[0].draw(rng, song, 0, song.frames), plain) for _ in range(200)]
    assert 80 < sum(drawn) < 120


def test_songs_in_other_meters_are_drawn_as_often_as_asked_and_read_in_theirs(
    tmp_path: Path, shards: TokenShards, labels: SheetLabels
) -> None:
    songs = shards.index.songs
    labels.items["item0"] = replace(labels.items["item0"], beats_per_bar=3)
    manifest, reader = str(tmp_path / "some.jsonl"), make_reader().eval()
    frames = np.array([song.frames for song in songs])
    is_waltz = np.array([song.id == "item0" for song in songs])
    for share in (None, 0.0, 0.7):
        source = SheetSource(shards, SheetConfig(manifest=manifest, other_meters=share), reader, labels)
        weights = source.weigh(songs)
        expected = frames[is_waltz].sum() / frames.sum() if share is None else share
        assert weights[is_waltz].sum() == pytest.approx(expected)
        assert np.ptp((weights / frames)[~is_waltz]) == pytest.approx(0) and weights.sum() == pytest.approx(1)
    song = songs[int(is_waltz.argmax())]
    codes = shards.codes(song)["vocal"][None].long()
    assert torch.equal(source.read(song), reader.read(codes, 3)[0])
    assert not torch.equal(source.read(song), reader.read(codes, 4)[0])
    with pytest.raises(ConfigError, match=r"sheets\.other_meters needs sheets\.manifest"):
        SheetConfig(other_meters=0.5)


def test_batches_carry_sheets_where_the_band_follows(
    tmp_path: Path, shards: TokenShards, labels: SheetLabels
) -> None:
    torch.manual_seed(0)
    sizes = dict(vocal_codes=11, accompaniment_codes=13, code_dim=4, embedding_dim=8, hidden_dim=16)
    lm = DualTrackLM(DualTrackLMConfig(**sizes, layers=1, heads=2, key_value_heads=1, feed_forward_dim=16))
    lm.add_sheet_reader(make_reader())
    sheets = SheetSource(shards, SheetConfig(dropout=0.0), make_reader().eval())
    for mode in ("vocal_to_accompaniment", "accompaniment_to_vocal", "unconditional"):
        shares = {name: float(name == mode) for name in ("vocal_to_accompaniment",)}
        config = DataConfig(tokens="", windows=((1.2, 1.0),), source_dropout=0.5, **{**shares, mode: 1.0})
        batch = WindowSource(shards, config, lm, 16, sheets).make_batch(np.random.default_rng(0))
        known = (batch["sheet"][..., :METER] != UNKNOWN).flatten(1)
        assert batch["sheet"].shape[:2] == batch["vocal"].shape
        if mode == "vocal_to_accompaniment":
            dropped = (batch["vocal"] == lm.pads["vocal"]).all(dim=1)
            assert dropped.any() and not dropped.all()
            assert torch.equal(known.any(dim=1), ~dropped) and torch.equal(known.all(dim=1), ~dropped)
            LMObjective(lm)(**batch)["total"].backward()
            assert lm.sheet is not None and lm.sheet.places.weight.grad.abs().sum() > 0
            assert all(p.grad is None for p in lm.sheet_reader.parameters())
        else:
            assert not known.any()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sheets\.written must be in 0\.\.1"):
        SheetConfig(written=1.5)
    with pytest.raises(ConfigError, match=r"data\.seconds must be a list"):
        SheetDataConfig(tokens="", manifest="", seconds=())
    with pytest.raises(ConfigError, match=r"data\.scores must be a list"):
        SheetDataConfig(tokens="", manifest="", scores=(("a", 0.7), ("b", 0.7)))
    with pytest.raises(ConfigError, match="sizes, dilations and frame rate"):
        SheetReaderConfig(dilations=(0,))
