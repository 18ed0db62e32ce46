"""generate: listens to a singer and plays the band.

Run: generate --vocal song.wav [--out folder] [--seed 1]
     python -m duotok.recipes.accompany.generate --vocal song.wav
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from duotok.recipes.accompany.bundle import (
    SYSTEMS,
    choose_bundle,
    default_bundle,
    read_bundle_description,
    read_styles,
)
from duotok.recipes.accompany.output import EXPORTED, FORMATS, OutputFolder, expected_files
from duotok.recipes.accompany.request import (
    DEVICES,
    INSTALLED,
    METER_NAMES,
    OWN_SEPARATOR,
    STEMS,
    GenerationSettings,
    Request,
    resolve_settings,
)
from duotok.recipes.accompany.stages import STAGE_NAMES, WholeProgress
from duotok.tokenizer.common.command import add_completion, guard, parse_arguments
from duotok.tokenizer.common.errors import CheckpointError, ConfigError
from duotok.tokenizer.common.files import printable

_MOST_SAMPLES_OF_A_BAR = 7 * 48_000  # of six beats, as slow as may be


def build_parser() -> argparse.ArgumentParser:
    """The command line; options are called as the fields of Request they set, or say so by `dest`."""
    parser = argparse.ArgumentParser(
        prog="generate",
        description="Makes an accompaniment that fits a singer: accompaniment.wav, mix.wav and report.json, "
        "48 kHz stereo, as long as the vocal (longer with --intro).",
    )
    own = _shipped_settings()
    parser.add_argument("--version", action="version", version=f"duotok {version('duotok')}")
    add_completion(parser)

    group = parser.add_argument_group
    recording = group("the recording", "what is sung, and how it is heard")
    add = recording.add_mutually_exclusive_group(required=True).add_argument
    text = "the singer alone (WAV, FLAC, MP3, M4A, OGG, WMA, a film; any rate); again for each further take"
    add("--vocal", action="append", metavar="FILE", help=text)
    add("--mix", metavar="FILE", help="a whole song instead; its vocal is separated from it first")
    add = recording.add_argument
    text = (
        f"for --mix and --stems: {OWN_SEPARATOR} (default), tokens, tokens-written, or, installed: demucs, "
    )
    add("--separator", default=OWN_SEPARATOR, metavar="NAME", help=text + "bs-roformer, spleeter")
    text = "the separator's weights (default: the model's own, or those of the separator's package)"
    add("--separator-checkpoint", metavar="PATH", help=text)
    text = "cents of the singer over A = 440 Hz; auto (default) listens, off plays at 440 Hz"
    add("--tuning", default="auto", metavar="auto|off|CENTS", help=text)

    add = group("the band", "who plays, from where on, how loud").add_argument
    styles = f": {', '.join(own_styles)}" if (own_styles := _shipped_styles()) else ", if the model knows any"
    text = f"style of the band{styles} (default: each candidate in one that is usual at the tempo)"
    add("--style", metavar="NAME", help=text)
    text = f"what does not play: any of {', '.join(STEMS)}, with commas between"
    add("--without", type=_split_names, default=(), metavar="NAMES", help=text)
    text = "the band begins BARS bars before the singer's first (default: with the recording)"
    add("--intro", type=int, metavar="BARS", help=text)
    add("--prefix", metavar="FILE", help="a given start of the accompaniment that the band goes on from")
    text = f"loudness of the accompaniment over the vocal's, in dB (default: {own.accompaniment_db:g})"
    add("--level", dest="accompaniment_db", type=float, metavar="DB", help=text)

    add = group(
        "the song's plan", "what you know of the song; the rest is read out of the singing"
    ).add_argument
    text = "beats per minute (default: as it is sung)"
    add("--tempo", dest="tempo_bpm", type=float, metavar="BPM", help=text)
    text = f"meter of the song: {', '.join(METER_NAMES.values())} (default: that of the style, or 4/4)"
    add("--meter", metavar="METER", help=text)
    text = "where a bar begins (default: where it seems to)"
    add("--downbeat", dest="downbeat_seconds", type=float, metavar="SECONDS", help=text)
    text = "key of the song, such as C, Am or Eb:min (default: as it is sung)"
    add("--key", metavar="KEY", help=text)
    text = "chords to play, a line '0.0 2.4 C:maj' for each (default: those that fit the singing)"
    add("--chords", metavar="FILE", help=text)

    add = group("a stretch anew", "of an earlier result, the rest as it is").add_argument
    text = "seconds of mix.wav that are composed anew; --chords, --style and --without hold for these"
    add("--repaint", metavar="START-END", help=text)
    add("--from", dest="original", metavar="DIR", help="the folder of that result")

    add = group("results", "what is written").add_argument
    text = "folder for the result (default: <vocal>-accompaniment, here)"
    add("--out", type=Path, metavar="DIR", help=text)
    text = "wav: 16 bits, dithered (default); wav24, float, flac: for more work on it; mp3: to send"
    add("--format", choices=FORMATS, help=text)
    text = "make N, ranked by fit, best first (default: 1)"
    add("--variations", type=int, default=1, metavar="N", help=text)
    add("--keep", type=int, metavar="K", help="render only the K best of the variations (default: all)")
    text = (
        "a WAV of the mix that grows while it is composed, to be heard meanwhile; - is standard output, as "
        "for | ffplay -. It plays the candidate that fits best at its beginning, at the level found there"
    )
    add("--stream", metavar="FILE|-", help=text)
    add("--stems", action="store_true", help="write drums, bass and the rest of the accompaniment as well")
    text = f"write any of {', '.join(EXPORTED)}, with commas between, or all: the score, chords, a click"
    add("--export", type=_split_exports, default=(), metavar="KINDS", help=text)
    text = (
        "play the score by a sound font as well: .sf2, .sf3, .sfz (default: an installed one), stem by stem"
    )
    add("--play", nargs="?", const=INSTALLED, metavar="FONT", help=text)

    add = group(
        "sampling", "how chance composes; defaults are those of the model in the package"
    ).add_argument
    text = "another number, another accompaniment (default: 0; of --repaint: drawn)"
    add("--seed", type=int, metavar="N", help=text)
    text = f"how strictly the band follows the singer; 1 = no guidance (default: {own.guidance:g})"
    add("--cfg", dest="guidance", type=float, metavar="X", help=text)
    text = f"how strictly it keeps to style and levels; 1 = no guidance (default: {own.playing_guidance:g})"
    add("--style-cfg", dest="playing_guidance", type=float, metavar="X", help=text)
    text = f"boldness of the composition; 0 = no chance at all (default: {own.temperature:g})"
    add("--temperature", type=float, metavar="X", help=text)
    text = f"draw from the K most likely codes; 0 = all (default: {own.top_k})"
    add("--top-k", type=int, metavar="K", help=text)
    text = f"draw from the likeliest codes of total probability P; 1 = all (default: {own.top_p:g})"
    add("--top-p", type=float, metavar="P", help=text)
    text = f"compose N and keep those that fit best; their seeds follow --seed (default: {own.candidates})"
    add("--candidates", type=int, metavar="N", help=text)
    text = f"steps of the renderer: more are slower and finer (default: {own.steps})"
    add("--steps", type=int, metavar="N", help=text)

    add = group("machine", "where it is computed, by which model").add_argument
    text = "folder of a model, or owner/name[@revision] on the hub (default: the model in the package)"
    add("--model", metavar="MODEL", help=text)
    text = f"{' or '.join(SYSTEMS)}: what the model must be one of (default: whatever it is)"
    add("--system", choices=SYSTEMS, metavar="NAME", help=text)
    add("--device", default="auto", choices=DEVICES, help="default: auto")
    add("--progress", action="store_true", help="show the progress bar even when this is no terminal")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, 1 (one line on stderr), 2 (usage), 130 (interrupted)."""
    arguments = parse_arguments(build_parser(), argv)
    return guard(lambda: _generate(**vars(arguments)), interrupted="nothing was written")


def _generate(
    out: Path | None,
    model: str | None,
    system: str | None,
    device: str,
    progress: bool,
    stream: str | None,
    **fields: Any,
) -> None:
    # Cheap checks first: the options, the recordings, the folder, the device; then the model.
    request = Request(**fields)
    chosen = choose_bundle(model, system)
    out = out or Path(f"{Path(request.files[0]).stem}-accompaniment")
    inputs = request.files
    request = request.read()
    with OutputFolder(out, expect_files(request), inputs=inputs) as output:
        from duotok.recipes.accompany.pipeline import Accompanist
        from duotok.recipes.accompany.stream import STANDARD_OUTPUT, WavStream

        with nullcontext() if stream is None else WavStream(stream) as streamed:
            accompanist = Accompanist.from_pretrained(chosen, device=device)
            with _Bar(progress or sys.stderr.isatty(), request.renderings) as bar:
                report = accompanist.write(request, output.work, progress=bar.tell, stream=streamed)
            output.publish()
    warnings = [*report["warnings"], *([] if streamed is None else streamed.tell(report["seed"]))]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    summary = printable(_summarize(out, report))
    print(summary, file=sys.stderr if stream == STANDARD_OUTPUT else sys.stdout)


def expect_files(request: Request) -> dict[str, int]:
    """Return name -> bytes at most of what is written for a request that has been read."""
    samples = request.song.wave.shape[-1] + (request.intro or 0) * _MOST_SAMPLES_OF_A_BAR
    return expected_files(
        getattr(request.original, "samples", samples),
        renderings=request.renderings,
        stems=request.stems,
        separated=request.mix is not None,
        format=request.format or "wav",
        exports=request.export,
        played=request.play is not None,
    )


def _shipped_settings() -> GenerationSettings:
    """The settings that the shipped model works best with, read without loading it."""
    try:
        return resolve_settings(read_bundle_description(default_bundle()).get("defaults") or {}, {})
    except (CheckpointError, ConfigError):  # told when the model is used
        return GenerationSettings()


def _shipped_styles() -> list[str]:
    """The styles that the shipped model knows, read without loading it."""
    try:
        return read_styles(default_bundle())
    except CheckpointError:  # told when the model is used
        return []


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _split_exports(text: str) -> tuple[str, ...]:
    return tuple(EXPORTED) if text == "all" else _split_names(text)


def _summarize(out: Path, report: dict[str, Any]) -> str:
    tempo = f"{report['tempo_bpm']:.0f} BPM" if report["tempo_bpm"] else "free tempo"
    computing = sum(report["computing_seconds"].values())
    key, style = report["accompaniment_key"], report["band"]["style"]
    told = f"{key}, {tempo}" if style is None else f"{key}, {tempo}, {style}"
    return f"{out}: {report['seconds']:.1f} s, {told}, made in {computing:.1f} s"


class _Bar:
    """One progress bar on stderr over all stages, or nothing."""

    def __init__(self, shown: bool, renderings: int) -> None:
        from tqdm import tqdm

        self._whole = WholeProgress(renderings)
        self._bar = tqdm(
            total=1.0,
            disable=not shown,
            file=sys.stderr,
            bar_format="{desc:<10} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}",
        )

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tell(self, stage: str, share: float) -> None:
        """Move on to a share of a stage."""
        place = self._whole.tell(stage, share)
        self._bar.set_description_str(STAGE_NAMES[stage], refresh=False)
        self._bar.update(max(0.0, place - self._bar.n))


if __name__ == "__main__":
    sys.exit(main())
