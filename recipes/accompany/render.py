"""Codes to sound, of either track: hear what the tokens keep of a recording.

Run: python -m duotok.recipes.accompany.render --audio song.wav --track accompaniment --out round-trip
     python -m duotok.recipes.accompany.render --codes round-trip/codes.safetensors --seed 1 --out again
Leaves rendered.wav, as long as the recording to the sample and (with --audio) as loud, codes.safetensors
and report.json, by which a later run knows what it may replace.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.recipes.accompany.original import CODES, codes_header
from duotok.recipes.accompany.output import OutputFolder, write_report
from duotok.tokenizer.common.command import guard, parse_arguments
from duotok.tokenizer.common.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.tokenizer.model import DuoTokenizer

TRACKS = ("vocal", "accompaniment")
SOUND = "rendered.wav"


@dataclass(frozen=True, kw_only=True)
class TrackCodes:
    """The codes of one track of one recording, in a file as one tensor "codes" [frames] int32."""

    codes: "Tensor"  # [frames] int64
    track: str
    samples: int  # length of the recording at 48 kHz; the last frame may reach beyond it


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.accompany.render",
        description="Renders the tokens of a recording, or stored tokens, as 48 kHz stereo.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--audio", type=Path, metavar="FILE", help="a recording of one track, to be encoded")
    source.add_argument("--codes", type=Path, metavar="FILE", help="codes.safetensors of an earlier run")
    add(
        "--track", choices=TRACKS, default="accompaniment", help="what --audio holds (default: accompaniment)"
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of rendered.wav and codes.safetensors")
    add("--model", metavar="MODEL", help="folder, or owner/name[@revision] (default: the one in the package)")
    add("--steps", type=int, help="solver steps of the decoder (default: the model's)")
    add("--guidance", type=float, help="of the decoder; 1 = none (default: the model's)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, 1 (one line on stderr), 2 (usage), 130 (interrupted)."""
    arguments = parse_arguments(build_parser(), argv)
    return guard(lambda: render(arguments), interrupted="nothing was written")


def render(arguments: argparse.Namespace) -> None:
    """Encode or read the codes, render them, write both."""
    import torch
    from tqdm import tqdm

    from duotok.recipes.accompany.bundle import find_bundle, load_bundle
    from duotok.recipes.accompany.mix import load_vocal, match_level
    from duotok.recipes.accompany.pipeline import choose_device
    from duotok.recipes.accompany.request import resolve_settings
    from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, write_audio

    recording = None if arguments.audio is None else load_vocal(arguments.audio, what="recording")
    folder = find_bundle(arguments.model)
    device = choose_device(arguments.device)
    bundle = load_bundle(folder)
    chosen = {"steps": arguments.steps, "render_guidance": arguments.guidance}
    settings = resolve_settings(bundle.defaults, chosen)
    tokenizer, renderer = bundle.tokenizer.to(device), bundle.renderer.to(device)
    if recording is None:
        stored = read_codes(arguments.codes, tokenizer)
        track, samples = stored.track, stored.samples
    else:
        stored, track, samples = None, arguments.track, recording.wave.shape[-1]
    if track not in renderer.decoders:
        raise CheckpointError(
            f"the model {folder} has no {track} decoder; give by --model one that has (renderer/{track})"
        )
    expected = {SOUND: 4 * samples, CODES: 4 * samples // tokenizer.hop_samples}
    inputs = [arguments.audio or arguments.codes]
    with OutputFolder(arguments.out, expected, command="render", inputs=inputs) as output:
        if recording is not None:
            codes = tokenizer.encode(recording.listened.to(device), track)[0].cpu()
            stored = TrackCodes(codes=codes, track=track, samples=samples)
        assert stored is not None
        frames = len(stored.codes)
        with torch.inference_mode(), tqdm(total=frames, unit="token", disable=None) as bar:

            def tell(count: int) -> None:
                bar.update(count)

            latents = renderer.render_latents(
                tokenizer.features(stored.codes[None].to(device), track)[0],
                steps=settings.steps,
                guidance=settings.render_guidance,
                seed=arguments.seed,
                progress=tell,
                track=track,
            )
            wave = renderer.decode(latents, stored.samples).cpu().float()
        if recording is not None:
            wave = match_level(wave, recording.wave)
        wave = wave / wave.abs().max().clamp_min(1)  # a peak of at most full scale
        write_audio(output.work / SOUND, wave)
        write_codes(output.work / CODES, stored, tokenizer)
        told = {"track": track, "samples": samples, "seed": arguments.seed, "model": {"name": bundle.name}}
        write_report(output.work, told, command="render")
        output.publish()
    print(f"{arguments.out}: {frames} {track} codes, {samples / SAMPLE_RATE_HZ:.2f} s -> {SOUND}")


def write_codes(path: Path, found: TrackCodes, tokenizer: "DuoTokenizer") -> None:
    """Write a codes file; the tokenizer's rate and fingerprint go along."""
    import torch

    from duotok.tokenizer.common.files import write_tensors

    header = codes_header(tokenizer.frame_rate_hz, tokenizer.fingerprint)
    header |= {"track": found.track, "samples": str(found.samples)}
    write_tensors(path, {"codes": found.codes.to(torch.int32)}, header)


def read_codes(path: Path, tokenizer: "DuoTokenizer") -> TrackCodes:
    """Read a codes file; raise DataError where it is damaged or not of this tokenizer."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            codes = file.get_tensor("codes")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is no codes file; make one by accompany.render --audio") from error
    for name, value in codes_header(tokenizer.frame_rate_hz, tokenizer.fingerprint).items():
        if header.get(name) != value:
            raise DataError(
                f"{path} has the {name.replace('_', ' ')} {header.get(name)}, this model needs {value}; "
                f"encode the recording again"
            )
    track, samples = header.get("track", ""), header.get("samples", "")
    size = tokenizer.codebook_size(track)
    if codes.ndim != 1 or len(codes) < 1 or codes.is_floating_point():
        found = f"{codes.dtype} {tuple(codes.shape)}"
        raise DataError(f"{path} must hold a row of at least one code, got {found}")
    codes = codes.long()
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= size:
        raise DataError(f"{path} has codes from {low} to {high}, the {track} codebook 0 to {size - 1}")
    longest = len(codes) * tokenizer.hop_samples
    if not samples.isdecimal() or not longest - tokenizer.hop_samples < int(samples) <= longest:
        raise DataError(f"{path} has {len(codes)} codes, which do not fit its {samples or 'unknown'} samples")
    return TrackCodes(codes=codes, track=track, samples=int(samples))


if __name__ == "__main__":
    sys.exit(main())
