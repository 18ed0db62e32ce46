"""Lead sheets: bars out of places, chords out of chances, and what the language model makes of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import score_batch
from duotok.lm.sheet.columns import (
    CHORD,
    CHORD_TRUST,
    COLUMNS,
    METER,
    METERS,
    PLACE,
    PLACE_TRUST,
    PLACES,
    STYLE,
    UNKNOWN,
    WRITTEN,
    check_sheet,
    commit,
    hide_playing,
    unknown_sheet,
    write_sheet,
)
from duotok.lm.sheet.playing import BandConfig
from duotok.lm.sheet.reader import SheetReader, SheetReaderConfig, measure_trust, track_chords
from duotok.lm.sheet.timeline import find_time_line, places_between, places_in
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.music.labels import CHORDS

MODE = "vocal_to_accompaniment"


def test_places_outside_of_the_bars_are_unknown() -> None:
    places = places_between(np.array([10.0, 42.0]), 60)
    assert (places[:10] == UNKNOWN).all() and (places[42:] == UNKNOWN).all()
    assert places[10:42].tolist() == sorted([*range(PLACES)] * 2)
    assert (places_between(np.zeros(0), 5) == UNKNOWN).all()


def test_chords_change_at_beats() -> None:
    places = places_between(np.arange(0, 201, 48.0), 192)
    truth = np.repeat([0, 9 + 12, 5, 7], 48)
    logits = np.random.default_rng(0).normal(size=(192, CHORDS))
    logits[np.arange(192), truth] += 2.0
    logits[20:24, 3] += 6.0  # a short lie within a bar
    logits[44:48] = logits[40:44]  # and one just before the bar line
    told = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert track_chords(told, places).tolist() == truth.tolist()
    assert len(track_chords(told[:0], places[:0])) == 0


@pytest.fixture(scope="module")
def reader() -> SheetReader:
    torch.manual_seed(0)
    config = SheetReaderConfig(vocal_codes=11, code_dim=4, dim=8, dilations=(1, 2))
    reader = SheetReader(config).eval()
    reader.tokenizer_fingerprint = "abc"
    return reader


@pytest.fixture
def lm(reader: SheetReader) -> DualTrackLM:
    torch.manual_seed(1)
    sizes = dict(vocal_codes=11, accompaniment_codes=13, code_dim=4, embedding_dim=8, hidden_dim=16)
    lm = DualTrackLM(
        DualTrackLMConfig(**sizes, layers=2, heads=2, key_value_heads=1, feed_forward_dim=16)
    ).eval()
    lm.tokenizer_fingerprint = "abc"
    lm.add_sheet_reader(reader)
    return lm


def learn_something(lm: DualTrackLM) -> None:
    """As if the embeddings of the sheet had been trained."""
    torch.manual_seed(2)
    assert lm.sheet is not None
    for table in (lm.sheet.places, lm.sheet.chords):
        torch.nn.init.normal_(table.weight, std=3.0)


def test_reading_gives_whole_sheets_and_none_of_silence(reader: SheetReader) -> None:
    codes = torch.randint(0, 11, (3, 75))
    codes[1] = reader.pad
    sheets = reader.read(codes)
    assert sheets.shape == (3, 75, COLUMNS)
    assert (sheets[1] == UNKNOWN).all() and (sheets[0, :, :METER] != UNKNOWN).all()
    assert torch.equal(check_sheet(sheets, 75), sheets)
    assert torch.equal(reader.read(codes[2:])[0], sheets[2])  # whatever stands beside it


def test_trust_is_the_share_of_information_around_a_frame() -> None:
    chosen = np.full(40, 3)
    sure = np.full((40, PLACES), -100.0)
    sure[:, 3] = 0.0
    guessed = np.full((40, PLACES), -np.log(PLACES))
    half = np.full((40, PLACES), np.log(0.75 / 15))
    half[:, 3] = np.log(0.25)  # a quarter is half of the four bits of one of sixteen
    for told, level in ((sure, WRITTEN - 1), (guessed, 0), (half, WRITTEN // 2)):
        assert (measure_trust(told + 1e-9, chosen, 10) == level).all()
    assert (measure_trust(sure, np.full(40, 4), 10) == 0).all()  # of another opinion
    mixed = measure_trust(np.concatenate([sure[:20], guessed[:20]]), chosen, 8)
    assert mixed[0] == WRITTEN - 1 and mixed[-1] == 0 and (np.diff(mixed) <= 0).all() and len(set(mixed)) > 3
    chosen[5:9] = UNKNOWN
    assert (measure_trust(sure, chosen, 2) == np.where(chosen == UNKNOWN, UNKNOWN, WRITTEN - 1)).all()
    assert measure_trust(sure[:0], chosen[:0], 2).shape == (0,)


def test_what_is_trusted_less_says_less(lm: DualTrackLM) -> None:
    learn_something(lm)
    assert lm.sheet is not None
    written = write_sheet(np.arange(16), np.arange(16))
    doubted, unknown = written.clone(), unknown_sheet(16)
    doubted[:, [PLACE_TRUST, CHORD_TRUST]] = 0
    nothing = lm.sheet(unknown)
    assert torch.equal(nothing[0], nothing[1])
    assert (lm.sheet(doubted).std(dim=0) < 0.5 * lm.sheet(written).std(dim=0)).all()


def test_an_odd_number_of_frames_is_read(reader: SheetReader) -> None:
    told = reader(torch.randint(0, 11, (2, 31)))
    assert told["place"].shape == (2, 31, len(METERS), PLACES) and told["chord"].shape == (2, 31, CHORDS)
    assert torch.allclose(told["chord"].exp().sum(dim=-1), torch.ones(2, 31))


def test_codes_are_read_in_the_meter_that_is_asked_for(reader: SheetReader) -> None:
    codes = torch.randint(0, 11, (1, 500))
    for beats in METERS:
        places = reader.read(codes, beats)[0, :, PLACE].numpy()
        line = find_time_line(
            places_in(reader.listen(codes)["place"][0].numpy(), beats), 25.0, beats_per_bar=beats
        )
        assert np.array_equal(places, line.places(500))


def test_more_meters_are_learned_from_what_was_known(reader: SheetReader) -> None:
    codes = torch.randint(0, 11, (2, 30))
    more = reader.learn_meters((3, 4)).eval()
    old, new = reader(codes), more(codes)
    four, three = METERS.index(4), METERS.index(3)
    assert torch.equal(new["chord"], old["chord"])
    torch.testing.assert_close(new["place"][:, :, four].log_softmax(dim=-1), old["place"][:, :, four])
    assert (new["place"][:, :, four].logsumexp(dim=-1) > new["place"][:, :, three].logsumexp(dim=-1)).all()
    assert new["place"][:, :, METERS.index(6)].isneginf().all()
    torch.testing.assert_close(
        new["place"].flatten(2).logsumexp(dim=-1), torch.zeros(2, 30), atol=1e-5, rtol=0
    )
    with pytest.raises(ConfigError, match="meters must be some of"):
        reader.learn_meters((4, 5))


def test_a_new_sheet_changes_nothing_yet(lm: DualTrackLM, reader: SheetReader) -> None:
    codes = {track: torch.randint(0, 11, (2, 20)) for track in ("vocal", "accompaniment")}
    read = lm(lm.lay_out(codes, MODE))["accompaniment"]
    none = lm(lm.lay_out(codes, MODE, sheet=None))["accompaniment"]
    assert torch.equal(read, none)
    learn_something(lm)
    assert not torch.allclose(lm(lm.lay_out(codes, MODE))["accompaniment"], none, atol=1e-3)


def test_scores_read_the_sheet_of_the_vocal_they_are_shown(lm: DualTrackLM) -> None:
    learn_something(lm)
    vocal, accompaniment = torch.randint(0, 11, (2, 40)), torch.randint(0, 13, (2, 40))
    scores = score_batch(lm, vocal, accompaniment, MODE)
    layout = lm.lay_out({"vocal": vocal, "accompaniment": accompaniment}, MODE, sheet=lm.read_sheet(vocal))
    nats = torch.nn.functional.cross_entropy(
        lm(layout)["accompaniment"].transpose(1, 2), accompaniment, reduction="none"
    )
    assert torch.allclose(scores.loss_nats["accompaniment"], nats, atol=1e-5)
    assert (
        not lm.lay_out({"vocal": vocal, "accompaniment": accompaniment}, "unconditional")
        .sheet.ne(UNKNOWN)
        .any()
    )


def test_rows_without_source_have_no_sheet(lm: DualTrackLM) -> None:
    codes = {track: torch.randint(0, 11, (2, 20)) for track in ("vocal", "accompaniment")}
    layout = lm.lay_out(codes, MODE, drop_source=torch.tensor([True, False]))
    assert layout.sheet.shape == (2, 40, COLUMNS)
    assert (layout.sheet[0] == UNKNOWN).all() and (layout.sheet[1, :, :METER] != UNKNOWN).all()


@pytest.mark.parametrize("aligned", [True, False])
def test_cached_decoding_sees_the_sheet_as_the_whole_pass_does(lm: DualTrackLM, aligned: bool) -> None:
    learn_something(lm)
    lm.config = DualTrackLMConfig(**{**vars(lm.config), "aligned_source": aligned})
    vocal = torch.randint(0, 11, (30,))
    sheet = write_sheet(np.arange(30) % PLACES, np.arange(30) // 10)
    sheet[:, CHORD_TRUST] = torch.arange(30) // 4
    config = SamplingConfig(guidance=2.0, temperature=0.0)
    made = lm.compose(vocal, seeds=[0, 1], sampling=config, sheet=sheet).codes[0]
    both = []
    for drop in (False, True):
        layout = lm.lay_out(
            {"vocal": vocal[None], "accompaniment": made[None]},
            MODE,
            sheet=commit(sheet)[None],
            drop_source=torch.tensor([drop]),
        )
        both.append(lm(layout)["accompaniment"][0])
    guided = torch.lerp(both[1], both[0], 2.0)
    assert torch.equal(guided.argmax(dim=-1), made)


def test_generating_reads_the_sheet_of_the_whole_song(lm: DualTrackLM) -> None:
    learn_something(lm)
    vocal = torch.randint(0, 11, (60,))
    config = SamplingConfig(window_frames=25, overlap_frames=5)
    sheet = lm.read_sheet(vocal[None])
    assert sheet is not None
    told = lm.compose(vocal, seeds=[3], sampling=config, sheet=sheet[0]).codes
    assert torch.equal(lm.compose(vocal, seeds=[3], sampling=config).codes, told)
    sure = sheet[0].clone()
    sure[:, [PLACE_TRUST, CHORD_TRUST]] = WRITTEN  # it commits, however sure the reader was
    assert not torch.equal(sure, sheet[0])
    assert torch.equal(lm.compose(vocal, seeds=[3], sampling=config, sheet=sure).codes, told)
    other = sheet[0].clone()
    other[:, PLACE] = (other[:, PLACE] + 5) % PLACES
    assert not torch.equal(lm.compose(vocal, seeds=[3], sampling=config, sheet=other).codes, told)


def test_what_comes_again_is_played_again(lm: DualTrackLM) -> None:
    learn_something(lm)
    vocal, again = torch.randint(0, 11, (90,)), torch.full((90,), -1)
    again[40:60] = torch.arange(5, 25)
    again[70:80] = torch.arange(45, 55)  # a copy of a copy
    config = SamplingConfig(window_frames=25, overlap_frames=5)
    free = lm.compose(vocal, seeds=[3, 4], sampling=config).codes
    made = lm.compose(vocal, seeds=[3, 4], sampling=config, again=again)
    copied = again >= 0
    assert torch.equal(made.codes[:, copied], made.codes[:, again[copied]])
    assert torch.equal(made.codes[:, :40], free[:, :40]) and not torch.equal(made.codes[:, 60:], free[:, 60:])
    assert made.likelihood_nats is not None and bool((made.likelihood_nats < 0).all())
    for bad in (again[:89], torch.arange(90)):
        with pytest.raises(DataError, match="again must name an earlier frame of 90"):
            lm.compose(vocal, seeds=[3], again=bad)


def test_candidates_play_as_each_is_told(lm: DualTrackLM) -> None:
    vocal, config = torch.randint(0, 11, (60,)), SamplingConfig(window_frames=25, overlap_frames=5)
    sheet = write_sheet(np.arange(60) % PLACES, np.arange(60) // 10)
    plain = lm.compose(vocal, seeds=[3, 3], sampling=config, sheet=sheet).codes
    lm.add_band(BandConfig.count([("folk", 4, 90.0), ("waltz", 3, 130.0)]))
    assert torch.equal(lm.compose(vocal, seeds=[3, 3], sampling=config, sheet=sheet).codes, plain)
    assert lm.sheet is not None
    for table in lm.sheet.playing:
        torch.nn.init.normal_(table.weight, std=2.0)
    sheets = sheet.repeat(2, 1, 1)
    sheets[0, :, STYLE], sheets[1, :, STYLE] = 0, 1
    both = lm.compose(vocal, seeds=[3, 3], sampling=config, sheet=sheets).codes
    assert not torch.equal(both[0], both[1])
    for number in range(2):
        alone = lm.compose(vocal, seeds=[3], sampling=config, sheet=sheets[number]).codes[0]
        assert torch.equal(alone, both[number])
    told = commit(sheets[:1])
    logits = [
        lm(
            lm.lay_out(
                {"vocal": vocal[None], "accompaniment": both[:1]},
                MODE,
                sheet=sheet,
                drop_source=torch.tensor([drop]),
            )
        )["accompaniment"]
        for sheet, drop in ((told, False), (hide_playing(told), False), (told, True))
    ]
    for guidance, playing, frame in ((2.0, 1.0, 20), (1.0, 2.5, 40), (1.7, 0.5, 59)):
        guided = SamplingConfig(guidance=guidance, playing_guidance=playing, temperature=0.0)
        made = lm.compose(vocal, seeds=[0], sampling=guided, sheet=sheets[0], prefix=both[0, :frame])
        full, untold, alone = (each[0, frame] for each in logits)
        expected = untold + playing * (full - untold) + (guidance - 1) * (full - alone)
        assert made.codes[0, frame] == expected.argmax()
    sheets[1, :, STYLE] = 2
    with pytest.raises(DataError, match=r"what the band is told of a lead sheet must be in -1\.\.1"):
        lm.compose(vocal, seeds=[3, 3], sheet=sheets)


def test_a_band_that_learns_more_styles_plays_those_it_knows_as_before(lm: DualTrackLM) -> None:
    known = BandConfig.count([("folk", 4, 90.0), ("waltz", 3, 130.0)])
    lm.add_band(known)
    assert lm.sheet is not None
    for table in lm.sheet.playing:
        torch.nn.init.normal_(table.weight, std=2.0)
    sheet = write_sheet(np.arange(40) % PLACES, np.arange(40) // 10)

    def play(style: str) -> torch.Tensor:
        assert lm.band is not None
        sheet[:, STYLE] = lm.band.styles.index(style)
        return lm.compose(torch.arange(40) % 11, seeds=[3], sheet=sheet).codes

    before = [play(style) for style in known.styles]
    lm.add_band(known)
    lm.add_band(BandConfig.count([("aria", 3, 70.0), *[("folk", 4, 90.0)] * 2, ("march", 2, 110.0)]))
    assert lm.band is not None and lm.band.styles == ("aria", "folk", "march", "waltz")
    assert ("folk", 4, 3, 2) in lm.band.heard and ("waltz", 3, 6, 1) in lm.band.heard
    assert all(torch.equal(play(style), was) for style, was in zip(known.styles, before, strict=True))
    assert not torch.equal(*before)


def test_each_meter_has_places_of_its_own_which_begin_as_those_of_the_same_beat(lm: DualTrackLM) -> None:
    assert lm.sheet is not None
    torch.nn.init.normal_(lm.sheet.places.weight)
    written = write_sheet(np.arange(PLACES), np.zeros(PLACES, dtype=int))
    before = lm.sheet(written).detach()
    lm.add_band(BandConfig.count([("folk", 4, 90.0), ("waltz", 3, 130.0)]))
    of_beats = {
        2: [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7],
        3: [0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11],
        4: list(range(PLACES)),
        6: [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 9, 10, 12, 13, 15],
    }
    for beats in METERS:
        written[:, METER] = METERS.index(beats)
        torch.testing.assert_close(lm.sheet(written), before[of_beats[beats]])
    lm.sheet(written).sum().backward()  # of the last meter, six
    grads = lm.sheet.places.weight.grad
    assert grads is not None
    moved = grads.unflatten(0, (-1, PLACES + 1)).abs().sum(dim=(1, 2)) > 0
    assert moved.tolist() == [False] * len(METERS) + [True]


def test_styles_are_drawn_as_they_were_heard() -> None:
    heard = [("rock", 4, 120.0)] * 8 + [("ballad", 4, 64.0)] * 8 + [("waltz", 3, 150.0)]
    band = BandConfig.count(heard)
    assert band.styles == ("ballad", "rock", "waltz") and band.meters() == (3, 4)
    rng = np.random.default_rng(0)
    assert set(band.draw(5, beats=3, beats_per_minute=90.0, rng=rng)) == {"waltz"}
    fast = [band.draw(2, beats=4, beats_per_minute=120.0, rng=rng) for _ in range(100)]
    assert all(sorted(each) == ["ballad", "rock"] for each in fast)
    assert sum(first == "rock" for first, _ in fast) > 80
    assert set(band.draw(40, beats=6, beats_per_minute=90.0, rng=rng)) == set(band.styles)
    with pytest.raises(ConfigError, match="impossible way"):
        BandConfig(heard=(("rock", 5, 0, 1),))


def test_bad_sheets_are_refused(lm: DualTrackLM) -> None:
    with pytest.raises(DataError, match="cut it alike"):
        lm.compose(torch.zeros(10).long(), seeds=[0], sheet=unknown_sheet(9))
    bad = unknown_sheet(10)
    bad[3, CHORD] = CHORDS
    with pytest.raises(DataError, match=r"chords of a lead sheet must be in -1\.\.24"):
        lm.compose(torch.zeros(10).long(), seeds=[0], sheet=bad)
    bad = unknown_sheet(10)
    bad[3, PLACE_TRUST] = WRITTEN + 1
    with pytest.raises(DataError, match=r"trust in the places of a lead sheet must be in -1\.\.8"):
        check_sheet(bad, 10)


def test_the_reader_travels_with_the_model_and_is_not_trained_by_it(lm: DualTrackLM, tmp_path: Path) -> None:
    lm.add_band(BandConfig.count([("folk", 4, 90.0)]))
    learn_something(lm)
    lm.save_pretrained(tmp_path / "lm")
    back = DualTrackLM.from_pretrained(tmp_path / "lm")
    vocal = torch.randint(0, 11, (1, 50))
    sheets = lm.read_sheet(vocal), back.read_sheet(vocal)
    assert sheets[0] is not None and torch.equal(sheets[0], sheets[1])
    assert back.sheet_reader is not None and back.band == lm.band
    assert not any(p.requires_grad for p in back.sheet_reader.parameters())
    assert not back.train().sheet_reader.training and back.backbone.training


def test_a_reader_of_another_tokenizer_is_refused(lm: DualTrackLM, reader: SheetReader) -> None:
    other = SheetReader(reader.config)
    other.tokenizer_fingerprint = "xyz"
    with pytest.raises(ConfigError, match="another tokenizer"):
        lm.add_sheet_reader(other)
