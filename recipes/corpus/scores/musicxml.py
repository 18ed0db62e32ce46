"""Songs in MusicXML: OpenEWLD's lead sheets (Simonetta 2018) and OpenScore Lieder (voice and piano).

Repeats and endings are played out, tempo marks in words become a tempo, and where a piano part has no chord
symbols above it the chords are estimated from it. Read by music21 (BSD licence).
"""

import gzip
import hashlib
import io
import json
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError, fromstring

import numpy as np

from duotok.recipes.corpus.scores.piano_chords import estimate_piano_chords
from duotok.recipes.corpus.scores.song import Note, Song, Songs, Span, make_monophonic
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import failure_reason, write_bytes
from duotok.tokenizer.music.labels import NO_CHORD, name_key, name_note, nearest_triad, parse_chord
from duotok.tokenizer.music.progressions import KEYS, load_progressions

READER = 1  # a cache of songs that were read in another way is not read
MEMBER = re.compile(r"(?:^|/)([^/]+)\.(?:mxl|musicxml|xml)$")
LIED_FILE = re.compile(r"lc\d+$")
LIED_NUMBER = re.compile(r"^\d+[a-z]?_")  # of a cycle, before the title
# For test, and as many for validation: 40 songs of each source, as many more of Lieder as are left out.
HELD_OUT_TITLES = {"openewld": 40, "lieder": 44}
LARGEST_XML_BYTES = 20_000_000
MOST_BARS = 3_000
FEWEST_NOTES = 16
LEAST_METER_SHARE = 0.75  # of a song that are bars of its own meter
FEWEST_CHORDS_PER_BAR = 0.1  # of a lead sheet
DRAWN_TEMPO_BPM = (80, 126)  # quarters; where the score says nothing
TEMPO_RANGE_BPM = (60, 160)  # beats are chosen so that they come as fast, if they can
MOST_TEMPO_CHANGE = 1.6  # against the tempo of most of the song
VELOCITY = 80
ENDING_WEIGHT = 0.5  # of the last chord, for the key
SMALL = 1e-6  # quarters
# Quarters per minute of tempo words, the longer ones first; only the beginning of a word is compared.
TEMPO_WORDS = {
    **dict.fromkeys(("larghetto", "slowly", "slow", "langsam", "lent", "grave", "breit"), 60),
    **dict.fromkeys(("largo", "adagio", "getragen"), 54),
    **dict.fromkeys(("ruhig", "tranquil", "gemächlich", "sostenuto", "innig", "zart", "ballad"), 72),
    **dict.fromkeys(("andantino", "gehend", "gently"), 82),
    **dict.fromkeys(("andante", "sanft", "dolce"), 76),
    **dict.fromkeys(("moderat", "modéré", "mäßig", "mässig", "medium", "maestoso", "marcia", "marsch"), 96),
    **dict.fromkeys(("allegretto", "bewegt", "leicht", "animé", "con moto", "march", "waltz", "lilt"), 108),
    **dict.fromkeys(("allegro", "animato", "geschwind", "frisch", "munter", "lively", "bright", "fast"), 124),
    **dict.fromkeys(("lebhaft", "rasch", "agitato", "leidenschaftlich", "feurig", "vite"), 128),
    **dict.fromkeys(("vivace", "schnell", "quick", "vif"), 138),
    "presto": 160,
}
CALM_BPM = 92  # "very" leads away from it, "somewhat" and "not too" halfway back
VERY = re.compile(r"\b(sehr|molto|assai|very|très|possible|möglich)")
SOMEWHAT = re.compile(
    r"\b(etwas|ziemlich|un poco|poco|assez|rather|non|nicht|not|ma non|sans|quasi|un peu|mezzo)\b"
)
COMMON_WORDS = {
    "en": "the and of my to a i is that with you for all her his love when thou it but me we be she he on",
    "de": "und die der ich das nicht du ist ein den mir in so mein es dir wie zu auf",
    "fr": "le la les et des je un une est dans mon qui pour vous que du sur ne pas tout",
    "it": "il che di non mio per un mi con del ma più io ti sei è cor amor",
    "es": "el que y los de en un las mi por con se del una yo es",
    "la": "et in te sancta dei domine gloria est ave maria gratia pro nobis ora",
}
# Kinds of chord in MusicXML that Harte's syntax writes otherwise; of the others the first part is taken.
CHORD_KINDS = {
    "major": "maj", "minor": "min", "dominant": "7", "dominant-seventh": "7", "major-seventh": "maj7",
    "minor-seventh": "min7", "diminished": "dim", "diminished-seventh": "dim7", "half-diminished": "hdim7",
    "half-diminished-seventh": "hdim7", "augmented": "aug", "augmented-seventh": "aug(b7)",
    "major-minor": "minmaj7", "minor-major-seventh": "minmaj7", "major-sixth": "maj6", "minor-sixth": "min6",
    "dominant-ninth": "9", "major-ninth": "maj9", "minor-ninth": "min9", "dominant-11th": "11",
    "major-11th": "maj11", "minor-11th": "min11", "dominant-13th": "13", "major-13th": "maj13",
    "minor-13th": "min13", "suspended-second": "sus2", "suspended-fourth": "sus4",
    "suspended-fourth-seventh": "7sus4", "power": "5",
}  # fmt: skip
LOOKS = ("print", "beam", "stem", "staff", "staves", "clef", "notehead", "accidental", "instrument")
DEGREES = ("1", "b2", "2", "b3", "3", "4", "b5", "5", "b6", "6", "b7", "7")
BROKEN = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ArithmeticError,
    RecursionError,
)


class MusicXml(Songs):
    """The songs among the files (path -> content) of a folder or tar.gz of MusicXML."""

    def __init__(self, path: Path, files: dict[str, bytes], cache: Path | None = None) -> None:
        """cache: a folder where songs that were read are kept, by the hash of their content."""
        self.files: dict[str, bytes] = {}
        self.titles: dict[str, str] = {}
        for file, content in sorted(files.items()):
            if (match := MEMBER.search(file)) and "META-INF" not in file:
                folder, name = file.split("/")[-2:][0], match[1]
                title = LIED_NUMBER.sub("", folder) if LIED_FILE.match(name) else name
                while name in self.files:
                    name += "+"  # another song of this name
                self.files[name] = content
                self.titles[name] = "".join(letter for letter in title.casefold() if letter.isalnum())
        self.cache = cache
        super().__init__(path, sorted(self.files))
        lieder = sum(bool(LIED_FILE.match(name)) for name in self.names)
        self.source = "lieder" if 2 * lieder > len(self.names) else "openewld"
        # Songs of one title stay together.
        titles = sorted(set(self.titles.values()), key=lambda title: _hash(self.source, title))
        count = HELD_OUT_TITLES[self.source]
        self.held_out = dict.fromkeys(titles[:count], "test")
        self.held_out |= dict.fromkeys(titles[count : 2 * count], "validation")

    def split_of(self, name: str) -> str:
        """By a hash of the song's title."""
        return self.held_out.get(self.titles[name], "train")

    def read(self, name: str) -> Song:
        """Parse one song, or take it from the cache; raises DataError saying why it is left out."""
        content = self.files[name]
        key = hashlib.sha256(f"{READER} {self.source} {name} ".encode() + content).hexdigest()[:32]
        stored = None if self.cache is None else self.cache / f"{key}.json.gz"
        values: Any = None if stored is None else _load(stored)
        if values is None:
            try:
                values = asdict(parse_song(name, self.source, content))
            except DataError as error:
                values = {"error": str(error)}
            if stored is not None:
                stored.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(values, separators=(",", ":"), default=float)
                write_bytes(stored, gzip.compress(text.encode(), mtime=0))
        if "error" in values:
            raise DataError(f"song {name} of {self.path}: {values['error']}")
        values |= {part: [Note(**note) for note in values[part]] for part in ("melody", "piano")}
        values |= {part: [Span(**span) for span in values[part]] for part in ("chords", "keys")}
        song: dict[str, Any] = {key: tuple(it) if isinstance(it, list) else it for key, it in values.items()}
        return Song(**song)


def _hash(*words: str) -> int:
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:6])


def _load(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):
        return None  # missing or damaged: the song is read anew
    return values if isinstance(values, dict) else None


def parse_song(name: str, source: str, content: bytes) -> Song:
    """The song of a .mxl or .musicxml file; raises DataError saying what is wrong with it."""
    from music21.exceptions21 import Music21Exception

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _make_song(name, source, _read_sheet(_unzip(content)))
    except (zipfile.BadZipFile, zlib.error, ParseError, Music21Exception, *BROKEN) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"broken MusicXML ({type(error).__name__}: {failure_reason(error)[:80]})") from error


def _unzip(content: bytes) -> bytes:
    """The XML of the score, which .mxl files hold in a zip."""
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            inside = [
                member
                for member in archive.infolist()
                if member.filename.endswith((".xml", ".musicxml"))
                and not member.filename.startswith("META-INF")
            ]
            if not inside:
                raise DataError("no score in the .mxl file")
            with archive.open(inside[0]) as file:
                content = file.read(LARGEST_XML_BYTES + 1)
    if len(content) > LARGEST_XML_BYTES:
        raise DataError(f"the score is larger than {LARGEST_XML_BYTES // 1_000_000} MB")
    if b"<!ENTITY" in content:
        raise DataError("the score defines entities of its own")
    return content


def _strip(root: Element) -> None:
    """Take out what only concerns the look of a score: reading it takes half the time."""
    for note in root.iter("note"):
        note.attrib.clear()
        for notations in note.findall("notations"):
            for mark in [mark for mark in notations if mark.tag != "tied"]:
                notations.remove(mark)
    for parent in [
        parent for tag in ("measure", "note", "attributes", "direction") for parent in root.iter(tag)
    ]:
        for child in [child for child in parent if child.tag in LOOKS]:
            parent.remove(child)


class Written(NamedTuple):
    """A written note; quarters from the start of its bar."""

    start: float
    end: float
    pitch: int
    velocity: int
    goes_on: bool  # it is tied to the same pitch before it
    verses: dict[int, str]  # syllables by the number of the verse


@dataclass
class Bar:
    """A written bar; positions in quarters from its start."""

    length: float = 0.0  # of what stands in it
    signature: tuple[int, int] | None = None
    fifths: int | None = None  # sharps of the key signature, where there is one
    melody: list[Written] = field(default_factory=list)
    piano: list[Written] = field(default_factory=list)
    chords: list[tuple[float, str]] = field(default_factory=list)
    tempos: list[tuple[float, float]] = field(default_factory=list)  # quarters per minute

    @property
    def full_length(self) -> float:
        """What its signature asks for."""
        return 4 * self.signature[0] / self.signature[1] if self.signature else self.length


@dataclass
class Sheet:
    """A written score."""

    bars: list[Bar]
    order: list[int]  # the bars as they are played
    text_bpm: float | None  # the first tempo in words


def _read_sheet(xml: bytes) -> Sheet:
    from music21 import expressions, harmony, tempo
    from music21.musicxml.xmlToM21 import MusicXMLImporter

    root = fromstring(xml)
    if root.tag != "score-partwise":
        raise DataError(f"no score-partwise MusicXML but {root.tag[:40]}")
    keyboards = [part.find(".//staves") is not None for part in root.iter("part")]
    _strip(root)
    importer: Any = MusicXMLImporter()
    importer.xmlRootToScore(root, importer.stream)
    parts = [(part, list(part.getElementsByClass("Measure"))) for part in importer.stream.parts]
    count = max((len(measures) for _, measures in parts), default=0)
    if count == 0:
        raise DataError("no bars")
    bars = [Bar() for _ in range(count)]
    sung = [sum(1 for m in measures for n in m.recurse().notes if n.lyrics) for _, measures in parts]
    single = [place for place in range(len(parts)) if not keyboards[place]]
    if not single:
        raise DataError("no melody: all parts are a keyboard's")
    voice = max(single, key=lambda place: sung[place])
    text_bpm = None
    for place, (_, measures) in enumerate(parts):
        signature, fifths, velocity = None, None, float(VELOCITY)
        for bar, measure in zip(bars, measures, strict=False):
            bar.length = max(bar.length, float(measure.highestTime))
            if measure.timeSignature is not None:
                signature = (measure.timeSignature.numerator, measure.timeSignature.denominator)
            if measure.keySignature is not None:
                fifths = measure.keySignature.sharps
            if place == voice or bar.signature is None:
                bar.signature, bar.fifths = signature, fifths
            loudness = [(0.0, velocity)]
            for element in measure.getElementsByClass("Dynamic"):
                loudness.append((float(element.offset), 45 + 60 * element.volumeScalar))
            velocity = loudness[-1][1]
            for element in measure.elements:
                at = float(element.offset)
                if isinstance(element, harmony.ChordSymbol):
                    bar.chords.append((at, _harte(element)))
                elif isinstance(element, tempo.MetronomeMark):
                    if not element.numberImplicit and (bpm := element.getQuarterBPM()):
                        bar.tempos.append((at, float(bpm)))
                elif isinstance(element, expressions.TextExpression) and bar is bars[0]:
                    text_bpm = text_bpm or tempo_of(element.content)
            # Two voices in the vocal part: the upper one.
            voices = [_notes_of(stream, loudness) for stream in (measure, *measure.voices)]
            if place == voice:
                bar.melody = max(voices, key=lambda notes: np.mean([n.pitch for n in notes]) if notes else 0)
            elif keyboards[place] or not sung[place]:
                bar.piano += [note for notes in voices for note in notes]
    for bar in bars:
        bar.chords.sort()
        bar.tempos.sort()
    return Sheet(bars=bars, order=play_out(_read_marks(parts, count)), text_bpm=text_bpm)


def _notes_of(stream: Any, loudness: list[tuple[float, float]]) -> list[Written]:
    found = []
    for element in stream.getElementsByClass("NotRest"):
        length = float(element.duration.quarterLength)
        if (
            length <= 0
            or element.style.noteSize == "cue"
            or not element.pitches
            or "ChordSymbol" in element.classes
        ):
            continue  # a grace note, another reading, or no note at all
        start = float(element.offset)
        velocity = [value for at, value in loudness if at <= start][-1]
        verses = {lyric.number: _syllable(lyric) for lyric in element.lyrics}
        notes = element.notes if "Chord" in element.classes else (element,)
        for note in notes:
            tied = note.tie or element.tie
            goes_on = tied is not None and tied.type in ("stop", "continue")
            found.append(Written(start, start + length, note.pitch.midi, round(velocity), goes_on, verses))
    return found


def _syllable(lyric: Any) -> str:
    text = re.sub(r"[^\w'’ ]|[\d_]", " ", (lyric.text or "").replace("’", "'")).split()
    return " ".join(text) + "-" * bool(text and lyric.syllabic in ("begin", "middle"))


def _harte(symbol: Any) -> str:
    """A chord symbol as a Harte label."""
    kind = CHORD_KINDS.get(symbol.chordKind, "")
    if symbol.chordKind == "none" or symbol.root() is None:
        return "N"
    root = symbol.root().pitchClass
    changes = [
        f"{'*' if change.modType == 'subtract' else ''}{_accidental(change.interval)}{change.degree}"
        for change in symbol.chordStepModifications
    ]
    label = f"{name_note(root)}:{kind or 'maj'}"
    bass = symbol.bass().pitchClass if symbol.bass() is not None else root
    ending = f"/{DEGREES[(bass - root) % 12]}" if bass != root else ""
    for tried in (f"{label}({','.join(changes)}){ending}" if changes else label + ending, label):
        try:
            parse_chord(tried)
        except DataError:
            continue
        return tried
    return label


def _accidental(interval: Any) -> str:
    semitones = int(getattr(interval, "semitones", interval) or 0)
    return "#" * semitones if semitones > 0 else "b" * -semitones


@dataclass
class Marks:
    """What is written at a bar about the order of the bars."""

    opens: bool = False  # a repeat
    closes: int = 0  # a repeat, played so many times
    endings: set[int] = field(default_factory=set)  # the bar belongs to
    words: set[str] = field(default_factory=set)  # music21's classes: Segno, Coda, Fine, DaCapoAlFine, ...


def _read_marks(parts: list[tuple[Any, list[Any]]], count: int) -> list[Marks]:
    found = [Marks() for _ in range(count)]
    for part, measures in parts:
        place = {id(measure): index for index, measure in enumerate(measures)}
        for measure, marks in zip(measures, found, strict=False):
            for line in (measure.leftBarline, measure.rightBarline):
                if "Repeat" in getattr(line, "classes", ()):
                    marks.opens |= line.direction == "start"
                    marks.closes = max(marks.closes, (line.times or 2) * (line.direction == "end"))
            marks.words |= {type(mark).__name__ for mark in measure.getElementsByClass("RepeatExpression")}
        for bracket in part.getElementsByClass("RepeatBracket"):
            for measure in bracket.getSpannedElements():
                found[place[id(measure)]].endings |= set(bracket.numberRange)
    return found


def play_out(marks: Sequence[Marks]) -> list[int]:
    """Indices of the bars as they are played: repeats, endings, D.C. and D.S., Fine and Coda."""
    order: list[int] = []
    at, start, turn, jumped = 0, 0, 1, False
    codas = [index for index, bar in enumerate(marks) if "Coda" in bar.words]
    segno = next((index for index, bar in enumerate(marks) if "Segno" in bar.words), 0)
    while at < len(marks):
        bar = marks[at]
        if bar.opens and at != start:
            start, turn = at, 1
        last = max(
            (max(other.endings) for other in takewhile(lambda other: other.endings, marks[at:])), default=0
        )
        if bar.endings and (turn if not jumped else last) not in bar.endings:
            at += 1
            continue
        order.append(at)
        if len(order) > MOST_BARS:
            raise DataError(f"more than {MOST_BARS} bars")
        following = marks[at + 1].endings if at + 1 < len(marks) else set()
        if jumped and "Fine" in bar.words:
            break
        jump = next((word for word in bar.words if word.startswith(("DaCapo", "DalSegno", "AlSegno"))), None)
        if jumped and len(codas) > 1 and at == codas[0]:
            at, start, turn = codas[-1], codas[-1], 1
        elif bar.closes and not jumped and turn < (max(last, 2) if bar.endings else bar.closes):
            at, turn = start, turn + 1
        elif jump and not jumped:
            at, start, turn, jumped = (0 if jump.startswith("DaCapo") else segno), 0, 1, True
        else:
            if bar.closes or bar.endings and not following:
                start, turn = at + 1, 1
            at += 1
    return order


def tempo_of(words: str) -> float | None:
    """Quarters per minute of a tempo in words, Italian, German, French or English; None = it says nothing."""
    words = words.casefold()
    found = [(words.find(word), -len(word), bpm) for word, bpm in TEMPO_WORDS.items() if word in words]
    if not found:
        return None
    power = 1.3 if VERY.search(words) else 0.5 if SOMEWHAT.search(words) else 1.0
    return CALM_BPM * (min(found)[2] / CALM_BPM) ** power


def count_beats(signature: tuple[int, int], quarters_bpm: float) -> tuple[int, float] | None:
    """Beats of a bar (2, 3, 4, 6) and quarters of a beat, as felt at a tempo; None = another meter."""
    beats, quarters = signature[0], 4 / signature[1]
    if beats in (9, 12):
        return beats // 3, 3 * quarters
    if beats not in (2, 3, 4, 6):
        return None
    slowest, fastest = TEMPO_RANGE_BPM
    if beats == 4 and quarters_bpm / quarters > fastest:
        return 2, 2 * quarters
    if beats == 2 and quarters_bpm / quarters < slowest:
        return 4, quarters / 2
    return beats, quarters


def _make_song(name: str, source: str, sheet: Sheet) -> Song:
    bars = [sheet.bars[index] for index in sheet.order]
    if not any(bar.melody for bar in bars):
        raise DataError("no melody")
    if all(bar.signature is None for bar in bars):
        usual = Counter(bar.length for bar in bars).most_common(1)[0][0]
        for bar in sheet.bars:
            bar.signature = (round(usual * 2), 8) if usual % 1 else (round(usual), 4)
    tempo = _usual_tempo(name, source, sheet, bars)
    quarters_in: dict[tuple[int, int], float] = {}
    for bar in bars:
        if bar.signature:
            filled = bar.length or bar.full_length
            quarters_in[bar.signature] = quarters_in.get(bar.signature, 0.0) + filled
    meters = sorted(quarters_in, key=lambda meter: -quarters_in[meter])
    signature = meters[0]
    meter = count_beats(signature, tempo)
    if meter is None:
        raise DataError(f"the meter {signature[0]}/{signature[1]} has no 2, 3, 4 or 6 beats")
    if quarters_in[signature] < LEAST_METER_SHARE * sum(quarters_in.values()):
        raise DataError("the meter changes: " + ", ".join(f"{a}/{b}" for a, b in meters[:3]))
    grid = _lay_out(bars, meter[1])
    at_seconds = _clock(bars, grid.starts, tempo)
    played: Counter[int] = Counter()
    melody, piano = [], []
    chords: list[tuple[float, str]] = []
    keys: list[tuple[float, str]] = []  # sharps
    for index, start in zip(sheet.order, grid.starts, strict=True):
        bar = sheet.bars[index]
        verse = _choose_verse(bar.melody, played[index] + 1)
        played[index] += 1
        melody += [(start + n.start, start + n.end, n, n.verses.get(verse, "")) for n in bar.melody]
        piano += [(start + n.start, start + n.end, n, "") for n in bar.piano]
        before = next((b.chords[-1][1] for b in reversed(sheet.bars[:index]) if b.chords), "N")
        starting = [] if bar.chords and bar.chords[0][0] < SMALL else [(0.0, before)]
        chords += [(start + at, label) for at, label in (*starting, *bar.chords)]
        keys.append((start if keys else 0.0, "" if bar.fifths is None else str(bar.fifths)))
    end = grid.beats[-1] + meter[1]
    notes = make_monophonic(_to_notes(melody, at_seconds))
    accompaniment = tuple(_to_notes(piano, at_seconds))
    if len(notes) < FEWEST_NOTES:
        raise DataError(f"only {len(notes)} notes are sung")
    beats = tuple(round(float(time), 4) for time in at_seconds(np.array(grid.beats)))
    signatures = _to_spans(keys, end, at_seconds)
    symbols = sum(len(bar.chords) for bar in sheet.bars)
    if symbols >= FEWEST_CHORDS_PER_BAR * len(sheet.bars):
        spans = _to_spans([(0.0, "N"), *chords], end, at_seconds)
        named = _name_keys(signatures, spans, notes)
    elif accompaniment:
        # Chords and key help each other: the chords by the key's signature, the key by them, and again.
        edges = (*beats, round(float(at_seconds(np.array([end]))[0]), 4))
        spans: list[Span] = []
        named = [replace(span, label=name_key(7 * int(span.label or 0) % 12)) for span in signatures]
        for _ in range(2):
            spans = estimate_piano_chords(accompaniment, notes, edges, grid.downbeats, named)
            named = _name_keys(signatures, spans, notes)
    else:
        raise DataError("neither chord symbols nor a piano part")
    has_words = any(note.text for note in notes)
    return Song(
        name=name,
        source=source,
        beats_per_bar=meter[0],
        language=guess_language([note.text for note in notes]),
        melody=tuple(_mark_melismas(notes)) if has_words else tuple(notes),
        piano=accompaniment,
        beats=beats,
        downbeats=tuple(grid.downbeats),
        chords=tuple(spans),
        keys=tuple(named),
    )


def _usual_tempo(name: str, source: str, sheet: Sheet, bars: Sequence[Bar]) -> float:
    """Quarters per minute of most of the song: in numbers, in words, or drawn by the song's name."""
    marks = [(place, bpm) for place, bar in enumerate(bars) for _, bpm in bar.tempos if 20 <= bpm <= 400]
    if marks:
        lengths: dict[float, int] = {}
        for (place, bpm), (after, _) in pairwise([*marks, (len(bars), 0.0)]):
            lengths[bpm] = lengths.get(bpm, 0) + after - place
        return max(lengths, key=lambda bpm: lengths[bpm])
    if sheet.text_bpm is not None:
        beats, unit = bars[len(bars) // 2].signature or (4, 4)
        # The words speak of the beat: of halves in 2/2, of eighths in 3/8.
        return sheet.text_bpm * {2: 1.4, 8: 0.7}.get(unit if beats < 6 else 4, 1.0)
    lowest, highest = DRAWN_TEMPO_BPM
    return float(lowest + _hash("tempo", source, name) % (highest - lowest + 1))


class Grid(NamedTuple):
    """Where bars and beats lie, in quarters."""

    starts: list[float]  # of the bars as played
    beats: list[float]
    downbeats: list[int]  # indices into beats


def _lay_out(bars: Sequence[Bar], unit: float) -> Grid:
    """Bars on beats of `unit` quarters: a pick-up ends where the first beat of a bar is.

    Two short bars that make up one, as around a repeat of a pick-up, are one; what does not fill its last
    beat is filled up.
    """
    starts: list[float] = []
    beats: list[float] = []
    downbeats: list[int] = []
    position, place = 0.0, 0
    while place < len(bars):
        first = bars[place]
        group, total = [place], first.length or first.full_length
        pick_up = place == 0 and total < first.full_length - SMALL
        while not pick_up and group[-1] + 1 < len(bars):
            following = bars[group[-1] + 1].length
            if not following or total + following > first.full_length + SMALL:
                break
            group.append(group[-1] + 1)
            total += following
        count = max(1, int(np.ceil(total / unit - SMALL)))
        if group[-1] == len(bars) - 1:
            count = max(count, round(first.full_length / unit))
        if not pick_up:
            downbeats.append(len(beats))
        beats += [position + beat * unit for beat in range(count)]
        start = position + (count * unit - total if pick_up else 0.0)
        for index in group:
            starts.append(start)
            start += bars[index].length or bars[index].full_length
        position += count * unit
        place = group[-1] + 1
    return Grid(starts, beats, downbeats)


def _clock(bars: Sequence[Bar], starts: Sequence[float], tempo: float) -> Callable[[np.ndarray], np.ndarray]:
    """Quarters -> seconds, with the tempo marks of the bars."""
    marks = [(0.0, tempo)]
    for bar, start in zip(bars, starts, strict=True):
        marks += [
            (start + at, float(np.clip(bpm, tempo / MOST_TEMPO_CHANGE, tempo * MOST_TEMPO_CHANGE)))
            for at, bpm in bar.tempos
        ]
    marks.append((marks[-1][0] + 1e5, tempo))
    quarters = np.array([at for at, _ in marks])
    rates = np.array([60 / bpm for _, bpm in marks[:-1]])
    seconds = np.concatenate([[0.0], np.cumsum(np.diff(quarters) * rates)])
    return lambda at: np.interp(at, quarters, seconds)


def _choose_verse(notes: Iterable[Written], wanted: int) -> int:
    numbers = {number for note in notes for number in note.verses}
    return max((number for number in numbers if number <= wanted), default=min(numbers, default=1))


def _to_notes(
    written: list[tuple[float, float, Written, str]], at_seconds: Callable[[np.ndarray], np.ndarray]
) -> list[Note]:
    """Ties joined, in seconds, by time."""
    joined: list[list[Any]] = []
    sounding: dict[int, list[Any]] = {}
    for start, end, note, text in sorted(written, key=lambda each: each[:2]):
        last = sounding.get(note.pitch)
        if note.goes_on and last is not None and abs(last[1] - start) < 0.02:
            last[1] = end
        else:
            sounding[note.pitch] = [start, end, note, text]
            joined.append(sounding[note.pitch])
    if not joined:
        return []
    times = at_seconds(np.array([each[:2] for each in joined], dtype=float))
    return [
        Note(start=round(float(a), 4), end=round(float(b), 4), pitch=n.pitch, velocity=n.velocity, text=text)
        for (a, b), (_, _, n, text) in zip(times, joined, strict=True)
    ]


def _mark_melismas(notes: Sequence[Note]) -> Iterable[Note]:
    """Notes without a syllable that follow a sung one at once hold it on."""
    end, sung = -1.0, False
    for note in notes:
        sung = bool(note.text) or sung and note.start - end < 0.05
        yield note if note.text or not sung else replace(note, text="-")
        end = note.end


def _to_spans(
    labels: Iterable[tuple[float, str]], end: float, at_seconds: Callable[[np.ndarray], np.ndarray]
) -> list[Span]:
    merged: list[tuple[float, str]] = []
    for at, label in sorted(labels, key=lambda each: each[0]):
        if merged and at - merged[-1][0] < SMALL:
            merged[-1] = (merged[-1][0], label)
        elif not merged or merged[-1][1] != label:
            merged.append((at, label))
    times = np.round(at_seconds(np.array([*(at for at, _ in merged), end])), 4).tolist()
    return [
        Span(start=a, end=b, label=label) for (a, b), (_, label) in zip(pairwise(times), merged, strict=True)
    ]


def _name_keys(signatures: Sequence[Span], chords: Sequence[Span], melody: Sequence[Note]) -> list[Span]:
    """The key of each key signature (sharps as its label, "" = any), by its chords and what is sung."""
    usual = load_progressions()
    named = []
    for span in signatures:
        tonic = 7 * int(span.label) % 12 if span.label else 0
        choices = np.array([tonic, (tonic + 9) % 12 + 12]) if span.label else np.arange(KEYS)
        of_chords, of_pitches = np.zeros(len(choices)), np.zeros(len(choices))
        seconds = [1e-9, 1e-9]
        last = NO_CHORD
        for chord in chords:
            number = nearest_triad(chord.label.partition("/")[0])[0]
            if (
                0 <= number < NO_CHORD
                and (shared := min(chord.end, span.end) - max(chord.start, span.start)) > 0
            ):
                of_chords += shared * usual.chords[choices, number]
                seconds[0] += shared
                last = number
        for note in melody:
            if (shared := min(note.end, span.end) - max(note.start, span.start)) > 0:
                of_pitches += shared * usual.pitches[choices, note.pitch % 12]
                seconds[1] += shared
        key = choices[
            int(
                np.argmax(
                    of_chords / seconds[0] + of_pitches / seconds[1] + ENDING_WEIGHT * (choices == last)
                )
            )
        ]
        named.append(replace(span, label=name_key(int(key))))
    return named


def guess_language(syllables: Sequence[str]) -> str:
    """The language with the most of its common words among the sung ones; "" where there are too few."""
    words = Counter(
        "".join(s[:-1] if s.endswith("-") else s + " " for s in syllables if s != "-").casefold().split()
    )
    found = {
        language: sum(words[word] for word in common.split()) for language, common in COMMON_WORDS.items()
    }
    best = max(found, key=lambda language: found[language])
    return best if found[best] >= 3 else ""
