"""Codes to sound, of either track: hear what the tokens keep of a recording.

Run: python -m duotok.recipes.accompany.render --audio song.wav --track accompaniment --out round-trip
     python -m duotok.recipes.accompany.render --codes round-trip/codes.safetensors --seed 1 --out again
Leaves rendered.wav, as long as the recording to the sample and (with --audio) as loud, and codes.safetensors.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duotok.recipes.accompany.output import OutputFolder
from duotok.tokenizer.common.command import guard, parse_arguments
from duotok.tokenizer.common.errors import CheckpointError

TRACKS = ("vocal", "accompaniment")


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
    add("--model", type=Path, metavar="DIR", help="model bundle (default: the one in the package)")
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

    from duotok.recipes.accompany.bundle import default_bundle, load_bundle
    from duotok.recipes.accompany.codes_file import TrackCodes, read_codes, write_codes
    from duotok.recipes.accompany.mix import match_level
    from duotok.recipes.accompany.pipeline import choose_device
    from duotok.recipes.accompany.request import resolve_settings
    from duotok.recipes.accompany.vocal import load_vocal
    from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, write_audio

    folder = arguments.model or default_bundle()
    device = choose_device(arguments.device)
    bundle = load_bundle(folder)
    settings = resolve_settings(
        bundle.defaults, {"steps": arguments.steps, "render_guidance": arguments.guidance}
    )
    tokenizer, renderer = bundle.tokenizer.to(device), bundle.renderer.to(device)
    stored = None if arguments.codes is None else read_codes(arguments.codes, tokenizer)
    track = arguments.track if stored is None else stored.track
    if track not in renderer.decoders:
        raise CheckpointError(
            f"the model {folder} has no {track} decoder; give by --model one that has (renderer/{track})"
        )
    with OutputFolder(arguments.out, replaces=r"rendered\.wav|codes\.safetensors") as output:
        recording = None
        if stored is None:
            recording = load_vocal(arguments.audio, what="recording")
            codes = tokenizer.encode(recording.listened.to(device), track)[0].cpu()
            stored = TrackCodes(codes=codes, track=track, samples=recording.wave.shape[-1])
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
        write_audio(output.work / "rendered.wav", wave)
        write_codes(output.work / "codes.safetensors", stored, tokenizer)
        output.publish()
    print(f"{arguments.out}: {frames} {track} codes, {stored.samples / SAMPLE_RATE_HZ:.2f} s -> rendered.wav")


if __name__ == "__main__":
    sys.exit(main())
