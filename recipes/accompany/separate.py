"""separate: takes a song apart into vocal, drums, bass and the rest; the four stems sum to the song.

Run: separate --mix song.wav [--out folder]
     python -m duotok.recipes.accompany.separate --mix song.wav --separator demucs
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duotok.recipes.accompany.output import OutputFolder, write_report
from duotok.tokenizer.common.command import add_completion, guard, parse_arguments


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="separate",
        description="Splits a song into vocal.wav, drums.wav, bass.wav and other.wav, 48 kHz stereo, "
        "which sum to the song.",
    )
    add = parser.add_argument
    add("--mix", type=Path, required=True, metavar="FILE", help="the song (WAV, FLAC, OGG, MP3; any rate)")
    add("--out", type=Path, metavar="DIR", help="folder for the stems (default: <song>-stems, here)")
    text = "mask-head (default), tokens, tokens-written, or, when installed: demucs, bs-roformer, spleeter"
    add("--separator", default="mask-head", metavar="NAME", help=text)
    add("--checkpoint", metavar="PATH", help="its weights (default: those of this package, or the package's)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add_completion(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, 1 (one line on stderr), 2 (usage), 130 (interrupted)."""
    arguments = parse_arguments(build_parser(), argv)
    return guard(lambda: _separate(arguments), interrupted="nothing was written")


def _separate(arguments: argparse.Namespace) -> None:
    from duotok.recipes.accompany.mix import load_vocal
    from duotok.recipes.accompany.pipeline import choose_device
    from duotok.recipes.separation.adapters import open_separator
    from duotok.tokenizer.common.audio import write_audio
    from duotok.tokenizer.heads import STEMS

    mix = load_vocal(arguments.mix, what="song")
    out = arguments.out or Path(f"{arguments.mix.stem}-stems")
    expected = dict.fromkeys((f"{stem}.wav" for stem in STEMS), 8 * mix.wave.shape[-1])  # floats
    with OutputFolder(out, expected, command="separate", inputs=[arguments.mix]) as output:
        device = str(choose_device(arguments.device))
        separator = open_separator(arguments.separator, arguments.checkpoint, device)
        for stem, wave in separator.separate(mix.wave).items():
            # Floats: the sum stays exact, and a stem may exceed full scale where two of them cancel.
            write_audio(output.work / f"{stem}.wav", wave, subtype="FLOAT")
        report = {"song": mix.name, "separator": separator.name, "warnings": list(mix.warnings)}
        write_report(output.work, report, command="separate")
        output.publish()
    for warning in mix.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{out}: vocal.wav, drums.wav, bass.wav, other.wav by {separator.name}")


if __name__ == "__main__":
    sys.exit(main())
