"""Token shards of AccompGen: semantic codes of both tracks, a codec's codes of the accompaniment.

Run: python -m duotok.recipes.lm.accompgen.layered_tokens --semantic runs/small/semantic \\
         --codec runs/small/codec --manifest data/popband/train.jsonl --out data/tokens/accompgen
Run the same command again to go on after an interruption. A folder holds `tokens-00000.safetensors`, ... with
"ITEM/vocal" and "ITEM/semantic" [frames at 50 Hz] and "ITEM/acoustic" [codebooks, codec frames], int32, and
`index.json`. Items that cannot be encoded are named at the end; the others are encoded all the same.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError, DuoTokError
from duotok.tokenizer.common.files import write_json, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.lm.hierarchical.stage import StreamConfig
    from duotok.recipes.corpus.manifest import Item
    from duotok.recipes.lm.tokens import TokenSong
    from duotok.tokenizer.acoustic_codec import AcousticCodec
    from duotok.tokenizer.semantic import SemanticTokenizer

_FORMAT, _INDEX = 1, "index.json"
_SHOWN_REASONS = 3


@dataclass(kw_only=True)
class LayeredIndex:
    """What a folder of shards holds."""

    semantic_fingerprint: str
    codec_fingerprint: str
    semantic: "StreamConfig"
    codec: "StreamConfig"
    songs: "list[TokenSong]" = field(default_factory=list)  # frames are those of semantic codes

    def require(self, semantic: str, codec: str, folder: Path) -> None:
        """Raise DataError unless the codes are of the tokenizers of these fingerprints."""
        for name, wanted in (("semantic", semantic), ("codec", codec)):
            found = getattr(self, f"{name}_fingerprint")
            if found != wanted:
                what = "semantic tokenizer" if name == "semantic" else "codec"
                raise DataError(
                    f"{folder} holds tokens of the {what} {found}, not of {wanted}; make them anew in "
                    "another folder"
                )


class LayeredShards:
    """All codes of a folder; a shard is read when it is first asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        if index is None or not index.songs:
            raise DataError(
                f"{folder} holds no {_INDEX} with items; run python -m "
                "duotok.recipes.lm.accompgen.layered_tokens first"
            )
        self.index = index
        self._shards: dict[int, Mapping[str, Tensor]] = {}

    def codes(self, song: "TokenSong") -> "dict[str, Tensor]":
        """Return {"vocal" and "semantic": [1, frames], "acoustic": [codebooks, codec frames]} int64."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / f"tokens-{song.shard:05d}.safetensors"
        try:
            if song.shard not in self._shards:
                self._shards[song.shard] = load_file(path)
            shard = self._shards[song.shard]
            found = {name: shard[f"{song.id}/{name}"].long() for name in ("vocal", "semantic", "acoustic")}
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path} is missing or damaged; make the tokens again") from error
        found |= {name: found[name][None] for name in ("vocal", "semantic")}
        for name, stream in (("semantic", self.index.semantic), ("acoustic", self.index.codec)):
            stream.check(found[name][None], f"{path}: {song.id}: {name}")
        self.index.semantic.check(found["vocal"][None], f"{path}: {song.id}: vocal")
        return found


def _read_index(folder: Path) -> LayeredIndex | None:
    from duotok.lm.hierarchical.stage import StreamConfig
    from duotok.recipes.lm.tokens import TokenSong

    path = folder / _INDEX
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != _FORMAT:
            raise ValueError("format")
        streams = {name: StreamConfig(**values.pop(name)) for name in ("semantic", "codec")}
        songs = [TokenSong(**song) for song in values.pop("songs")]
        return LayeredIndex(songs=songs, **streams, **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no index of AccompGen's tokens; make them anew in another folder"
        ) from error


def _write_index(folder: Path, index: LayeredIndex) -> None:
    write_json(folder / _INDEX, {"format": _FORMAT, **asdict(index)})


def encode_item(
    item: "Item", semantic: "SemanticTokenizer", codec: "AcousticCodec", device: str
) -> "dict[str, Tensor]":
    """Return the codes of an item, as shards hold them."""
    vocal, band = (item.read(track)[None].to(device) for track in ("vocal", "accompaniment"))
    return {
        "vocal": semantic.encode(vocal)[0].int().cpu(),
        "semantic": semantic.encode(band)[0].int().cpu(),
        "acoustic": codec.encode(band)[0].int().cpu(),
    }


def make_tokens(
    *, semantic: Path, codec: Path, manifest: Path, out: Path, items_per_shard: int, device: str
) -> int:
    """Encode the items that no shard holds yet; return how many there are. DataError: some were left out."""
    from tqdm import tqdm

    from duotok.lm.hierarchical.stage import StreamConfig
    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.recipes.lm.tokens import TokenSong
    from duotok.renderer.latent_codec import open_codec
    from duotok.tokenizer.semantic import SemanticTokenizer

    hearing, coding = SemanticTokenizer.from_pretrained(semantic).to(device), open_codec(codec).to(device)
    prints = str(hearing.fingerprint), str(coding.fingerprint)
    index = _read_index(out)
    if index is None:
        index = LayeredIndex(
            semantic_fingerprint=prints[0],
            codec_fingerprint=prints[1],
            semantic=StreamConfig(rate_hz=hearing.frame_rate_hz, codebook_size=hearing.config.clusters),
            codec=StreamConfig(
                rate_hz=coding.frame_rate_hz, levels=coding.codebooks, codebook_size=coding.codebook_size
            ),
        )
    index.require(*prints, out)
    items, known = read_manifest(manifest), {song.id for song in index.songs}
    waiting: dict[str, Tensor] = {}
    songs: list[TokenSong] = []
    left_out: dict[str, str] = {}
    number = 1 + max((song.shard for song in index.songs), default=-1)

    def close_shard() -> None:
        nonlocal number
        write_tensors(out / f"tokens-{number:05d}.safetensors", waiting)
        # The shard counts from the moment the index names it; one without an entry is written over.
        index.songs.extend(songs)
        _write_index(out, index)
        waiting.clear()
        songs.clear()
        number += 1

    for item in tqdm([item for item in items if item.id not in known], desc="tokens", disable=None):
        try:
            codes = encode_item(item, hearing, coding, device)
        except (DuoTokError, OSError, ValueError) as error:
            left_out[item.id] = " ".join(str(error).split())[:300]
            continue
        waiting |= {f"{item.id}/{name}": values for name, values in codes.items()}
        place = {"shard": number, "start": 0, "frames": len(codes["vocal"])}
        songs.append(TokenSong(id=item.id, song=item.song, split=item.split, **place))
        if len(songs) >= items_per_shard:
            close_shard()
    if songs:
        close_shard()
    if left_out:
        shown = "; ".join(f"{name}: {why}" for name, why in list(left_out.items())[:_SHOWN_REASONS])
        raise DataError(f"{len(index.songs)} items are in {out}, {len(left_out)} were left out: {shown}")
    return len(index.songs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Token shards of a corpus, for AccompGen's three stages")
    add = parser.add_argument
    add("--semantic", type=Path, required=True, help="semantic tokenizer folder")
    add("--codec", type=Path, required=True, help="acoustic codec folder")
    add("--manifest", type=Path, required=True, help="JSONL manifest of the corpus")
    add("--out", type=Path, required=True, help="folder of the shards")
    add("--items-per-shard", type=int, default=64)
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... or mps")
    arguments = parser.parse_args(argv)
    if arguments.items_per_shard < 1:
        parser.error("--items-per-shard must be at least 1")
    return guard(lambda: print(f"{make_tokens(**vars(arguments))} items -> {arguments.out}"))


if __name__ == "__main__":
    sys.exit(main())
