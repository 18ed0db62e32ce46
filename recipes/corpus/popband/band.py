"""The band: bass, drums, chords and pads in a style, locked to the beats and chords of an excerpt.

A style has General MIDI programs, and patterns for bars of 2, 3, 4 or 6 beats, in sixteenths (of 6 beats,
which are eighths: in halves of a beat). A pattern of four beats lasts two bars of two.
Drum patterns: "X" accent, "x" stroke, "o" ghost stroke, "." rest. Bass: "R" root, "5" fifth, "8" octave,
"3" third, "A" approach to the next chord. Comping: "D" long chord, "d" short chord, "m" muted chord,
"0".."5" one chord tone (arpeggio). Each style offers several variants of a pattern; an item draws one.
"""

from dataclasses import dataclass, replace

import numpy as np

from duotok.recipes.corpus.popband.grooves import Grooves
from duotok.recipes.corpus.scores.song import Excerpt
from duotok.renderer.sound_font import Part
from duotok.tokenizer.music.labels import parse_chord

STROKES = {"X": 112, "x": 84, "o": 42}
GROOVE_SHARE = 0.5  # of the arrangements for which there is a performance
FILL_BARS = (4, 8)  # a fill and a crash every so many bars
_RESTING_STEM_SHARE = 0.06  # of the stems, in a band with breaks
_BREAKING_SHARE, _BREAK_SHARE = 0.5, 0.25  # of such bands, and of a stem's blocks in them


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one style is played; programs are General MIDI numbers from 0."""

    name: str
    kits: tuple[int, ...]  # presets of the drum bank
    drums: tuple[dict[str, str], ...]  # variants: drum name -> pattern
    bass: tuple[str, ...]
    bass_programs: tuple[int, ...]
    comping: tuple[str, ...]
    comping_programs: tuple[int, ...]
    pads: tuple[int, ...]  # programs of held chords
    pianos: tuple[int, ...] = (0, 0, 1, 4)
    swing: tuple[float, float] = (0.0, 0.0)  # range of the delay of odd sixteenths, in sixteenths
    pad_share: float = 0.5  # part of the items with pads
    comping_share: float = 0.85
    drum_share: float = 0.95
    # Felt tempo that patterns of four beats suit: they may be felt at half or twice the counted tempo.
    beats_per_minute: tuple[float, float] = (60.0, 125.0)
    beats_per_bar: int = 4  # one of METERS


DRUM_KEYS = {
    "kick": 36, "rim": 37, "snare": 38, "clap": 39, "closed": 42, "pedal": 44, "open": 46, "low_tom": 45,
    "mid_tom": 47, "high_tom": 50, "crash": 49, "ride": 51, "tambourine": 54, "cowbell": 56, "shaker": 70,
    "high_conga": 63, "low_conga": 64, "claves": 75,
}  # fmt: skip

# fmt: off
IN_FOUR = (
    Style(name="ballad", kits=(0, 8, 40),
        drums=({"kick": "X.........x.....", "rim": "....x.......x...", "closed": "x.o.x.o.x.o.x.o."},
               {"kick": "X.......x.x.....", "snare": "....X.......X...", "closed": "x.x.x.x.x.x.x.x."},
               {"kick": "X.....x...x.....", "snare": "....x.......x...", "ride": "x...x.o.x...x.o."}),
        bass=("R.......5.......", "R.......R.....A.", "R.....R.5......."), bass_programs=(32, 33, 35),
        comping=("0.1.2.1.3.2.1.2.", "D.......D.......", "0.2.1.2.0.2.3.2."),
        comping_programs=(24, 25, 27, 46), pads=(48, 49, 50, 89, 91), pad_share=0.85,
        beats_per_minute=(50, 95)),
    Style(name="rock", kits=(0, 8, 16),
        drums=({"kick": "X.......X.x.....", "snare": "....X.......X...", "closed": "X.x.X.x.X.x.X.x."},
               {"kick": "X..x....X..x....", "snare": "....X.......X...", "ride": "X.x.X.x.X.x.X.x."},
               {"kick": "X.x.....x.x...x.", "snare": "....X.......X..o", "open": "X...X...X...X..."}),
        bass=("R.R.R.R.R.R.R.R.", "R...R...R...R.A.", "R..RR...R..RR.5."), bass_programs=(33, 34),
        comping=("D.......D.....d.", "d.d.d.d.d.d.d.d.", "D...d.d...D.d.d."), comping_programs=(29, 30, 27),
        pads=(16, 18, 48), pad_share=0.3),
    Style(name="funk", kits=(0, 8, 16),
        drums=({"kick": "X..x..x...x..x..", "snare": "....X..o.o..X..o", "closed": "xoxoxoxoxoxoxoxo"},
               {"kick": "X.x.......xx....", "snare": "....X..o....X.o.", "closed": "x.xxx.xxx.xxx.x."}),
        bass=("R..8..R...5.R..A", "R.R...8.R..5..A.", "R...8..RR.5...A."), bass_programs=(33, 36, 37),
        comping=("..dm..d...dm.d..", "m.dmm.d.m.dm..d.", "d..d..d...d..d.."), comping_programs=(27, 28, 7),
        pads=(61, 62, 17), pianos=(4, 5, 0), pad_share=0.3, swing=(0.0, 0.2), beats_per_minute=(75, 125)),
    Style(name="bossa", kits=(40, 32, 0),
        drums=({"kick": "X..xX..xX..xX..x", "rim": "x..x..x...x..x..", "closed": "x.x.x.x.x.x.x.x."},
               {"kick": "X..x....X..x....", "rim": "..x..x....x..x..", "shaker": "xoxoxoxoxoxoxoxo"}),
        bass=("R..55..RR..55..A", "R..R5..5R..R5..5"), bass_programs=(32, 35),
        comping=("D..d..d...d..d..", "d..d..d.d..d.d.."), comping_programs=(24, 26), pads=(48, 52, 73),
        pad_share=0.35, beats_per_minute=(60, 110)),
    Style(name="reggae", kits=(0, 8),
        drums=({"kick": "........X.......", "rim": "........x.......", "closed": "..x...x...x...x."},
               {"kick": "X.......X.......", "snare": "........x.....o.", "closed": "x.x.x.x.x.x.x.x."}),
        bass=("R...R.5...R.3...", "....R..R5...R.3.", "R..R..5.R......."), bass_programs=(33, 32, 39),
        comping=("....d.......d...", "....d.d.....d.d."), comping_programs=(27, 28, 25), pads=(16, 17, 18),
        pianos=(0, 16, 4), pad_share=0.5, swing=(0.0, 0.3), beats_per_minute=(60, 100)),
    Style(name="electronic", kits=(25, 24),
        drums=({"kick": "X...X...X...X...", "clap": "....X.......X...", "open": "..x...x...x...x."},
               {"kick": "X...X...X...X...", "snare": "....x.......x..o", "closed": "xoxoxoxoxoxoxoxo"},
               {"kick": "X.....x...x.....", "clap": "....X.......X...", "closed": "x.xxx.x.x.xxx.xx"}),
        bass=("..R...R...R...R.", "R.RR.RR.R.RR.RR.", "R.8.R.8.R.8.R.8."), bass_programs=(38, 39, 87),
        comping=("0123210301232103", "d..d..d...d..d..", "0.1.2.3.4.3.2.1."),
        comping_programs=(80, 81, 84, 10), pads=(89, 90, 94, 95), pianos=(0, 2, 5, 81), pad_share=0.85,
        beats_per_minute=(75, 135)),
    Style(name="folk", kits=(40, 0),
        drums=({"kick": "X.......x.......", "tambourine": "....x.......x...", "shaker": "x.o.x.o.x.o.x.o."},
               {"kick": "X.......X.......", "rim": "....x.......x.x.", "pedal": "....x.......x..."}),
        bass=("R.......5.......", "R...5...R...5..."), bass_programs=(32,),
        comping=("D...d.d...d.d.d.", "0.2.1.2.0.2.1.3.", "D.d.d.d.D.d.d.d."),
        comping_programs=(25, 24, 105, 15), pads=(21, 40, 41, 48, 73), pianos=(0, 3, 24), pad_share=0.45,
        drum_share=0.7, comping_share=1.0),
    Style(name="soul", kits=(0, 32, 8),
        drums=({"kick": "X......x..x.....", "snare": "....X.......X...", "closed": "x.xox.x.x.xox.x."},
               {"kick": "X..x......xx....", "snare": "....X..o.o..X...", "ride": "x.x.x.x.x.x.x.x."}),
        bass=("R.....5.8..R..A.", "R..R..5...R.3.A.", "R.....RR5.....A."), bass_programs=(33, 32),
        comping=("D.....d.....d...", "....d..d....d...", "d..d......d..d.."),
        comping_programs=(4, 16, 26, 27), pads=(61, 48, 52, 17), pianos=(4, 0, 5), pad_share=0.6,
        swing=(0.1, 0.5), beats_per_minute=(55, 105)),
    Style(name="disco", kits=(0, 16, 24),
        drums=({"kick": "X...X...X...X...", "snare": "....X.......X...", "open": "..x...x...x...x."},
               {"kick": "X...X...X...X...", "clap": "....X.......X...", "closed": "x.xxx.xxx.xxx.xx"}),
        bass=("R.8.R.8.R.8.R.8.", "R..RR.8.R..R5.8."), bass_programs=(33, 36, 38),
        comping=("..d...d...d...d.", "dmd.dmd.dmd.dmd."), comping_programs=(27, 28), pads=(48, 50, 61, 44),
        pianos=(0, 1, 2, 5), pad_share=0.75, beats_per_minute=(85, 135)),
    Style(name="shuffle", kits=(0, 32, 40),
        drums=({"kick": "X.......X.......", "snare": "....X.......X...", "ride": "x..xx..xx..xx..x"},
               {"kick": "X......xX.......", "snare": "....x.......x..o", "closed": "x..xx..xx..xx..x"}),
        bass=("R...3...5...A...", "R..RR..5R..55..A"), bass_programs=(32, 33),
        comping=("...d.......d....", "d......d........", "....d..d....d..d"), comping_programs=(26, 16, 27),
        pads=(61, 66, 16), pianos=(0, 3, 0), swing=(0.33, 0.66), pad_share=0.3, beats_per_minute=(60, 115)),
)
_BALLAD, _, _, _, _, _, _FOLK, _SOUL, _DISCO, _SHUFFLE = IN_FOUR
_SLOW_SIX = replace(
    _BALLAD, name="slow_six", beats_per_bar=6,
    drums=({"kick": "X...........", "snare": "......X.....", "closed": "x.x.x.x.x.x."},
           {"kick": "X.......x.x.", "snare": "......X.....", "closed": "x.xox.x.xox."},
           {"kick": "X.........x.", "rim": "......x.....", "ride": "x.x.x.x.x.x."}),
    bass=("R.....5.....", "R...R.R...A.", "R.....R.5..."),
    comping=("0.1.2.3.2.1.", "D.....D.....", "..d.d...d.d.", "0.2.3.4.3.2."))
# The styles of other bars; one that is played in several has one name.
STYLES = (
    *IN_FOUR,
    Style(name="waltz", beats_per_bar=3, kits=(40, 0, 32),
        drums=({"kick": "X...........", "rim": "....x...x..."},
               {"kick": "X...........", "snare": "....x...x...", "ride": "x...x.o.x..."},
               {"kick": "X.........x.", "snare": "....x...x...", "closed": "x.o.x.o.x.o."}),
        bass=("R...........", "R.......5...", "R...5...A..."), bass_programs=(32, 33, 35),
        comping=("....d...d...", "D...d...d...", "0.1.2.3.2.1."), comping_programs=(24, 25, 21, 46),
        pads=(48, 49, 40, 73, 21), pad_share=0.6, drum_share=0.8),
    replace(_BALLAD, beats_per_bar=3,
        drums=({"kick": "X.......x...", "rim": "....x...x...", "closed": "x.o.x.o.x.o."},
               {"kick": "X.....x.....", "snare": "........X...", "closed": "x.x.x.x.x.x."},
               {"kick": "X...........", "snare": "....x...x...", "ride": "x...x.o.x.o."}),
        bass=("R...........", "R.......5...", "R.....R.A..."),
        comping=("0.1.2.3.2.1.", "D...........", "0.2.1.2.3.2.")),
    replace(_FOLK, beats_per_bar=3,
        drums=({"kick": "X...........", "tambourine": "....x...x...", "shaker": "x.o.x.o.x.o."},
               {"kick": "X.......x...", "rim": "....x...x.x.", "pedal": "....x...x..."}),
        bass=("R...........", "R...5...5..."), comping=("D...d.d.d.d.", "0.2.1.2.3.2.", "D...d...d.d.")),
    replace(_SOUL, beats_per_bar=3,
        drums=({"kick": "X......x....", "snare": "....X...X...", "closed": "x.xox.x.x.xo"},
               {"kick": "X.......x...", "snare": "....X..o....", "ride": "x.x.x.x.x.x."}),
        bass=("R.....5.8...", "R..R..5.R..A"), comping=("D.....d.d...", "....d..d....", "d..d....d...")),
    replace(_SHUFFLE, beats_per_bar=3,
        drums=({"kick": "X...........", "snare": "......o....x", "ride": "x...x..xx..x"},
               {"kick": "X......x....", "snare": "....x...x..o", "closed": "x..xx..xx..x"}),
        bass=("R...3...5...", "R...5...A...", "R......R5..A"),
        comping=("...d....d...", "d......d....", "....d..d....")),
    Style(name="march", beats_per_bar=2, kits=(0, 48, 16),
        drums=({"kick": "X...X...", "snare": "..x.x.xx"}, {"kick": "X...x...", "snare": "x.ooX.xx"},
               {"kick": "X...X...", "snare": "..X...X.", "closed": "..x...x."}),
        bass=("R...5...", "R...A...", "R...R..."), bass_programs=(58, 32, 33),
        comping=("..d...d.", "..d..d.d", "D...D..."), comping_programs=(21, 24, 25, 61),
        pads=(60, 61, 48, 71, 73)),
    *(replace(style, beats_per_bar=2) for style in (_BALLAD, _FOLK, _DISCO, _SHUFFLE)),
    _SLOW_SIX,
    replace(_FOLK, beats_per_bar=6,
        drums=({"kick": "X.....x.....", "tambourine": "......x.....", "shaker": "x.o.o.x.o.o."},
               {"kick": "X...........", "rim": "......x...x.", "pedal": "......x....."}),
        bass=("R.....5.....", "R.....R...A."), comping=("D...d.D...d.", "0.2.1.2.3.2.", "D.....d.d.d.")),
    replace(_SOUL, beats_per_bar=6, swing=(0.0, 0.0), drums=_SLOW_SIX.drums, bass=_SLOW_SIX.bass,
        comping=("..d.d...d.d.", "D.....d...d.", "......d.....")),
)
# fmt: on


def styles_for(beats_per_bar: int) -> list[Style]:
    """The styles that bars of so many beats can be played in."""
    return [style for style in STYLES if style.beats_per_bar == beats_per_bar]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One sixteenth of the excerpt."""

    start: float
    end: float
    position: int  # in the pattern
    bar: int
    last_of_bar: bool  # in its last beat, of six in its second half


class Band:
    """Draws one arrangement of an excerpt; every draw comes from rng."""

    def __init__(
        self,
        excerpt: Excerpt,
        style: Style,
        rng: np.random.Generator,
        *,
        breaks: bool = False,
        grooves: Grooves | None = None,
    ) -> None:
        """breaks: stems may rest, for blocks of bars or throughout, so that this can be learned.

        grooves: in a share of the arrangements the drums are a drummer's performance in the style.
        """
        self.excerpt, self.style, self.rng = excerpt, style, rng
        self.breaks = rng.spawn(1)[0] if breaks else None  # the other draws stay as they are
        self.steps = self._make_steps()
        self.groove = None if grooves is None else self._choose_groove(grooves, rng.spawn(1)[0])
        self.bars = self.steps[-1].bar + 1
        self.block_bars = int(rng.choice(FILL_BARS))
        # Density of each block of bars: 0 = thin (no drums or bass pattern), 1 = light, 2 = full.
        blocks = self.bars // self.block_bars + 1
        self.density = rng.choice([1, 2, 2, 2], size=blocks)
        if rng.random() < 0.35:
            self.density[0] = 0

    def arrange(self) -> dict[str, list[Part]]:
        """The parts of each accompaniment stem: drums, bass, other."""
        style, rng = self.style, self.rng
        other = [self._piano()] if self.excerpt.piano else []
        if rng.random() < style.comping_share:
            other.append(self._comping())
        if rng.random() < style.pad_share:
            other.append(self._pad())
        if not other:  # somebody plays the chords of a lead sheet
            other.append(self._comping())
        drums = [self._drums()] if rng.random() < style.drum_share else []
        parts = {"drums": drums, "bass": [self._bass()], "other": other}
        if self.breaks is not None:
            self._rest(parts, self.breaks)
        return parts

    def _rest(self, parts: dict[str, list[Part]], rng: np.random.Generator) -> None:
        """Silence stems in blocks of bars, never chords and bass at once, never a song's last bar."""
        blocks = self.bars // self.block_bars + 1
        resting = np.repeat(rng.random((len(parts), 1)) < _RESTING_STEM_SHARE, blocks, axis=1)
        if rng.random() < _BREAKING_SHARE:
            resting |= rng.random(resting.shape) < _BREAK_SHARE
        resting[list(parts).index("other")] &= ~resting[list(parts).index("bass")]
        resting[:, self.density == 0] = False  # of a thin block little would be left
        starts = np.array([step.start for step in self.steps])
        bars = np.array([step.bar for step in self.steps])
        rings = np.array([self._rings(step) for step in self.steps])
        for stem, rests in zip(parts.values(), resting, strict=True):
            silent = rests[bars // self.block_bars] & ~rings
            edges = np.append(starts, self.excerpt.seconds)
            for part in stem:
                part.notes = [
                    (start, min(end, self._next_rest(silent, edges, start)), pitch, velocity)
                    for start, end, pitch, velocity in part.notes
                    if not silent[max(0, int(np.searchsorted(starts, start + 0.02, "right")) - 1)]
                ]

    @staticmethod
    def _next_rest(silent: np.ndarray, edges: np.ndarray, start: float) -> float:
        """When a stem's next rest after `start` begins; a note holds no longer."""
        step = max(0, int(np.searchsorted(edges, start + 0.02, "right")) - 1)
        later = np.flatnonzero(silent[step:])
        return max(float(edges[step + later[0]]), start + 0.04) if len(later) else float("inf")

    def _make_steps(self) -> list[Step]:
        excerpt, style = self.excerpt, self.style
        beats = np.array([*excerpt.beats, excerpt.seconds])
        tempo = 60 / excerpt.beat_seconds
        low, high = style.beats_per_minute
        # The felt tempo may be half or twice the counted one: the pattern then lasts two bars or half a bar.
        feel = 0.5 if tempo > high else 2.0 if tempo * 2 <= high and self.rng.random() < 0.7 else 1.0
        if style.beats_per_bar != 4:
            feel = 1.0
        self.feel = feel
        per_beat = 2 if style.beats_per_bar == 6 else int(4 * feel)
        pattern_steps, bar_steps = len(style.bass[0]), style.beats_per_bar * per_beat
        pattern_bars = max(1, pattern_steps // bar_steps)
        swing = self.rng.uniform(*style.swing)
        downbeats = set(excerpt.downbeats)
        fill_beats = 3 if style.beats_per_bar == 6 else 1
        steps: list[Step] = []
        bar, in_bar = -1, 0
        for beat in range(len(beats) - 1):
            if beat in downbeats or bar < 0:
                bar += 1
                in_bar = bar % pattern_bars * bar_steps
            width = (beats[beat + 1] - beats[beat]) / per_beat
            for step in range(per_beat):
                late = swing if step % 2 == 1 else 0.0
                position = in_bar % pattern_steps
                steps.append(
                    Step(
                        start=float(beats[beat] + (step + late) * width),
                        end=float(beats[beat] + (step + 1) * width),
                        position=position,
                        bar=bar,
                        last_of_bar=not downbeats.isdisjoint(range(beat + 1, beat + 1 + fill_beats)),
                    )
                )
                in_bar += 1
        return steps

    def _rings(self, step: Step) -> bool:
        """Whether the song ends here: chords are struck once and ring out, the drums are silent."""
        return (
            self.excerpt.last_bar_seconds is not None and step.start >= self.excerpt.last_bar_seconds - 0.02
        )

    def _level(self, step: Step) -> int:
        return int(self.density[step.bar // self.block_bars])

    def _humanize(self, start: float, velocity: float) -> tuple[float, int]:
        start = max(0.0, start + float(self.rng.normal(0, 0.004)))
        return start, int(np.clip(velocity + self.rng.normal(0, 5), 18, 127))

    def _chord(self, time: float) -> tuple[int, tuple[int, ...], int] | None:
        for span in self.excerpt.chords:
            if time < span.end - 0.02:
                return parse_chord(span.label)
        return None

    def _chord_end(self, time: float) -> float:
        for span in self.excerpt.chords:
            if time < span.end - 0.02:
                return span.end
        return self.excerpt.seconds

    def _add(self, part: Part, start: float, end: float, pitch: int, velocity: float) -> None:
        start, loudness = self._humanize(start, velocity)
        part.notes.append((start, max(end, start + 0.04), pitch, loudness))

    def _drums(self) -> Part:
        style, rng = self.style, self.rng
        part = Part(program=int(rng.choice(style.kits)), is_drums=True)
        pattern = style.drums[rng.integers(len(style.drums))]
        busy = rng.uniform(0.0, 0.08)  # chance of an extra ghost stroke
        fills = rng.random() < 0.8
        toms = ("snare", "high_tom", "mid_tom", "low_tom")
        if self.groove is not None:
            self._perform(part, self.groove)
        for step in self.steps:
            if self._rings(step):
                for name in ("kick", "crash"):  # the song's last stroke
                    self._add(part, step.start, self.excerpt.seconds, DRUM_KEYS[name], STROKES["X"])
                break
            level = self._level(step)
            end_of_block = step.bar % self.block_bars == self.block_bars - 1
            if step.position == 0 and step.bar % self.block_bars == 0 and step.bar > 0 and level > 0:
                self._add(part, step.start, step.end + 1.0, DRUM_KEYS["crash"], 92)
            if self.groove is not None:
                continue
            if level == 0 and not (end_of_block and step.last_of_bar):
                continue
            if fills and end_of_block and step.last_of_bar:
                if rng.random() < 0.75:
                    drum = toms[min(3, int(rng.integers(4) * 0.5 + step.position % 4 * 0.75))]
                    self._add(part, step.start, step.end, DRUM_KEYS[drum], rng.uniform(70, 110))
                continue
            for name, strokes in pattern.items():
                stroke = strokes[step.position]
                if level == 1 and name in ("snare", "clap", "open") and stroke == "o":
                    continue
                if stroke in STROKES:
                    self._add(part, step.start, step.end, DRUM_KEYS[name], STROKES[stroke])
                elif name in ("kick", "snare") and rng.random() < busy * 0.3:
                    self._add(part, step.start, step.end, DRUM_KEYS[name], 45)
        return part

    def _choose_groove(self, grooves: Grooves, rng: np.random.Generator) -> list[np.ndarray] | None:
        if rng.random() > GROOVE_SHARE:
            return None
        steps_per_beat = 2 if self.style.beats_per_bar == 6 else 4
        beats = len(self.style.bass[0]) // steps_per_beat  # of the pattern
        return grooves.draw(self.style.name, beats, self.feel * 60 / self.excerpt.beat_seconds, rng)

    def _perform(self, part: Part, bars: list[np.ndarray]) -> None:
        """Play a drummer's bars over and over, warped to the beats; lighter where the arrangement is."""
        grid = np.array([self.steps[0].start, *(step.end for step in self.steps)])  # without swing
        starts = [index for index, step in enumerate(self.steps) if index == 0 or step.position == 0]
        steps_per_beat = 2 if self.style.beats_per_bar == 6 else 4
        for number, (first, last) in enumerate(zip(starts, [*starts[1:], len(self.steps)], strict=True)):
            for beat, key, velocity in bars[number % len(bars)]:
                place = first + beat * steps_per_beat
                step = self.steps[min(max(int(place), 0), len(self.steps) - 1)]
                level = self._level(step)
                if place > last - 0.5 or self._rings(step) or level == 0 or (level == 1 and velocity < 45):
                    continue
                start = float(np.interp(place, np.arange(len(grid)), grid))
                part.notes.append((start, start + 0.1, int(key), int(velocity)))

    def _bass(self) -> Part:
        style, rng = self.style, self.rng
        part = Part(program=int(rng.choice(style.bass_programs)))
        pattern = style.bass[rng.integers(len(style.bass))]
        low = int(rng.integers(28, 34))  # lowest note
        hold = rng.uniform(0.75, 1.0)
        starts = [
            index for index, step in enumerate(self.steps) if self._bass_tone(pattern, index) is not None
        ]
        for index, following in zip(starts, [*starts[1:], len(self.steps)], strict=True):
            step = self.steps[index]
            chord = self._chord(step.start)
            tone = self._bass_tone(pattern, index)
            if chord is None or tone is None or (self._level(step) == 0 and tone != "R"):
                continue
            root, intervals, bass = chord
            offset = {"R": bass - root, "5": intervals[2], "3": intervals[1], "8": bass - root}[tone]
            pitch = low + (root + offset - low) % 12 + (12 if tone == "8" else 0)
            limit = self.steps[following].start if following < len(self.steps) else self.excerpt.seconds
            end = min(limit, self._chord_end(step.start))
            self._add(part, step.start, step.start + (end - step.start) * hold, pitch, 94)
        return part

    def _bass_tone(self, pattern: str, index: int) -> str | None:
        """The pattern's tone at a step; a new chord always gets its root; "A" leads there by the fifth."""
        step = self.steps[index]
        previous = self.steps[index - 1].start if index else -1.0
        if index == 0 or self._chord_end(previous) <= step.start + 0.02:
            return "R"
        if self._rings(step):
            return None if self._rings(self.steps[index - 1]) else "R"
        tone = pattern[step.position]
        if tone == "A":
            return "5"
        return tone if tone in "R538" else None

    def _voicing(self, chord: tuple[int, tuple[int, ...], int], low: int) -> list[int]:
        root, intervals, _ = chord
        return sorted(low + (root + interval - low) % 12 for interval in intervals)

    def _comping(self) -> Part:
        style, rng = self.style, self.rng
        part = Part(program=int(rng.choice(style.comping_programs)), pan=float(rng.uniform(0.15, 0.85)))
        pattern = style.comping[rng.integers(len(style.comping))]
        low = int(rng.integers(50, 60))
        guitar = 24 <= part.program <= 31
        loudness = rng.uniform(58, 80)
        rests = style.name not in ("ballad", "folk", "bossa", "waltz", "slow_six") and self.excerpt.piano
        for index, step in enumerate(self.steps):
            mark = pattern[step.position]
            if self._rings(step):
                mark = "D" if self._bass_tone(".", index) else "."
            if mark == "." or (self._level(step) == 0 and rests):
                continue
            chord = self._chord(step.start)
            if chord is None:
                continue
            tones = self._voicing(chord, low)
            chord_end = self._chord_end(step.start)
            if mark.isdigit():
                tone = int(mark)
                pitch = tones[tone % len(tones)] + 12 * (tone // len(tones))
                self._add(part, step.start, min(chord_end, step.start + 0.9), pitch, loudness)
                continue
            longest = 1e6 if self._rings(step) else {"D": 8, "d": 2, "m": 0.5}[mark]
            end = min(chord_end, step.start + longest * (step.end - step.start))
            strum = rng.uniform(0.004, 0.014) if guitar else 0.0
            if guitar and mark == "D":
                tones = [*tones, tones[0] + 12]
            order = tones if step.position % 4 == 0 else tones[::-1]
            velocity = loudness * (0.55 if mark == "m" else 1.0)
            for number, pitch in enumerate(order):
                self._add(part, step.start + number * strum, end, pitch, velocity)
        return part

    def _pad(self) -> Part:
        rng = self.rng
        part = Part(program=int(rng.choice(self.style.pads)), pan=float(rng.uniform(0.3, 0.7)))
        low = int(rng.integers(52, 62))
        top = rng.random() < 0.4
        skip_first = rng.random() < 0.3
        velocity = rng.uniform(45, 70)
        for span in self.excerpt.chords:
            chord = parse_chord(span.label)
            if chord is None or (skip_first and span.start < self.excerpt.seconds * 0.25):
                continue
            tones = self._voicing(chord, low)[:3]
            for pitch in [*tones, tones[0] + 12] if top else tones:
                self._add(part, span.start, span.end - 0.03, pitch, velocity)
        return part

    def _piano(self) -> Part:
        """The arrangement as POP909 gives it, its velocities drawn to a random curve."""
        rng = self.rng
        part = Part(program=int(rng.choice(self.style.pianos)), pan=float(rng.uniform(0.35, 0.65)))
        power, top = rng.uniform(0.6, 1.2), rng.uniform(85, 112)
        # Part of the items keep the arrangement sparse so that the other instruments are heard.
        keep = rng.choice([1.0, 1.0, 1.0, 0.7])
        for note in self.excerpt.piano:
            if 21 <= note.pitch <= 108 and (keep == 1.0 or rng.random() < keep):
                velocity = int(np.clip(top * (note.velocity / 110) ** power, 22, 118))
                part.notes.append((note.start, max(note.end, note.start + 0.04), note.pitch, velocity))
        return part
