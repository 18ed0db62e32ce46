"""generate: listens to a singer and plays the band.

Run: generate --vocal song.wav [--out folder] [--seed 1]
     python -m duotok.recipes.accompany.generate --vocal song.wav
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.recipes.accompany.output import (
    OutputFolder,
    StemWriter,
    expected_files,
    write_report,
    write_result,
)
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import ConfigError

if TYPE_CHECKING:
    from duotok.recipes.accompany.pipeline import Accompanist, Sketches
    from duotok.recipes.accompany.settings import GenerationSettings
    from duotok.recipes.accompany.stages import Progress
    from duotok.recipes.accompany.vocal import Vocal
    from duotok.recipes.accompany.wishes import SheetWishes
    from duotok.recipes.separation.stems import Separator

# Share of the computing time of each stage, for one bar over all of them.
_TOGETHER = {"listen": ("listening", 5), "compose": ("composing", 45)}  # once for all variations
_EACH = {"paint": ("playing", 30), "sound": ("sounding", 15), "mix": ("mixing", 5)}
_MOST_VARIATIONS = 99


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="generate",
        description="Makes an accompaniment that fits a singer: accompaniment.wav, mix.wav and report.json, "
        "48 kHz stereo, as long as the vocal.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--vocal", type=Path, metavar="FILE", help="the singer alone (WAV, FLAC, OGG, MP3; any rate)"
    )
    source.add_argument(
        "--mix", type=Path, metavar="FILE", help="a whole song; its vocal is separated from it first"
    )
    add(
        "--separator",
        default="mask-head",
        metavar="NAME",
        help="for --mix and --stems: mask-head (default), demucs or bs-roformer, when installed",
    )
    add(
        "--out", type=Path, metavar="DIR", help="folder for the result (default: <vocal>-accompaniment, here)"
    )
    add("--seed", type=int, default=0, help="another number, another accompaniment (default: 0)")
    add(
        "--variations",
        type=int,
        default=1,
        metavar="N",
        help="make N, ranked by fit, best first (default: 1)",
    )
    add("--keep", type=int, metavar="K", help="render only the K best of the variations (default: all)")
    add("--stems", action="store_true", help="write drums, bass and the rest of the accompaniment as well")
    add("--cfg", type=float, metavar="X", help="how strictly the band follows the singer; 1 = no guidance")
    add("--temperature", type=float, metavar="X", help="boldness of the composition; 0 = no chance at all")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely codes; 0 = all")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest codes of total probability P; 1 = all",
    )
    add("--steps", type=int, metavar="N", help="steps of the renderer: more are slower and finer")
    add("--level", type=float, metavar="DB", help="loudness of the accompaniment over the vocal's, in dB")
    add(
        "--prefix",
        type=Path,
        metavar="FILE",
        help="a given start of the accompaniment that the band goes on from",
    )
    add("--tempo", type=float, metavar="BPM", help="the tempo, four beats a bar (default: as it is sung)")
    add(
        "--chords",
        type=Path,
        metavar="FILE",
        help="chords to play, a line '0.0 2.4 C:maj' for each (default: those that fit the singing)",
    )
    add("--model", type=Path, metavar="DIR", help="bundle folder (default: the model of this package)")
    add(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda", "mps"),
        help="where to compute (default: auto)",
    )
    add("--progress", action="store_true", help="show the progress bar even when this is no terminal")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, 1 (one line on stderr), 2 (usage), 130 (interrupted)."""
    arguments = build_parser().parse_args(argv)
    return guard(lambda: _generate(arguments), interrupted="nothing was written")


def _generate(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.variations <= _MOST_VARIATIONS:
        raise ConfigError(f"--variations must be from 1 to {_MOST_VARIATIONS}, got {arguments.variations}")
    # All are rendered unless told otherwise: who asks for N wants to hear N.
    keep = arguments.variations if arguments.keep is None else arguments.keep
    if not 1 <= keep <= arguments.variations:
        raise ConfigError(f"--keep must be from 1 to --variations ({arguments.variations}), got {keep}")
    from duotok.recipes.accompany.vocal import load_vocal
    from duotok.recipes.accompany.wishes import SheetWishes, read_chart

    # Cheap checks first: the recording, then the folder, then the model.
    given = arguments.vocal or arguments.mix
    chart = read_chart(arguments.chords) if arguments.chords else None
    wishes = SheetWishes(tempo_bpm=arguments.tempo, chart=chart)
    vocal = load_vocal(given, what="vocal" if arguments.vocal else "song")
    out = arguments.out or Path(f"{given.stem}-accompaniment")
    expected = expected_files(
        vocal.wave.shape[-1], renderings=keep, stems=arguments.stems, separated=bool(arguments.mix)
    )
    inputs = [path for path in (given, arguments.prefix, arguments.chords) if path is not None]
    with OutputFolder(out, expected, inputs=inputs) as output:
        import torch

        from duotok.recipes.accompany.pipeline import Accompanist

        accompanist = Accompanist.from_pretrained(arguments.model, device=arguments.device)
        settings = accompanist.resolve_settings(
            guidance=arguments.cfg,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            steps=arguments.steps,
            accompaniment_db=arguments.level,
        )
        if arguments.mix:
            vocal = _separate_vocal(vocal, arguments, str(accompanist.device), output.work)
        with _Bar(arguments.progress or sys.stderr.isatty(), keep) as bar:
            try:
                report = _make(accompanist, vocal, settings, wishes, arguments, keep, output.work, bar)
            except torch.OutOfMemoryError as error:
                raise ConfigError(f"{accompanist.device} has too little memory; use --device cpu") from error
        output.publish()
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(_summarize(out, report))


def _make(
    accompanist: "Accompanist",
    vocal: "Vocal",
    settings: "GenerationSettings",
    wishes: "SheetWishes",
    arguments: argparse.Namespace,
    keep: int,
    folder: Path,
    bar: "_Bar",
) -> dict[str, Any]:
    """Compose all variations, render the best and write them; return the report of the best one."""
    seeds = [arguments.seed + number for number in range(arguments.variations)]
    sketches = accompanist.compose(
        vocal, seeds, settings, prefix=arguments.prefix, wishes=wishes, progress=bar.tell
    )
    stems = StemWriter(folder, lambda: _open_separator(arguments, str(accompanist.device)))
    reports: list[dict[str, Any]] = []
    for composition in sketches.ranked[:keep]:
        result = accompanist.perform(sketches, composition)
        suffix = "" if keep == 1 else f"-{len(reports) + 1}"
        report = result.report
        if arguments.stems:
            report["stems"] = stems.write(result.accompaniment, suffix)
            report["warnings"] += [stems.failure] if stems.failure else []
        write_result(folder, result.accompaniment, result.mix, report, suffix=suffix)
        reports.append(report)
        bar.finish_variation()
    if keep > 1:
        _copy_best(folder)
    if len(seeds) > 1:
        write_report(folder, _describe_variations(reports, sketches))
    return reports[0]


def _separate_vocal(song: "Vocal", arguments: argparse.Namespace, device: str, folder: Path) -> "Vocal":
    """Write the song's vocal as separated-vocal.wav and return it, with a warning that says so."""
    from duotok.recipes.accompany.vocal import check_vocal
    from duotok.tokenizer.common.audio import write_audio

    separator = _open_separator(arguments, device)
    vocal = check_vocal(separator.separate(song.wave)["vocal"], song.name, what="separated vocal")
    write_audio(folder / "separated-vocal.wav", vocal.wave)
    told = f"the vocal was separated from {song.name} by {separator.name}; a clean vocal fits better"
    return replace(vocal, warnings=(*song.warnings, told, *vocal.warnings))


def _open_separator(arguments: argparse.Namespace, device: str) -> "Separator":
    from duotok.recipes.separation.adapters import open_separator

    # The mask head is part of the model; the other separators bring their own weights.
    own = arguments.separator == "mask-head" and arguments.model is not None
    return open_separator(arguments.separator, str(arguments.model) if own else None, device)


def _copy_best(folder: Path) -> None:
    """The best variation is also accompaniment.wav and mix.wav."""
    for kind in ("accompaniment", "mix"):
        try:
            shutil.copyfile(folder / f"{kind}-1.wav", folder / f"{kind}.wav")
        except OSError as error:
            raise ConfigError(f"cannot write {kind}.wav: {error.strerror or error}") from error


def _describe_variations(reports: Sequence[dict[str, Any]], sketches: "Sketches") -> dict[str, Any]:
    """The report of the best variation with those of all that were rendered, and the scores of the others."""
    variations = []
    for number, report in enumerate(reports, start=1):
        suffix = "" if len(reports) == 1 else f"-{number}"
        files = {kind: f"{kind}{suffix}.wav" for kind in ("accompaniment", "mix")}
        variations.append({"rank": number, **files, **report})
    others = [
        {"rank": number, "seed": composition.seed, "ranking": composition.fit.describe()}
        for number, composition in enumerate(sketches.ranked, start=1)
        if number > len(reports)
    ]
    return {**reports[0], "variations": variations, "not_rendered": others}


def _summarize(out: Path, report: dict[str, Any]) -> str:
    tempo = f"{report['tempo_bpm']:.0f} BPM" if report["tempo_bpm"] else "free tempo"
    computing = sum(report["computing_seconds"].values())
    return (
        f"{out}: {report['seconds']:.1f} s, {report['accompaniment_key']}, {tempo}, made in {computing:.1f} s"
    )


class _Bar:
    """One progress bar on stderr over all stages, or nothing."""

    def __init__(self, shown: bool, renderings: int) -> None:
        from tqdm import tqdm

        self._once = sum(width for _, width in _TOGETHER.values())
        self._each = sum(width for _, width in _EACH.values())
        self._bar = tqdm(
            total=self._once + self._each * renderings,
            disable=not shown,
            file=sys.stderr,
            bar_format="{desc:<10} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}",
        )
        self._finished = 0

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def tell(self) -> "Progress":
        return self._tell

    def _tell(self, stage: str, share: float) -> None:
        stages, place = (_TOGETHER, 0) if stage in _TOGETHER else (_EACH, self._once)
        names = list(stages)
        place += sum(stages[name][1] for name in names[: names.index(stage)])
        place += self._each * self._finished + share * stages[stage][1]
        self._bar.set_description_str(stages[stage][0], refresh=False)
        self._bar.update(max(0.0, place - self._bar.n))

    def finish_variation(self) -> None:
        self._finished += 1


if __name__ == "__main__":
    sys.exit(main())
