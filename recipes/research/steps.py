"""Quality of diffusion decoders against the number of steps and the seconds they take.

Run: python -m duotok.recipes.research.steps --corpus DIR [--bundle DIR] --out FOLDER
     python -m duotok.recipes.research.steps --corpus DIR --schedule auto --schedule euler:0.5 \\
         --decoder flow=RUN/final --decoder v=OTHER/final --out FOLDER
Listens to the validation songs (what is chosen by it must not be chosen on test songs) and leaves steps.md,
steps.json and steps.png. Finished trials are kept: the same command goes on where it was stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import ConfigError, DataError

STEPS = (1, 2, 4, 8, 16, 50)


def compare_steps(arguments: argparse.Namespace) -> None:
    """Run the trials that are not in steps.json yet; write the table and the picture."""
    from tqdm import tqdm

    from duotok.recipes.accompany.bundle import default_bundle, read_bundle_description
    from duotok.recipes.accompany.request import resolve_settings
    from duotok.recipes.evaluation.excerpts import choose_excerpts, read_split
    from duotok.recipes.research.step_report import add_losses, draw_steps, render_table
    from duotok.recipes.research.step_trials import hear, plan_trials, run_trial
    from duotok.renderer.diffusion import DiffusionDecoder
    from duotok.renderer.renderer import open_vae
    from duotok.tokenizer.common.files import read_json, write_json, write_text
    from duotok.tokenizer.model import DuoTokenizer

    bundle = arguments.bundle or default_bundle()
    guidance = arguments.guidance
    if guidance is None:
        defaults = read_bundle_description(bundle).get("defaults") or {}
        guidance = resolve_settings(defaults, {}).render_guidance
    folders = dict(parse_decoder(text) for text in arguments.decoder)
    folders = folders or {bundle.name: bundle / "renderer" / arguments.track}
    tokenizer = DuoTokenizer.from_pretrained(arguments.tokenizer or bundle / "tokenizer")
    vae = open_vae(arguments.vae or bundle / "renderer" / "vae")
    decoders = {name: DiffusionDecoder.from_pretrained(folder) for name, folder in folders.items()}
    for decoder in decoders.values():
        decoder.require(tokenizer=tokenizer.fingerprint, vae=vae.fingerprint)
    trials = plan_trials(decoders, arguments.schedule or ["auto"], arguments.steps)
    settings = {
        "split": arguments.split,
        "items": arguments.items,
        "seconds": arguments.seconds,
        "track": arguments.track,
        "guidance": guidance,
        "seed": arguments.seed,
        "tokenizer": tokenizer.fingerprint,
        "vae": vae.fingerprint,
    }
    path = arguments.out / "steps.json"
    rows = []
    if path.exists():
        found = read_json(path)
        if not isinstance(found, dict) or found.get("settings") != settings:
            raise DataError(f"{path} was made by other settings; give another --out or delete it")
        rows = found["rows"]
    done = {(row["fingerprint"], row["solver"], row["shift"], row["steps"]) for row in rows}
    excerpts = choose_excerpts(
        read_split(arguments.corpus, arguments.split),
        count=arguments.items,
        seconds=arguments.seconds,
        seed=arguments.seed,
    )
    heard = hear(excerpts, tokenizer, arguments.track)
    for trial in tqdm(trials, desc="trials", disable=None):
        decoder = decoders[trial.decoder]
        if (decoder.fingerprint, trial.solver, trial.shift, trial.steps) in done:
            continue
        figures = run_trial(
            trial, heard, vae, decoder, track=arguments.track, guidance=guidance, seed=arguments.seed
        )
        rows.append({**figures, "fingerprint": decoder.fingerprint})
        add_losses(rows)
        write_json(path, {"settings": settings, "rows": rows})
    table = render_table(rows)
    what = f"{len(excerpts)} {arguments.split} excerpts of {arguments.seconds:g} s, guidance {guidance:g}"
    draw_steps(rows, f"Quality by steps of the diffusion decoder ({what})", arguments.out / "steps.png")
    write_text(arguments.out / "steps.md", f"{what}\n\n{table}")
    print(table, end="")


def parse_decoder(text: str) -> tuple[str, Path]:
    """("flow", folder) of "flow=folder"."""
    name, separator, folder = text.partition("=")
    if not separator or not name or not folder:
        raise ConfigError(f"--decoder {text!r} must look like NAME=FOLDER")
    return name, Path(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.research.steps", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="folder with validation.jsonl")
    add("--split", choices=("validation", "test"), default="validation")
    add("--bundle", type=Path, help="where tokenizer, VAE and decoder are (default: the shipped bundle)")
    add("--tokenizer", type=Path, metavar="DIR", help="tokenizer in place of the bundle's")
    add("--vae", type=Path, metavar="DIR", help="VAE in place of the bundle's")
    add(
        "--decoder",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="decoder in place of the bundle's; may be repeated",
    )
    add("--track", choices=("vocal", "accompaniment"), default="accompaniment")
    add(
        "--schedule",
        action="append",
        default=[],
        metavar="SOLVER[:SHIFT]",
        help="auto (default), euler, heun, dpm or unipc; may be repeated",
    )
    add("--steps", type=int, nargs="+", default=STEPS, metavar="N", help="default: 1 2 4 8 16 50")
    add("--guidance", type=float, help="of the decoder (default: the bundle's)")
    add("--items", type=int, default=6, help="excerpts (default: 6)")
    add("--seconds", type=float, default=8.0, help="of each excerpt (default: 8)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="folder of steps.md, steps.json and steps.png")
    arguments = parser.parse_args(argv)
    if arguments.items < 1 or arguments.seconds < 1:
        parser.error("--items must be at least 1 and --seconds at least 1")
    return guard(lambda: compare_steps(arguments))


if __name__ == "__main__":
    sys.exit(main())
