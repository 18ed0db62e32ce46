"""play: an edited score comes back as sound, beside the singer.

Run: play --score song.mid --vocal song.wav --out folder [--font FONT] [--neural]
     python -m duotok.recipes.accompany.play --score song.mid --vocal song.wav --out folder
Leaves accompaniment.wav, mix.wav, a stem for every part of the score, and report.json. The score begins with
the recording, as song.mid of `generate` does; its track "lead", which is what is sung, is not played.
"""

import argparse
import bisect
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.recipes.accompany.output import FORMATS, OutputFolder, write_report
from duotok.tokenizer.common.command import guard, parse_arguments
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.renderer.sound_font import Part

_DRUM_CHANNEL = 9
_LEVEL_DB = -1.0  # of the band over the singer


@dataclass(frozen=True, kw_only=True)
class _Track:
    """Names and places of the notes of one track and channel."""

    name: str
    channel: int
    program: int


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="play", description="Plays an edited score by a sound font, or by the model, under the singer."
    )
    add = parser.add_argument
    add("--score", type=Path, required=True, metavar="FILE", help="MIDI file, such as song.mid of generate")
    text = "the singer; again for each further take"
    add("--vocal", action="append", required=True, metavar="FILE", help=text)
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the result")
    add("--font", metavar="FONT", help=".sf2, .sf3 or, for the keys, .sfz (default: an installed one)")
    add("--neural", action="store_true", help="then let the model play what the font has played")
    text = f"loudness of the band over the singer's, in dB (default: {_LEVEL_DB:g})"
    add("--level", type=float, default=_LEVEL_DB, metavar="DB", help=text)
    add("--format", default="wav", choices=FORMATS, help="of accompaniment and mix; stems are floats")
    add("--seed", type=int, default=0, help="of --neural")
    add("--model", type=Path, metavar="DIR", help="of --neural: bundle (default: the one in the package)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="of --neural")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, 1 (one line on stderr), 2 (usage), 130 (interrupted)."""
    arguments = parse_arguments(build_parser(), argv)
    return guard(lambda: play(arguments), interrupted="nothing was written")


def play(arguments: argparse.Namespace) -> None:
    """Read the score and the singer, play, mix and write."""
    import torch

    from duotok.recipes.accompany.mix import level_parts, load_vocal, mix_down
    from duotok.renderer.sound_font import Players
    from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, write_audio

    if not -60 <= arguments.level <= 30:
        raise ConfigError(f"--level must be from -60 to 30, got {arguments.level:g}")
    parts = read_score(arguments.score)
    vocal = load_vocal(arguments.vocal)
    samples = vocal.wave.shape[-1]
    seconds = samples / SAMPLE_RATE_HZ
    warnings = list(vocal.warnings)
    late = sum(start >= seconds for part in parts.values() for start, *_ in part.notes)
    if late:
        warnings.append(f"{late} notes begin after the singer's end ({seconds:.1f} s) and are left out")
    players = Players(arguments.font)
    ending, subtype, width = FORMATS[arguments.format]
    expected = {f"{name}{ending}": round(width * samples) for name in ("accompaniment", "mix")}
    expected |= {f"played-{name}.wav": 8 * samples for name in parts}
    inputs = [arguments.score, *arguments.vocal]
    with OutputFolder(arguments.out, expected, command="play", inputs=inputs) as output:
        waves = players.play(parts, seconds)
        if not waves:
            raise DataError(f"{arguments.score} has no notes that this font plays; give another font")
        band = torch.from_numpy(sum(waves.values()))
        if arguments.neural:
            band = _render_anew(band, arguments)
        mixdown = mix_down(vocal.wave, band, accompaniment_db=arguments.level)
        stems = level_parts(waves, mixdown.accompaniment_lufs)
        for name, wave in stems.items():
            write_audio(output.work / f"played-{name}.wav", wave, subtype="FLOAT")
        write_audio(output.work / f"accompaniment{ending}", mixdown.accompaniment, subtype=subtype)
        write_audio(output.work / f"mix{ending}", mixdown.mix, subtype=subtype)
        notes = {name: len(part.notes) for name, part in parts.items()}
        told = {"score": arguments.score.name, "vocal": vocal.name, "seconds": round(seconds, 6)}
        told |= {"notes": notes, "neural": arguments.neural, "seed": arguments.seed, "warnings": warnings}
        write_report(output.work, told, command="play")
        output.publish()
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    heard = ", ".join(f"{count} of {name}" for name, count in notes.items())
    print(f"{arguments.out}: {seconds:.1f} s, notes: {heard}")


def read_score(path: Path) -> "dict[str, Part]":
    """The parts of a MIDI file by their names, in seconds; DataError where it is none, or has no notes.

    A part is what one track plays on one channel in one program. What is sung is left out.
    """
    from duotok.recipes.accompany.export import LEAD
    from duotok.renderer.sound_font import Part

    try:
        import mido
    except ImportError as error:
        raise DataError(
            "mido, which reads MIDI, is missing; in the checkout: pip install '.[score]'"
        ) from error
    try:
        file = mido.MidiFile(path, clip=True)
        clock = _TempoClock(mido.merge_tracks(file.tracks), file.ticks_per_beat)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    except (OSError, EOFError, ValueError, LookupError, ArithmeticError) as error:
        raise DataError(f"{path} is no MIDI file that can be read; export it again") from error
    parts: dict[str, Part] = {}
    for number, track in enumerate(file.tracks, start=1):
        name = next((m.name.strip() for m in track if m.type == "track_name"), "") or f"track {number}"
        if name.lower() == LEAD:
            continue
        for played, notes in _notes_of(track, name):
            spans = [(clock.seconds(on), clock.seconds(off), pitch, v) for on, off, pitch, v in notes]
            part = Part(program=played.program, is_drums=played.channel == _DRUM_CHANNEL, notes=sorted(spans))
            parts[_free_name(played.name, parts)] = part
    if not parts:
        raise DataError(f"{path} has no notes; export it again with the band's tracks")
    return parts


class _TempoClock:
    """Ticks of a MIDI file to seconds."""

    def __init__(self, messages: Sequence[Any], ticks_per_beat: int) -> None:
        self._ticks, tick = [0], 0  # of changes of tempo
        self._changes = [(0.0, 0.5 / ticks_per_beat)]  # when, and how long ticks are from there on
        for message in messages:
            tick += message.time
            if message.type == "set_tempo":
                self._changes.append((self.seconds(tick), message.tempo * 1e-6 / ticks_per_beat))
                self._ticks.append(tick)

    def seconds(self, tick: int) -> float:
        """The moment of a tick."""
        change = bisect.bisect_right(self._ticks, tick) - 1
        moment, length = self._changes[change]
        return moment + (tick - self._ticks[change]) * length


def _notes_of(track: Any, name: str) -> list[tuple[_Track, list[tuple[int, int, int, int]]]]:
    """Notes of a track as (start, end, pitch, velocity) in ticks, by channel and program."""
    found: dict[_Track, list[tuple[int, int, int, int]]] = defaultdict(list)
    sounding: dict[tuple[int, int], tuple[int, int, int]] = {}
    programs: dict[int, int] = defaultdict(int)
    tick = 0
    for message in track:
        tick += message.time
        if message.type == "program_change":
            programs[message.channel] = message.program
        elif message.type in ("note_on", "note_off"):
            place = message.channel, message.note
            if place in sounding:
                start, velocity, program = sounding.pop(place)
                played = _Track(name=name, channel=message.channel, program=program)
                found[played].append((start, max(tick, start + 1), message.note, velocity))
            if message.type == "note_on" and message.velocity > 0:
                sounding[place] = tick, message.velocity, programs[message.channel]
    for (channel, pitch), (start, velocity, program) in sounding.items():
        played = _Track(name=name, channel=channel, program=program)
        found[played].append((start, max(tick, start + 1), pitch, velocity))
    return list(found.items())


def _free_name(name: str, taken: "dict[str, Part]") -> str:
    """A name that a file can have and no other part has."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-") or "part"
    plain = plain[:40]
    number = next(n for n in range(1, len(taken) + 2) if (f"{plain}-{n}" if n > 1 else plain) not in taken)
    return plain if number == 1 else f"{plain}-{number}"


def _render_anew(band: "Tensor", arguments: argparse.Namespace) -> "Tensor":
    """What the model makes of the sound of a band [2, samples]: encoded, and played from the codes."""
    import torch

    from duotok.recipes.accompany.bundle import default_bundle, load_bundle
    from duotok.recipes.accompany.mix import match_level
    from duotok.recipes.accompany.pipeline import choose_device
    from duotok.recipes.accompany.request import resolve_settings

    device = choose_device(arguments.device)
    folder = arguments.model or default_bundle()
    bundle = load_bundle(folder)
    settings = resolve_settings(bundle.defaults, {})
    tokenizer, renderer = bundle.tokenizer.to(device), bundle.renderer.to(device)
    if "accompaniment" not in renderer.decoders:
        raise CheckpointError(f"the model {folder} plays no accompaniment; give another by --model")
    with torch.inference_mode():
        codes = tokenizer.encode(band[None].to(device), "accompaniment")
        latents = renderer.render_latents(
            tokenizer.features(codes, "accompaniment")[0],
            steps=settings.steps,
            guidance=settings.render_guidance,
            seed=arguments.seed,
            track="accompaniment",
        )
        return match_level(renderer.decode(latents, band.shape[-1]).cpu().float(), band)


if __name__ == "__main__":
    sys.exit(main())
