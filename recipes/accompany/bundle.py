"""A bundle: one folder with everything `generate` needs, checked file by file when it is loaded.

Run: python -m duotok.recipes.accompany.bundle --tokenizer DIR --lm DIR --vae DIR --accompaniment DIR \\
         [--vocal-decoder DIR] [--separator DIR] --out DIR --half
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

    from duotok.lm.dual_track.model import DualTrackLM
    from duotok.renderer.song import Renderer
    from duotok.tokenizer.model import DuoTokenizer

FORMAT = 1
LARGEST_BYTES = 100_000_000
COMPONENTS = ("tokenizer", "lm", "renderer/vae", "renderer/accompaniment")
OPTIONAL_COMPONENTS = ("renderer/vocal", "separator")
_DESCRIPTION = "bundle.json"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The loaded parts of a model (CPU, eval) and what its bundle.json says about them."""

    tokenizer: "DuoTokenizer"
    lm: "DualTrackLM"
    renderer: "Renderer"
    name: str
    fingerprint: str
    defaults: dict[str, Any]  # generation settings this model works best with


def default_bundle() -> Path:
    """Folder of the model that ships with the package."""
    return Path(str(files("duotok.recipes"))) / "small" / "bundle"


def load_bundle(folder: str | Path | None = None) -> Bundle:
    """Load a bundle folder (None: the shipped one).

    Raises CheckpointError, in one line, when a file is missing or damaged, the format is another one, or the
    language model or the renderer was trained on another tokenizer.
    """
    folder = default_bundle() if folder is None else Path(folder)
    description = read_bundle_description(folder)
    _check_files(folder, description["files"])
    from duotok.lm.dual_track.model import DualTrackLM
    from duotok.renderer.song import Renderer
    from duotok.tokenizer.model import DuoTokenizer

    tokenizer = DuoTokenizer.from_pretrained(folder / "tokenizer")
    lm = DualTrackLM.from_pretrained(folder / "lm")
    renderer = Renderer.from_pretrained(folder / "renderer")
    if lm.tokenizer_fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"the language model in {folder} was trained on the tokenizer {lm.tokenizer_fingerprint}, but "
            f"the tokenizer there is {tokenizer.fingerprint}; use the parts of one training run"
        )
    renderer.require_tokenizer(tokenizer.fingerprint)
    return Bundle(
        tokenizer=tokenizer,
        lm=lm,
        renderer=renderer,
        name=str(description.get("name", folder.name)),
        fingerprint=str(description.get("fingerprint", "")),
        defaults=dict(description.get("defaults") or {}),
    )


def read_bundle_description(folder: Path) -> dict[str, Any]:
    """The checked bundle.json of a folder."""
    path = folder / _DESCRIPTION
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a model: it has no {_DESCRIPTION}; give a bundle folder by --model"
        )
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged; get the bundle again") from error
    if not isinstance(description, dict) or not isinstance(description.get("files"), dict):
        raise CheckpointError(f"{path} is damaged: it lists no files; get the bundle again")
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has bundle format {description.get('format')!r}, this version reads {FORMAT}; "
            f"upgrade duotok or get a bundle of this version"
        )
    return description


def assemble_bundle(
    out: str | Path,
    *,
    tokenizer: str | Path,
    lm: str | Path,
    vae: str | Path,
    accompaniment: str | Path,
    vocal_decoder: str | Path | None = None,
    separator: str | Path | None = None,
    half: bool = True,
    name: str = "small",
    defaults: Mapping[str, Any] | None = None,
) -> Path:
    """Copy the component folders into the bundle folder `out`, which appears only when it is whole.

    half: store the weights as float16. The components keep belonging together: each records the fingerprints
    of the others as they are stored here. Raises CheckpointError when they do not fit each other or when the
    bundle would exceed LARGEST_BYTES.
    """
    from duotok.lm.dual_track.model import DualTrackLM
    from duotok.renderer.diffusion import DiffusionDecoder
    from duotok.renderer.vae_open import open_vae
    from duotok.tokenizer.common.files import whole_folder, write_json
    from duotok.tokenizer.model import TRACKS, DuoTokenizer
    from duotok.tokenizer.separator import MaskSeparator

    out = Path(out)
    models: dict[str, Any] = {
        "tokenizer": DuoTokenizer.from_pretrained(tokenizer),
        "lm": DualTrackLM.from_pretrained(lm),
        "renderer/vae": open_vae(vae),
        "renderer/accompaniment": DiffusionDecoder.from_pretrained(accompaniment),
    }
    _require_same("language model", lm, "tokenizer", models["lm"].tokenizer_fingerprint, models["tokenizer"])
    sources: dict[str, str | Path] = dict(zip(COMPONENTS, (tokenizer, lm, vae, accompaniment), strict=True))
    if vocal_decoder is not None:
        models["renderer/vocal"] = DiffusionDecoder.from_pretrained(vocal_decoder)
        sources["renderer/vocal"] = vocal_decoder
    for track in TRACKS:
        decoder = models.get(f"renderer/{track}")
        if decoder is not None:
            folder = sources[f"renderer/{track}"]
            decoder.require(track=track)
            _require_same("renderer", folder, "tokenizer", decoder.tokenizer_fingerprint, models["tokenizer"])
            _require_same("renderer", folder, "VAE", decoder.vae_fingerprint, models["renderer/vae"])
    if separator is not None:
        models["separator"] = MaskSeparator.from_pretrained(separator)
        sources["separator"] = separator
    with whole_folder(out) as temporary:
        fingerprints: dict[str, str] = {}
        for component, model in models.items():
            if half:
                _require_half_range(component, model)
            extra = json.loads((Path(sources[component]) / "config.json").read_text(encoding="utf-8"))[
                "extra"
            ]
            for recorded, source in (
                ("tokenizer_fingerprint", "tokenizer"),
                ("vae_fingerprint", "renderer/vae"),
            ):
                if recorded in extra:
                    extra[recorded] = fingerprints[source]
            model.save_pretrained(temporary / component, half=half, extra=extra)
            fingerprints[component] = model.fingerprint
        description = _describe(temporary, name, fingerprints, dict(defaults or {}))
        write_json(temporary / _DESCRIPTION, description, indent=2)
        total = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        if total > LARGEST_BYTES:
            raise CheckpointError(
                f"the bundle would have {total / 1e6:.1f} MB, more than {LARGEST_BYTES / 1e6:.0f} MB; "
                f"use --half or smaller components"
            )
    return out


def _describe(
    folder: Path, name: str, fingerprints: Mapping[str, str], defaults: dict[str, Any]
) -> dict[str, Any]:
    listed = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": FORMAT,
        "name": name,
        "fingerprint": hashlib.sha256(" ".join(fingerprints.values()).encode()).hexdigest()[:16],
        "tokenizer_fingerprint": fingerprints["tokenizer"],
        "components": dict(fingerprints),
        "defaults": defaults,
        "files": {path.relative_to(folder).as_posix(): _sha256(path) for path in listed},
    }


def _check_files(folder: Path, listed: Mapping[str, str]) -> None:
    """Raise CheckpointError at the first listed file that is missing or has other bytes."""
    missing = [component for component in COMPONENTS if f"{component}/config.json" not in listed]
    if missing:
        raise CheckpointError(f"{folder} lists no {missing[0]}; get the bundle again")
    for name, digest in sorted(listed.items()):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; get the bundle again")
        if _sha256(path) != digest:
            raise CheckpointError(
                f"{path} is damaged (its SHA-256 is not the listed one); get the bundle again"
            )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; get the bundle again") from error


def _require_same(user: str, folder: str | Path, part: str, recorded: str | None, model: "nn.Module") -> None:
    if recorded != model.fingerprint:
        raise CheckpointError(
            f"the {user} {folder} was trained on the {part} {recorded}, but the {part} given is "
            f"{model.fingerprint}; use the parts of one training run"
        )


def _require_half_range(component: str, model: "nn.Module") -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool((tensor.abs() <= 65_504).all()):
            raise CheckpointError(f"{component}: {name} does not fit into 16 bits; assemble without --half")


def main(argv: Sequence[str] | None = None) -> int:
    """Assemble a bundle; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.accompany.bundle",
        description="Put trained components together to a model folder.",
    )
    for option, text in (
        ("--tokenizer", "tokenizer folder (stage 3)"),
        ("--lm", "language model folder"),
        ("--vae", "VAE folder"),
        ("--accompaniment", "diffusion decoder folder of the accompaniment"),
        ("--out", "bundle folder to write; replaced when it exists"),
    ):
        parser.add_argument(option, type=Path, required=True, metavar="DIR", help=text)
    parser.add_argument(
        "--vocal-decoder",
        type=Path,
        metavar="DIR",
        help="diffusion decoder folder of the vocal, if there is one",
    )
    parser.add_argument("--separator", type=Path, metavar="DIR", help="separator folder, if there is one")
    parser.add_argument("--half", action="store_true", help="store the weights as float16")
    parser.add_argument("--name", default="small", help="name of the model in reports (default: small)")
    parser.add_argument(
        "--default",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="generation setting this model works best with, e.g. guidance=2.0; may be repeated",
    )
    arguments = parser.parse_args(argv)

    def assemble() -> None:
        from duotok.recipes.accompany.settings import parse_defaults

        out = assemble_bundle(
            arguments.out,
            tokenizer=arguments.tokenizer,
            lm=arguments.lm,
            vae=arguments.vae,
            accompaniment=arguments.accompaniment,
            vocal_decoder=arguments.vocal_decoder,
            separator=arguments.separator,
            half=arguments.half,
            name=arguments.name,
            defaults=parse_defaults(arguments.default),
        )
        size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        print(f"{out}: {size_bytes / 1e6:.1f} MB")

    return guard(assemble)


if __name__ == "__main__":
    sys.exit(main())
