"""What the band is told: styles that are asked for or drawn, levels by part, an intro, an ending."""

import numpy as np
import pytest
import torch

from duotok.lm.sheet.columns import BASS, CHORD, DRUMS, METER, METERS, STYLE, TEMPO, UNKNOWN, unknown_sheet
from duotok.lm.sheet.plan import Section, SongPlan
from duotok.lm.sheet.playing import FULL, HELD, LIGHT, OUT, STEM_COLUMNS, BandConfig
from duotok.lm.sheet.timeline import TimeLine
from duotok.recipes.accompany.arrangement import Arrangement, begin_band, describe_band
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.accompany.request import METER_NAMES, STEMS, Request
from duotok.recipes.accompany.wishes import SheetWishes

BAND = BandConfig.count([("ballad", 4, 100.0), ("rock", 4, 120.0), ("waltz", 3, 120.0)])
BAR = 50  # frames: 2 s, four beats at 120 BPM
SONG = (("intro", 4, ""), ("verse", 8, "A"), ("chorus", 8, "B"), ("bridge", 4, "C"), ("verse", 8, "A"))


def make_plan(sections: tuple[tuple[str, int, str], ...] = SONG, beats_per_bar: int = 4) -> SongPlan:
    """A song that begins with a bar line and stops in the middle of a bar."""
    edges = BAR * np.cumsum([0, *(bars for _, bars, _ in sections)])
    edges[-1] += BAR // 2
    beats = np.arange(-beats_per_bar, edges[-1] / BAR * beats_per_bar + beats_per_bar)
    sheet = unknown_sheet(int(edges[-1]))
    sheet[:, CHORD] = torch.arange(len(sheet)) // 10 % 24
    again = torch.full((len(sheet),), -1)
    again[edges[-2] :] = torch.arange(edges[1], edges[1] + len(sheet) - edges[-2])  # the verse
    return SongPlan(
        sheet=sheet,
        again=again,
        time_line=TimeLine(
            beats=beats * BAR / beats_per_bar,
            numbers=(beats % beats_per_bar).astype(int),
            rate_hz=25.0,
            beats_per_bar=beats_per_bar,
        ),
        keys=[(0, len(sheet), 0)],
        sections=[
            Section(start=int(start), end=int(end), name=name, letter=letter)
            for (name, _, letter), start, end in zip(sections, edges[:-1], edges[1:], strict=True)
        ],
        other_tempo=None,
        two_tempi=None,
        has_singer=True,
    )


def arrange(plan: SongPlan, band: BandConfig | None = BAND, **fields) -> Arrangement:
    return Arrangement(plan=plan, band=band, request=Request(vocal="a.wav", **fields))


def test_names_are_those_of_the_model() -> None:
    assert tuple(STEM_COLUMNS) == STEMS and tuple(METER_NAMES) == METERS


def test_parts_are_played_as_a_musician_would() -> None:
    arrangement = arrange(make_plan())
    sheets = torch.stack([arrangement.tell("rock", seed) for seed in range(30)])
    told = {  # bar -> levels of drums, bass and chords that are drawn
        bar: {tuple(row) for row in sheets[:, bar * BAR, list(STEM_COLUMNS.values())].tolist()}
        for bar in (0, 2, 5, 13, 21, 25, 31, 32)
    }
    assert told[0] == {(OUT, LIGHT, LIGHT), (HELD, LIGHT, LIGHT)} and told[2] == {(LIGHT,) * 3}
    assert told[5] == told[25] == {(LIGHT,) * 3, (FULL,) * 3} and told[13] == {(FULL,) * 3}
    assert told[21] == {(LIGHT,) * 3, (OUT, LIGHT, LIGHT)}
    assert told[31] == {(HELD,) * 3} and told[32] == {(OUT, HELD, HELD)}
    assert torch.equal(sheets[:, 5 * BAR, DRUMS], sheets[:, 25 * BAR, DRUMS])  # verses are alike
    assert (sheets[:, 31 * BAR :, CHORD] == sheets[0, 31 * BAR, CHORD]).all()  # the last chord rings
    assert arrangement.ending_seconds == 3.0
    told_all = sheets[0, :, [METER, TEMPO, STYLE]].unique(dim=0).tolist()
    assert told_all == [[METERS.index(4), 5, BAND.styles.index("rock")]]
    # What is sung again is played again, but not in the last bar.
    assert torch.equal(arrangement.again[: 31 * BAR], arrangement.plan.again[: 31 * BAR])
    assert (arrangement.again[31 * BAR :] == -1).all() and (arrangement.plan.again[31 * BAR :] >= 0).all()


@pytest.mark.parametrize(
    ("sections", "ends"),
    [
        ((("verse", 8, "A"),), False),
        ((("verse", 40, "A"),), True),
        ((("verse", 8, "A"), ("ending", 2, "")), True),
    ],
)
def test_an_excerpt_goes_on_and_a_song_ends(sections, ends) -> None:
    arrangement = arrange(make_plan(sections), without=("bass",))
    sheet = arrangement.tell("ballad", 0)
    assert (arrangement.ending_seconds > 0) == ends == (sheet[-BAR, DRUMS] == HELD)
    assert (sheet[:, BASS] == OUT).all()
    assert (sheet[0, DRUMS] == UNKNOWN) == (len(sections) == 1)
    told = describe_band(arrangement.request, arrangement.plan, "ballad", sheet)
    assert told["levels"][0][2]["bass"] == "out" and ("drums" in told["levels"][0][2]) == (len(sections) > 1)
    assert told["levels"][-1][1] == len(sheet) / 25 and told["drawn"] and told["without"] == ["bass"]


def test_styles_are_drawn_as_they_were_heard_or_asked_for() -> None:
    four, three = make_plan(), make_plan(beats_per_bar=3)
    assert set(arrange(four).draw_styles(2)) == {"ballad", "rock"}
    assert {arrange(four, seed=seed).draw_styles(1)[0] for seed in range(30)} == {"ballad", "rock"}
    assert arrange(three, meter="3/4").draw_styles(2) == ["waltz"] * 2
    assert arrange(four, style="waltz").draw_styles(3) == ["waltz"] * 3
    unable = arrange(four, band=None)
    assert unable.draw_styles(2) == [None, None] and unable.ending_seconds == 0
    assert torch.equal(unable.tell(None, 0), four.sheet) and torch.equal(unable.again, four.again)


@pytest.mark.parametrize(
    ("sung_from", "bars", "begins"), [(4.1, 2, 0.0), (5.9, 0, 6.0), (4.1, 4, -4.0), (0.0, 3, -6.0)]
)
def test_the_band_begins_before_the_singers_first_bar(sung_from, bars, begins) -> None:
    plan = make_plan()
    pitches = np.full(2 * len(plan.sheet), np.nan)
    pitches[round(50 * sung_from) :] = 60.0
    chart = [(0.0, 5.0, "C"), (5.0, 9.0, "Am")]
    seconds, wishes = begin_band(plan, pitches, bars, SheetWishes(chart=chart))
    assert seconds == pytest.approx(begins)
    if begins < 0:
        assert wishes.tempo_bpm == pytest.approx(120) and wishes.downbeat_seconds % 2 == pytest.approx(0)
        assert wishes.chart == [(-begins, 5 - begins, "C"), (5 - begins, 9 - begins, "Am")]
    else:
        assert (wishes.tempo_bpm, wishes.downbeat_seconds) == (None, None)
        assert wishes.chart == {0.0: chart, 6.0: [(0.0, 6.0, "N"), (6.0, 9.0, "Am")]}[seconds]


def test_an_intro_makes_the_song_longer(tiny_bundle, make_singing) -> None:
    vocal = torch.from_numpy(make_singing(3.0).T)
    accompanist = Accompanist.from_pretrained(tiny_bundle)
    fields = dict(
        steps=1, tempo_bpm=180, downbeat_seconds=0.0, accompaniment_db=-15.0
    )  # far from the limiter
    made = accompanist.accompany(vocal, intro=2, style="rock", without=("drums",), **fields)
    band = made.report["band"]
    assert band["intro_seconds"] == pytest.approx(2 * 4 / 3, abs=1e-3)
    samples = vocal.shape[1] + round(band["intro_seconds"] * 48_000)
    assert abs(made.mix.shape[1] - samples) <= 24 and made.report["samples"] == made.mix.shape[1]
    gain = 10 ** (made.report["levels"]["mix_gain_db"] / 20)
    sung = made.mix / gain - made.accompaniment
    assert sung[:, -vocal.shape[1] :].sub(vocal).abs().max() < 2e-3
    assert sung[:, : -vocal.shape[1]].abs().max() < 2e-3 < made.accompaniment[:, :96_000].abs().max()
    assert (band["style"], band["drawn"], band["meter"]) == ("rock", False, "4/4")
    assert all(levels["drums"] == "out" for _, _, levels in band["levels"])
    lines = made.report["lead_sheet"]["bar_lines_seconds"]
    assert lines[:3] == pytest.approx([0, 4 / 3, 8 / 3], abs=0.002)
    ballad, rock = (accompanist.compose(vocal, style=style).ranked[0].codes for style in ("ballad", "rock"))
    assert not torch.equal(ballad, rock)
    for asked in ({"meter": "3/4"}, {"style": "waltz"}):
        waltz = accompanist.compose(vocal, **asked, **fields)
        assert waltz.ranked[0].style == "waltz" and waltz.plan.time_line.beats_per_bar == 3
        assert np.diff(waltz.plan.time_line.bar_lines) == pytest.approx(25.0)
