"""generate: listens to a singer and plays the band.

Run: generate --vocal song.wav [--out folder] [--seed 1]
     python -m duotok.recipes.generate --vocal song.wav
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.recipes.command import guard
from duotok.recipes.output import OutputFolder, write_report, write_result
from duotok.tokenizer.common.errors import ConfigError

if TYPE_CHECKING:
    from duotok.recipes.pipeline import Progress
    from duotok.recipes.vocal import Vocal

# Share of the computing time of each stage, for one bar over all of them.
_STAGES = {
    "listen": ("listening", 5),
    "compose": ("composing", 45),
    "paint": ("playing", 30),
    "sound": ("sounding", 15),
    "mix": ("mixing", 5),
}
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
        help="what separates --mix: mask-head (default), demucs or bs-roformer, when installed",
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
    from duotok.recipes.vocal import load_vocal

    # Cheap checks first: the recording, then the folder, then the model.
    given = arguments.vocal or arguments.mix
    vocal = load_vocal(given, what="vocal" if arguments.vocal else "song")
    out = arguments.out or Path(f"{given.stem}-accompaniment")
    with OutputFolder(out) as output:
        import torch

        from duotok.recipes.pipeline import Accompanist

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
        seeds = [arguments.seed + number for number in range(arguments.variations)]
        reports: list[dict[str, Any]] = []
        with _Bar(arguments.progress or sys.stderr.isatty(), len(seeds)) as bar:
            try:
                for result in accompanist.vary(
                    vocal, seeds, settings, prefix=arguments.prefix, progress=bar.tell
                ):
                    name = "" if len(seeds) == 1 else f"-made-{len(reports)}"
                    write_result(output.work, result.accompaniment, result.mix, result.report, suffix=name)
                    reports.append(result.report)
                    bar.finish_variation()
            except torch.OutOfMemoryError as error:
                raise ConfigError(f"{accompanist.device} has too little memory; use --device cpu") from error
        if len(seeds) > 1:
            reports = _rank(output.work, reports)
        output.publish()
    for warning in reports[0]["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(_summarize(out, reports[0]))


def _separate_vocal(song: "Vocal", arguments: argparse.Namespace, device: str, folder: Path) -> "Vocal":
    """Write the song's vocal as separated-vocal.wav and return it, with a warning that says so."""
    from duotok.recipes.separation.separator import open_separator
    from duotok.recipes.vocal import check_vocal
    from duotok.tokenizer.common.audio import write_audio

    # The mask head is part of the model; the other separators bring their own weights.
    own = arguments.separator == "mask-head" and arguments.model is not None
    separator = open_separator(arguments.separator, str(arguments.model) if own else None, device)
    vocal = check_vocal(separator.separate(song.wave)["vocal"], song.name, what="separated vocal")
    write_audio(folder / "separated-vocal.wav", vocal.wave)
    told = f"the vocal was separated from {song.name} by {separator.name}; a clean vocal fits better"
    return replace(vocal, warnings=(*song.warnings, told, *vocal.warnings))


def _rank(folder: Path, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name the variations by rank, best first; the best is also accompaniment.wav and mix.wav."""
    order = sorted(range(len(reports)), key=lambda made: -reports[made]["coherence"]["score"])
    for rank, made in enumerate(order, start=1):
        for kind in ("accompaniment", "mix"):
            (folder / f"{kind}-made-{made}.wav").rename(folder / f"{kind}-{rank}.wav")
    for kind in ("accompaniment", "mix"):
        try:
            shutil.copyfile(folder / f"{kind}-1.wav", folder / f"{kind}.wav")
        except OSError as error:
            raise ConfigError(f"cannot write {kind}.wav: {error.strerror or error}") from error
    ranked = [reports[made] for made in order]
    variations = [
        {"rank": rank, "accompaniment": f"accompaniment-{rank}.wav", "mix": f"mix-{rank}.wav", **report}
        for rank, report in enumerate(ranked, start=1)
    ]
    write_report(folder, {**ranked[0], "variations": variations})
    return ranked


def _summarize(out: Path, report: dict[str, Any]) -> str:
    tempo = f"{report['tempo_bpm']:.0f} BPM" if report["tempo_bpm"] else "free tempo"
    computing = sum(report["computing_seconds"].values())
    return (
        f"{out}: {report['seconds']:.1f} s, {report['accompaniment_key']}, {tempo}, made in {computing:.1f} s"
    )


class _Bar:
    """One progress bar on stderr over all stages, or nothing."""

    def __init__(self, shown: bool, variations: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=100 * variations,
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
        names = list(_STAGES)
        before = sum(_STAGES[name][1] for name in names[: names.index(stage)])
        self._bar.set_description_str(_STAGES[stage][0], refresh=False)
        place = 100 * self._finished + before + share * _STAGES[stage][1]
        self._bar.update(max(0.0, place - self._bar.n))

    def finish_variation(self) -> None:
        self._finished += 1


if __name__ == "__main__":
    sys.exit(main())
