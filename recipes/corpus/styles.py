"""The playing styles of the band: patterns in sixteenths of a bar of four beats, and General MIDI programs.

Drum patterns: "X" accent, "x" stroke, "o" ghost stroke, "." rest. Bass: "R" root, "5" fifth, "8" octave,
"3" third, "A" approach to the next chord. Comping: "D" long chord, "d" short chord, "m" muted chord,
"0".."5" one chord tone (arpeggio). Each style offers several variants of a pattern; an item draws one.
"""

from dataclasses import dataclass, field


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
    beats_per_minute: tuple[float, float] = field(default=(60.0, 125.0))  # felt tempo the patterns suit


DRUM_KEYS = {
    "kick": 36,
    "rim": 37,
    "snare": 38,
    "clap": 39,
    "closed": 42,
    "pedal": 44,
    "open": 46,
    "low_tom": 45,
    "mid_tom": 47,
    "high_tom": 50,
    "crash": 49,
    "ride": 51,
    "tambourine": 54,
    "cowbell": 56,
    "shaker": 70,
    "high_conga": 63,
    "low_conga": 64,
    "claves": 75,
}

STYLES = (
    Style(
        name="ballad",
        kits=(0, 8, 40),
        drums=(
            {"kick": "X.........x.....", "rim": "....x.......x...", "closed": "x.o.x.o.x.o.x.o."},
            {"kick": "X.......x.x.....", "snare": "....X.......X...", "closed": "x.x.x.x.x.x.x.x."},
            {"kick": "X.....x...x.....", "snare": "....x.......x...", "ride": "x...x.o.x...x.o."},
        ),
        bass=("R.......5.......", "R.......R.....A.", "R.....R.5......."),
        bass_programs=(32, 33, 35),
        comping=("0.1.2.1.3.2.1.2.", "D.......D.......", "0.2.1.2.0.2.3.2."),
        comping_programs=(24, 25, 27, 46),
        pads=(48, 49, 50, 89, 91),
        pad_share=0.85,
        beats_per_minute=(50, 95),
    ),
    Style(
        name="rock",
        kits=(0, 8, 16),
        drums=(
            {"kick": "X.......X.x.....", "snare": "....X.......X...", "closed": "X.x.X.x.X.x.X.x."},
            {"kick": "X..x....X..x....", "snare": "....X.......X...", "ride": "X.x.X.x.X.x.X.x."},
            {"kick": "X.x.....x.x...x.", "snare": "....X.......X..o", "open": "X...X...X...X..."},
        ),
        bass=("R.R.R.R.R.R.R.R.", "R...R...R...R.A.", "R..RR...R..RR.5."),
        bass_programs=(33, 34),
        comping=("D.......D.....d.", "d.d.d.d.d.d.d.d.", "D...d.d...D.d.d."),
        comping_programs=(29, 30, 27),
        pads=(16, 18, 48),
        pad_share=0.3,
    ),
    Style(
        name="funk",
        kits=(0, 8, 16),
        drums=(
            {"kick": "X..x..x...x..x..", "snare": "....X..o.o..X..o", "closed": "xoxoxoxoxoxoxoxo"},
            {"kick": "X.x.......xx....", "snare": "....X..o....X.o.", "closed": "x.xxx.xxx.xxx.x."},
        ),
        bass=("R..8..R...5.R..A", "R.R...8.R..5..A.", "R...8..RR.5...A."),
        bass_programs=(33, 36, 37),
        comping=("..dm..d...dm.d..", "m.dmm.d.m.dm..d.", "d..d..d...d..d.."),
        comping_programs=(27, 28, 7),
        pads=(61, 62, 17),
        pianos=(4, 5, 0),
        pad_share=0.3,
        swing=(0.0, 0.2),
        beats_per_minute=(75, 125),
    ),
    Style(
        name="bossa",
        kits=(40, 32, 0),
        drums=(
            {"kick": "X..xX..xX..xX..x", "rim": "x..x..x...x..x..", "closed": "x.x.x.x.x.x.x.x."},
            {"kick": "X..x....X..x....", "rim": "..x..x....x..x..", "shaker": "xoxoxoxoxoxoxoxo"},
        ),
        bass=("R..55..RR..55..A", "R..R5..5R..R5..5"),
        bass_programs=(32, 35),
        comping=("D..d..d...d..d..", "d..d..d.d..d.d.."),
        comping_programs=(24, 26),
        pads=(48, 52, 73),
        pad_share=0.35,
        beats_per_minute=(60, 110),
    ),
    Style(
        name="reggae",
        kits=(0, 8),
        drums=(
            {"kick": "........X.......", "rim": "........x.......", "closed": "..x...x...x...x."},
            {"kick": "X.......X.......", "snare": "........x.....o.", "closed": "x.x.x.x.x.x.x.x."},
        ),
        bass=("R...R.5...R.3...", "....R..R5...R.3.", "R..R..5.R......."),
        bass_programs=(33, 32, 39),
        comping=("....d.......d...", "....d.d.....d.d."),
        comping_programs=(27, 28, 25),
        pads=(16, 17, 18),
        pianos=(0, 16, 4),
        pad_share=0.5,
        swing=(0.0, 0.3),
        beats_per_minute=(60, 100),
    ),
    Style(
        name="electronic",
        kits=(25, 24),
        drums=(
            {"kick": "X...X...X...X...", "clap": "....X.......X...", "open": "..x...x...x...x."},
            {"kick": "X...X...X...X...", "snare": "....x.......x..o", "closed": "xoxoxoxoxoxoxoxo"},
            {"kick": "X.....x...x.....", "clap": "....X.......X...", "closed": "x.xxx.x.x.xxx.xx"},
        ),
        bass=("..R...R...R...R.", "R.RR.RR.R.RR.RR.", "R.8.R.8.R.8.R.8."),
        bass_programs=(38, 39, 87),
        comping=("0123210301232103", "d..d..d...d..d..", "0.1.2.3.4.3.2.1."),
        comping_programs=(80, 81, 84, 10),
        pads=(89, 90, 94, 95),
        pianos=(0, 2, 5, 81),
        pad_share=0.85,
        beats_per_minute=(75, 135),
    ),
    Style(
        name="folk",
        kits=(40, 0),
        drums=(
            {"kick": "X.......x.......", "tambourine": "....x.......x...", "shaker": "x.o.x.o.x.o.x.o."},
            {"kick": "X.......X.......", "rim": "....x.......x.x.", "pedal": "....x.......x..."},
        ),
        bass=("R.......5.......", "R...5...R...5..."),
        bass_programs=(32,),
        comping=("D...d.d...d.d.d.", "0.2.1.2.0.2.1.3.", "D.d.d.d.D.d.d.d."),
        comping_programs=(25, 24, 105, 15),
        pads=(21, 40, 41, 48, 73),
        pianos=(0, 3, 24),
        pad_share=0.45,
        drum_share=0.7,
        comping_share=1.0,
    ),
    Style(
        name="soul",
        kits=(0, 32, 8),
        drums=(
            {"kick": "X......x..x.....", "snare": "....X.......X...", "closed": "x.xox.x.x.xox.x."},
            {"kick": "X..x......xx....", "snare": "....X..o.o..X...", "ride": "x.x.x.x.x.x.x.x."},
        ),
        bass=("R.....5.8..R..A.", "R..R..5...R.3.A.", "R.....RR5.....A."),
        bass_programs=(33, 32),
        comping=("D.....d.....d...", "....d..d....d...", "d..d......d..d.."),
        comping_programs=(4, 16, 26, 27),
        pads=(61, 48, 52, 17),
        pianos=(4, 0, 5),
        pad_share=0.6,
        swing=(0.1, 0.5),
        beats_per_minute=(55, 105),
    ),
    Style(
        name="disco",
        kits=(0, 16, 24),
        drums=(
            {"kick": "X...X...X...X...", "snare": "....X.......X...", "open": "..x...x...x...x."},
            {"kick": "X...X...X...X...", "clap": "....X.......X...", "closed": "x.xxx.xxx.xxx.xx"},
        ),
        bass=("R.8.R.8.R.8.R.8.", "R..RR.8.R..R5.8."),
        bass_programs=(33, 36, 38),
        comping=("..d...d...d...d.", "dmd.dmd.dmd.dmd."),
        comping_programs=(27, 28),
        pads=(48, 50, 61, 44),
        pianos=(0, 1, 2, 5),
        pad_share=0.75,
        beats_per_minute=(85, 135),
    ),
    Style(
        name="shuffle",
        kits=(0, 32, 40),
        drums=(
            {"kick": "X.......X.......", "snare": "....X.......X...", "ride": "x..xx..xx..xx..x"},
            {"kick": "X......xX.......", "snare": "....x.......x..o", "closed": "x..xx..xx..xx..x"},
        ),
        bass=("R...3...5...A...", "R..RR..5R..55..A"),
        bass_programs=(32, 33),
        comping=("...d.......d....", "d......d........", "....d..d....d..d"),
        comping_programs=(26, 16, 27),
        pads=(61, 66, 16),
        pianos=(0, 3, 0),
        swing=(0.33, 0.66),
        pad_share=0.3,
        beats_per_minute=(60, 115),
    ),
)
STYLE_NAMES = tuple(style.name for style in STYLES)
