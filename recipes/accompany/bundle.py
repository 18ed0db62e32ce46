"""A bundle: one folder with everything `generate` needs, checked file by file when it is loaded.

Run: python -m duotok.recipes.accompany.bundle --tokenizer DIR --lm DIR --vae DIR --accompaniment DIR \\
         [--vocal-decoder DIR] [--separator DIR] [--score-reader DIR] --out DIR --half \\
         [--card FILE | --data pop909 --data "my songs (mine)" --results results.json --licence apache-2.0]
     or, of AccompGen: --semantic DIR --codec DIR --lm DIR [--separator DIR] --out DIR ...
"""

import argparse
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from duotok.recipes.accompany.card import DATA, model_card, read_figures
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.lm.contract import LanguageModel
    from duotok.renderer.renderer import CodecRenderer, Renderer
    from duotok.tokenizer.common.checkpoint import Component
    from duotok.tokenizer.layered import LayeredTokenizer
    from duotok.tokenizer.model import DuoTokenizer
    from duotok.tokenizer.music.score_reader import ScoreReader

FORMAT = 1
COMPONENTS = ("tokenizer", "lm", "renderer/vae", "renderer/accompaniment")
OPTIONAL_COMPONENTS = ("renderer/vocal", "separator", "score_reader")
DUOTOK, ACCOMPGEN = "duotok", "accompgen"
# What a bundle of each system must hold.
SYSTEMS = {DUOTOK: COMPONENTS, ACCOMPGEN: ("semantic", "codec", "lm")}
CARD = "README.md"
_DESCRIPTION = "bundle.json"
_HALF_LARGEST = 65_504


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The loaded parts of a model (CPU, eval) and what its bundle.json says about them."""

    system: str  # one of SYSTEMS
    tokens: "DuoTokenizer | LayeredTokenizer"  # waves to what the language model knows
    lm: "LanguageModel[Any]"
    sound: "Renderer | CodecRenderer"  # what it composes to waves
    score_reader: "ScoreReader | None"
    folder: Path
    name: str
    fingerprint: str
    defaults: dict[str, Any]  # generation settings this model works best with

    @property
    def tokenizer(self) -> "DuoTokenizer":
        """The dual-track tokenizer; ConfigError in a bundle of another system."""
        from duotok.tokenizer.model import DuoTokenizer

        if not isinstance(self.tokens, DuoTokenizer):
            raise self._other_system()
        return self.tokens

    @property
    def renderer(self) -> "Renderer":
        """The diffusion renderer; ConfigError in a bundle of another system."""
        from duotok.renderer.renderer import Renderer

        if not isinstance(self.sound, Renderer):
            raise self._other_system()
        return self.sound

    def chart(self, sheet: "Tensor | None") -> "Tensor | None":
        """Return what the renderer is told [..., frames, 5] of a sheet [..., frames, COLUMNS].

        None: without a sheet, and where the decoder was never told any. A style is known to it by its name.
        """
        import torch

        from duotok.lm.sheet.columns import CHART
        from duotok.renderer.chart import STYLE, UNKNOWN
        from duotok.renderer.renderer import Renderer

        known = self.sound.styles if isinstance(self.sound, Renderer) else ()
        if sheet is None or not known:
            return None
        chart = sheet[..., list(CHART)]
        asked = () if self.lm.band is None else self.lm.band.styles
        numbers = [known.index(style) if style in known else UNKNOWN for style in asked]
        chart[..., STYLE] = torch.tensor([*numbers, UNKNOWN])[chart[..., STYLE]]  # the last: unknown
        return chart

    def _other_system(self) -> ConfigError:
        return ConfigError(
            f"{self.folder} is a model of {self.system}; this needs one of {DUOTOK}: give another by --model"
        )


def default_bundle() -> Path:
    """Folder of the model that ships with the package."""
    return Path(str(files("duotok.recipes"))) / "small" / "bundle"


def find_bundle(source: str | Path | None = None, *, revision: str | None = None) -> Path:
    """Return the folder of a model: itself, that of the hub's "owner/name[@revision]", None: the shipped."""
    from duotok.tokenizer.common.hub import local_folder

    return local_folder(default_bundle() if source is None else source, revision)


def load_bundle(source: str | Path | None = None, *, revision: str | None = None) -> Bundle:
    """Load a bundle: a folder, or "owner/name" of the hub at a revision (None: the shipped one).

    Raises CheckpointError, in one line, when a file is missing, damaged or not listed, the format is another
    one, the parts are not those of one training run, or the hub has no such model.
    """
    from duotok.renderer.renderer import CodecRenderer, Renderer
    from duotok.tokenizer.layered import LayeredTokenizer

    folder = find_bundle(source, revision=revision)
    description = read_bundle_description(folder)
    _check_files(folder, description)
    part_of = _open_functions()
    score_reader = None
    told = {"folder": folder, **{name: description[name] for name in ("system", "name", "defaults")}}
    told["fingerprint"] = description["fingerprint"]
    if description["system"] == ACCOMPGEN:
        parts = {name: part_of[name](folder / name) for name in SYSTEMS[ACCOMPGEN]}
        semantic, codec, lm = (parts[name] for name in ("semantic", "codec", "lm"))
        _require_same_run(f"{folder}/lm", lm, {name: part.fingerprint for name, part in parts.items()})
        tokens, sound = LayeredTokenizer(semantic, codec), CodecRenderer(codec)
        return Bundle(tokens=tokens, lm=lm, sound=sound, score_reader=None, **told)
    tokenizer, lm = (part_of[name](folder / name) for name in ("tokenizer", "lm"))
    renderer = Renderer.from_pretrained(folder / "renderer")
    _require_same_run(f"{folder}/lm", lm, {"tokenizer": tokenizer.fingerprint})
    renderer.require_tokenizer(tokenizer.fingerprint)
    if "score_reader/config.json" in description["files"]:
        score_reader = part_of["score_reader"](folder / "score_reader")
        _require_same_run(f"{folder}/score_reader", score_reader, {"tokenizer": tokenizer.fingerprint})
    return Bundle(tokens=tokenizer, lm=lm, sound=renderer, score_reader=score_reader, **told)


def choose_bundle(source: str | Path | None, system: str | None) -> str | Path | None:
    """Return where a model is (None: the shipped one); CheckpointError where it is not of this system."""
    if system is None:
        return source
    folder = find_bundle(source)
    found = read_bundle_description(folder)["system"]
    if found != system:
        name = "the model in the package" if source is None else str(source)
        raise CheckpointError(f"{name} is one of {found}; give a model of {system} by --model")
    return folder


def read_bundle_description(folder: Path) -> dict[str, Any]:
    """Return the checked bundle.json of a folder; raises CheckpointError, in one line, where it is not sound.

    A bundle may come from anywhere: the files it names lie inside of it, and the fingerprints fit each other.
    """
    from duotok.tokenizer.common.files import read_json_mapping

    path = folder / _DESCRIPTION
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a model, it has no {_DESCRIPTION}; give a bundle by --model")
    description = {"defaults": {}, "name": folder.name, "system": DUOTOK} | read_json_mapping(path, "bundle")
    if not isinstance(description.get("files"), dict):
        raise CheckpointError(f"{path} is damaged: it lists no files; get the bundle again")
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has bundle format {description.get('format')!r}, this version reads {FORMAT}; "
            f"upgrade duotok or get a bundle of this version"
        )
    if description["system"] not in SYSTEMS:
        raise CheckpointError(
            f"{folder} is a model of {description['system']!r}, this version knows {', '.join(SYSTEMS)}; "
            "upgrade duotok or get another bundle"
        )
    for key in ("components", "defaults", "name", "fingerprint"):
        kind, wanted = (dict, "a mapping") if key in ("components", "defaults") else (str, "a text")
        if not isinstance(description.get(key), kind):
            raise CheckpointError(f"{path} is damaged: {key} must be {wanted}; get the bundle again")
    for name in description["files"]:
        if name.startswith("/") or ".." in PurePosixPath(name).parts or set(name) & set("\\:"):
            raise CheckpointError(f"{path} names {name!r}, which is not inside the bundle; do not use it")
    needed = SYSTEMS[description["system"]]
    missing = [name for name in needed if f"{name}/config.json" not in description["files"]]
    if missing:
        raise CheckpointError(f"{folder} lists no {missing[0]}; get the bundle again")
    return description


def read_styles(folder: Path) -> list[str]:
    """Return the styles that a bundle's band can be asked for, read without loading it; none of an older one.

    Raises CheckpointError where its language model has no readable description.
    """
    from duotok.tokenizer.common.files import read_json_mapping

    config = read_json_mapping(folder / "lm" / "config.json", "bundle").get("config") or {}
    return sorted({style for style, *_ in (config.get("band") or {}).get("heard", ())})


def assemble_bundle(
    out: str | Path,
    *,
    lm: str | Path,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    accompaniment: str | Path | None = None,
    semantic: str | Path | None = None,
    codec: str | Path | None = None,
    vocal_decoder: str | Path | None = None,
    separator: str | Path | None = None,
    score_reader: str | Path | None = None,
    half: bool = True,
    name: str = "small",
    defaults: Mapping[str, Any] | None = None,
    card: str | Path | None = None,
) -> Path:
    """Copy the component folders into the bundle folder `out`, which appears only when it is whole.

    With a codec it is a bundle of AccompGen, which needs semantic, codec and lm; else tokenizer, lm, vae and
    accompaniment are needed.
    half: store the weights as float16. card: the model card to copy; None keeps the one of the bundle that is
    replaced, if it has one. The components keep belonging together: each records the fingerprints of the
    others as they are stored here. Raises CheckpointError when they do not fit each other.
    """
    from duotok.tokenizer.common.checkpoint import read_description
    from duotok.tokenizer.common.files import whole_folder, write_json

    out = Path(out)
    folders = (tokenizer, lm, vae, accompaniment, vocal_decoder, separator, score_reader, semantic, codec)
    # Parts come before those that were trained on them.
    order = sorted(
        zip((*COMPONENTS, *OPTIONAL_COMPONENTS, "semantic", "codec"), folders, strict=True),
        key=lambda each: each[0] not in ("semantic", "codec"),
    )
    sources = {component: Path(source) for component, source in order if source is not None}
    system = DUOTOK if codec is None else ACCOMPGEN
    usable = {*SYSTEMS[system], *(OPTIONAL_COMPONENTS if system == DUOTOK else ("separator",))}
    if set(SYSTEMS[system]) - set(sources) or set(sources) - usable:
        raise ConfigError(
            "a bundle needs tokenizer, lm, vae and accompaniment, or, of AccompGen, semantic, codec and lm; "
            f"got {', '.join(sources)}"
        )
    part_of = _open_functions()
    models = {component: part_of[component](source) for component, source in sources.items()}
    known_as = {component: model.known_as for component, model in models.items()}
    for component, model in models.items():
        _require_same_run(str(sources[component]), model, known_as)
        if "track" in model.STORED:
            model.require(track=component.removeprefix("renderer/"))
        if half:
            _require_half_range(component, model)
    if card is None and (out / CARD).is_file():
        card = out / CARD
    with whole_folder(out) as temporary:
        for component, model in models.items():
            extra = read_description(sources[component], model.KIND)["extra"]
            # The parts it was trained on come first and are known as what is stored here by now.
            extra |= {key: known_as[part] for key, part in _RECORDED[system].items() if key in extra}
            model.save_pretrained(temporary / component, half=half, extra=extra)
            known_as[component] = model.known_as
        fingerprints = {component: model.fingerprint for component, model in models.items()}
        listed = sorted(path for path in temporary.rglob("*") if path.is_file())
        description = {
            "format": FORMAT,
            "name": name,
            "fingerprint": _join(fingerprints.values()),
            "tokenizer_fingerprint": fingerprints[_RECORDED[system]["tokenizer_fingerprint"]],
            **({} if system == DUOTOK else {"system": system}),
            "components": fingerprints,
            "defaults": dict(defaults or {}),
            "files": {path.relative_to(temporary).as_posix(): _sha256(path) for path in listed},
        }
        write_json(temporary / _DESCRIPTION, description, indent=2)
        if card is not None:
            shutil.copyfile(card, temporary / CARD)
    return out


def write_card(
    folder: Path,
    *,
    data: Iterable[str] = (),
    figures: Sequence[str] = (),
    licence: str | None = None,
) -> None:
    """Write the card of a bundle into its folder; see model_card. Raises CheckpointError and DataError."""
    from duotok.tokenizer.common.files import read_json_mapping, write_text

    description = read_bundle_description(folder)
    extra = read_json_mapping(folder / "lm" / "config.json", "bundle").get("extra")
    if isinstance(extra, dict) and "finetuned" in extra:
        data = [*data, "songs of the person who fine-tuned it, which are not in this folder"]
    about = {"styles": read_styles(folder), "data": list(data), "figures": figures, "licence": licence}
    write_text(folder / CARD, model_card(description, **about))


# What a component remembers of another that it was trained on.
_RECORDED = {
    DUOTOK: {"tokenizer_fingerprint": "tokenizer", "vae_fingerprint": "renderer/vae"},
    ACCOMPGEN: {"tokenizer_fingerprint": "semantic", "codec_fingerprint": "codec"},
}


def _open_functions() -> "dict[str, Callable[[Path], Any]]":
    """Return what opens each component's folder, whatever of its family lies there."""
    from duotok.lm.open import open_lm
    from duotok.renderer.diffusion import DiffusionDecoder
    from duotok.renderer.latent_codec import open_codec
    from duotok.renderer.renderer import open_vae
    from duotok.tokenizer.model import DuoTokenizer
    from duotok.tokenizer.music.score_reader import ScoreReader
    from duotok.tokenizer.semantic import SemanticTokenizer
    from duotok.tokenizer.separator import MaskSeparator

    return {
        "tokenizer": DuoTokenizer.from_pretrained,
        "lm": open_lm,
        "renderer/vae": open_vae,
        "renderer/accompaniment": DiffusionDecoder.from_pretrained,
        "renderer/vocal": DiffusionDecoder.from_pretrained,
        "separator": MaskSeparator.from_pretrained,
        "score_reader": ScoreReader.from_pretrained,
        "semantic": SemanticTokenizer.from_pretrained,
        "codec": open_codec,
    }


def _join(fingerprints: Iterable[str | None]) -> str:
    return hashlib.sha256(" ".join(map(str, fingerprints)).encode()).hexdigest()[:16]


def _check_files(folder: Path, description: Mapping[str, Any]) -> None:
    """Raise CheckpointError at the first file of a component that is missing, changed or not listed.

    What lies beside the components, as a model card, is nobody's to check: nothing is read from it.
    """
    from duotok.tokenizer.common.files import read_json_mapping

    listed = description["files"]
    for name, digest in sorted(listed.items()):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; get the bundle again")
        if _sha256(path) != digest:
            raise CheckpointError(f"{path} is damaged, its SHA-256 not the listed one; get the bundle again")
    known = (*SYSTEMS[description["system"]], *OPTIONAL_COMPONENTS)
    for room in sorted({name.partition("/")[0] for name in known}):
        for path in sorted((folder / room).rglob("*")):
            name = path.relative_to(folder).as_posix()
            if name not in listed and not path.is_dir() and not path.name.startswith("."):
                raise CheckpointError(f"{path} is not listed in {_DESCRIPTION}; remove it")
    stated = description["components"]
    for component in known:
        if f"{component}/config.json" in listed:
            part = read_json_mapping(folder / component / "config.json", "bundle").get("fingerprint")
            if stated.get(component) != part:
                raise CheckpointError(
                    f"{folder / _DESCRIPTION} states the fingerprint {stated.get(component)} of {component}, "
                    f"which has {part}; get the bundle again"
                )
    if description["fingerprint"] != _join(stated.values()):
        raise CheckpointError(
            f"{folder / _DESCRIPTION} states the fingerprint {description['fingerprint']}, but its parts "
            f"make {_join(stated.values())}; get the bundle again"
        )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; get the bundle again") from error


def _require_same_run(where: str, model: "Component[Any]", known_as: Mapping[str, str | None]) -> None:
    """Raise CheckpointError where a model was trained on another part than the one that is known so."""
    system = ACCOMPGEN if "codec" in known_as else DUOTOK
    for recorded, part in _RECORDED[system].items():
        if recorded in model.STORED and part in known_as:
            trained_on = getattr(model, recorded)
            if trained_on != known_as[part]:
                raise CheckpointError(
                    f"{where} was trained on the {part} {trained_on}, but the {part} given is "
                    f"{known_as[part]}; use the parts of one training run"
                )


def _require_half_range(component: str, model: "Component[Any]") -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool((tensor.abs() <= _HALF_LARGEST).all()):
            raise CheckpointError(f"{component}: {name} does not fit into 16 bits; assemble without --half")


def main(argv: Sequence[str] | None = None) -> int:
    """Assemble a bundle; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.accompany.bundle",
        description="Put trained components together to a model folder.",
    )
    for option, required, text in (
        ("--tokenizer", False, "tokenizer folder (stage 3)"),
        ("--lm", True, "language model folder"),
        ("--vae", False, "VAE folder"),
        ("--accompaniment", False, "diffusion decoder folder of the accompaniment"),
        ("--semantic", False, "semantic tokenizer folder, of AccompGen"),
        ("--codec", False, "acoustic codec folder, of AccompGen"),
        ("--vocal-decoder", False, "diffusion decoder folder of the vocal, if there is one"),
        ("--separator", False, "separator folder, if there is one"),
        ("--score-reader", False, "score reader folder, if there is one"),
        ("--out", True, "bundle folder to write; replaced when it exists"),
    ):
        parser.add_argument(option, type=Path, required=required, metavar="DIR", help=text)
    text = f"model card, copied as {CARD} (default: the one of the bundle that is replaced, or a new one)"
    parser.add_argument("--card", type=Path, metavar="FILE", help=text)
    text = (
        f"what it learned from, for a new card: {', '.join(DATA)}, or a text with the licence in it; again "
    )
    parser.add_argument("--data", action="append", default=[], metavar="NAME", help=text + "for more")
    text = "figures of evaluation.score, for a new card"
    parser.add_argument("--results", type=Path, metavar="FILE", help=text)
    text = "of the weights, for a new card, as the hub calls it: apache-2.0, cc-by-4.0, ..."
    parser.add_argument("--licence", metavar="NAME", help=text)
    parser.add_argument("--half", action="store_true", help="store the weights as float16")
    parser.add_argument("--name", default="small", help="name of the model in reports (default: small)")
    text = "generation setting this model works best with, e.g. guidance=2.0; may be repeated"
    parser.add_argument("--default", action="append", default=[], metavar="KEY=VALUE", help=text)
    options = vars(parser.parse_args(argv))
    about = {name: options.pop(name) for name in ("data", "results", "licence")}
    if options["card"] is not None and any(about.values()):
        parser.error("--card is the whole card; --data, --results and --licence are for one that is written")

    def assemble() -> None:
        from duotok.recipes.accompany.request import parse_defaults

        results = about.pop("results")
        about["figures"] = [] if results is None else read_figures(results)
        out = assemble_bundle(defaults=parse_defaults(options.pop("default")), **options)
        if any(about.values()) or not (out / CARD).is_file():
            write_card(out, **about)
        size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        print(f"{out}: {size_bytes / 1e6:.1f} MB")

    return guard(assemble)


if __name__ == "__main__":
    sys.exit(main())
