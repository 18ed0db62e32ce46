"""Encode a corpus into shards of codes and latents of one track: what the diffusion decoder trains on.

Run: python -m duotok.recipes.renderer.latents --tokenizer runs/small/stage3/final \\
         --vae runs/small/vae/final --manifest data/popband/train.jsonl --track accompaniment \\
         --out data/latents/train
Run the same command again to go on after an interruption; --device cuda encodes on a GPU, --workers and --ray
in several processes. With --drawn-by runs/small/accompaniment/final the latents are those which that decoder
draws from the codes, for train_spectral_vae. A shard is one safetensors file: per item "<id>/codes" [frames]
int32 at 25 Hz and "<id>/latents" [2 * frames, latent_dim] float16 at 50 Hz, and as metadata the track and the
fingerprints of tokenizer, VAE and decoder.
"""

import argparse
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from duotok.recipes.corpus.manifest import Item, read_manifest, refuse_duplicates
from duotok.recipes.lm.sheets import write_chart
from duotok.recipes.workers.pool import add_worker_options, take_workers, tell_left_out
from duotok.renderer.autoencoder import Autoencoder
from duotok.renderer.diffusion import LATENTS_PER_FEATURE, DiffusionDecoder
from duotok.renderer.renderer import Renderer, open_vae
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import CheckpointError, DataError
from duotok.tokenizer.common.files import write_tensors
from duotok.tokenizer.heads import STEMS
from duotok.tokenizer.model import HOP_SAMPLES, TRACKS, DuoTokenizer

_STEPS = 4  # of drawing, as the shipped model does
Pair = tuple[Tensor, Tensor]  # codes [frames], latents [2 * frames, latent_dim]


@dataclass(frozen=True, kw_only=True)
class ShardOrigin:
    """What made a shard; shards of different origins do not mix."""

    track: str
    tokenizer_fingerprint: str
    vae_fingerprint: str
    drawn_by: str = ""  # fingerprint of the decoder that drew the latents from the codes; empty: of the sound


class Cut(NamedTuple):
    """A stretch of one item."""

    name: str  # of the item
    start: int  # where the latents begin in the item, in code frames
    codes: Tensor  # [context frames] int64
    offset: int  # where the latents begin in the codes, in code frames
    latents: Tensor  # [latent_dim, 2 * frames] float32


def encode_item(
    item: Item, track: str, tokenizer: DuoTokenizer, vae: Autoencoder, decoder: DiffusionDecoder | None = None
) -> Pair:
    """Return the codes and the latents of one item's track, two latent frames per code exactly.

    decoder: draws the latents from the codes and the item's chart, always the same ones, in place of the VAE.
    """
    device = next(tokenizer.parameters()).device
    wave = pad_to_frames(item.read(track).to(device))
    heard_as = track if track in TRACKS else "accompaniment"
    codes = tokenizer.encode(wave[None], heard_as)
    if decoder is None:
        return codes[0].cpu(), vae.encode_song(wave).T.cpu()
    latents = Renderer(vae, {track: decoder}).render_latents(
        tokenizer.features(codes, heard_as)[0],
        track=track,
        chart=write_chart(item, tokenizer.frame_rate_hz, decoder.config.styles, frames=codes.shape[1]),
        steps=_STEPS,
        guidance=1.0,
        seed=zlib.crc32(item.id.encode()),
    )
    return codes[0].cpu(), latents.T.cpu()


def pad_to_frames(wave: Tensor) -> Tensor:
    """Pad wave [2, samples] with silence to whole codes, two latent frames each."""
    return functional.pad(wave, (0, -wave.shape[1] % HOP_SAMPLES))


def require_latent_rate(vae: Autoencoder, folder: str | Path, code_rate_hz: float) -> None:
    """Raise CheckpointError unless the VAE of that folder has as many latents per code as the decoder."""
    needed_hz = LATENTS_PER_FEATURE * code_rate_hz
    if vae.latent_rate_hz != needed_hz:
        raise CheckpointError(
            f"the VAE {folder} gives latents at {vae.latent_rate_hz:g} Hz, the decoder needs "
            f"{LATENTS_PER_FEATURE} per code, {needed_hz:g} Hz; give a VAE of that rate"
        )


def add_items(
    folder: str | Path,
    items: Sequence[Item],
    encoded: Callable[[Sequence[Item]], Iterable[tuple[Item, Pair | str]]],
    origin: ShardOrigin,
    items_per_shard: int = 32,
) -> None:
    """Write the items that no shard of the folder holds yet, whose origin must be the same.

    encoded: gives each item's pair, or the reason why there is none. Raises DataError at the end where items
    were left out.
    """
    refuse_duplicates(items, "the manifest")
    shards = LatentShards(folder)
    shards.require(origin)
    missing = [item for item in items if item.id not in shards.frames]
    number = 1 + max((int(path.stem.split("-")[1]) for path in shards.paths), default=-1)
    pairs: dict[str, Pair] = {}
    left_out = []
    with tqdm(total=len(missing), unit="item", desc=str(folder), disable=None) as progress:
        for count, (item, found) in enumerate(encoded(missing), start=1):
            if isinstance(found, str):
                left_out.append(f"{item.id}: {found}")
            else:
                pairs[item.id] = found
            progress.update()
            if pairs and (len(pairs) == items_per_shard or count == len(missing)):
                write_shard(shards.folder, number, pairs, origin)
                number, pairs = number + 1, {}
    if left_out:
        raise DataError(f"{len(left_out)} of {len(items)} items were left out: {tell_left_out(left_out)}")


def write_shard(folder: Path, number: int, pairs: Mapping[str, Pair], origin: ShardOrigin) -> Path:
    """Write one shard as a whole file."""
    tensors: dict[str, Tensor] = {}
    for name, (codes, latents) in pairs.items():
        if len(latents) != LATENTS_PER_FEATURE * len(codes):
            raise DataError(f"item {name} has {len(codes)} codes but {len(latents)} latent frames")
        tensors[f"{name}/codes"] = codes.to(torch.int32)
        tensors[f"{name}/latents"] = latents.to(torch.float16)
    path = folder / f"shard-{number:05d}.safetensors"
    write_tensors(path, tensors, vars(origin))
    return path


class LatentShards:
    """All shards of a folder, read in place (memory-mapped)."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths = sorted(self.folder.glob("shard-*.safetensors"))
        self._files: dict[str, safe_open] = {}  # by item
        self.frames: dict[str, int] = {}  # code frames by item
        origins = set()
        for path in self.paths:
            try:
                file = safe_open(path, framework="pt")
                origins.add(ShardOrigin(**(file.metadata() or {})))
                for key in file.keys():
                    name, _, kind = key.rpartition("/")
                    if kind == "codes":
                        self._files[name] = file
                        self.frames[name] = file.get_slice(key).get_shape()[0]
            except (SafetensorError, TypeError) as error:
                raise DataError(f"{path} is damaged; delete it and run the latents recipe again") from error
        if len(origins) > 1:
            told = "holds shards of different tokenizers, VAEs or tracks; delete it and make it again"
            raise CheckpointError(f"{self.folder} {told}")
        self.origin: ShardOrigin | None = next(iter(origins), None)

    def require(self, origin: ShardOrigin) -> None:
        """Raise CheckpointError unless these shards, if there are any, have this origin."""
        if self.origin is not None and self.origin != origin:
            raise CheckpointError(
                f"{self.folder} was made by {self.origin}, not by {origin}; give another folder or delete it"
            )

    def cut(self, name: str, start: int, frames: int, *, context_start: int, context_frames: int) -> Cut:
        """Return code frames start..start + frames of an item, with the codes of a wider context."""
        file = self._files[name]
        codes = file.get_slice(f"{name}/codes")[context_start : context_start + context_frames]
        first, stop = start * LATENTS_PER_FEATURE, (start + frames) * LATENTS_PER_FEATURE
        latents = file.get_slice(f"{name}/latents")[first:stop]
        return Cut(
            name=name,
            start=start,
            codes=codes.long(),
            offset=start - context_start,
            latents=latents.float().T,
        )

    def draw_cut(self, rng: np.random.Generator, names: list[str], frames: int, context: int) -> Cut:
        """Draw a stretch of a random item, anywhere in 2 * context more frames of codes, ends too."""
        name = names[int(rng.integers(len(names)))]
        length = self.frames[name]
        context_frames = frames + 2 * context
        context_start = int(rng.integers(length - context_frames + 1))
        start = context_start + int(rng.integers(2 * context + 1))
        return self.cut(name, start, frames, context_start=context_start, context_frames=context_frames)

    def statistics(self, seconds_each: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return the latents' mean and deviation, each [latent_dim, 1], from a cut of every item."""
        rng = np.random.default_rng(seed)
        cuts = []
        for name, length in self.frames.items():
            frames = min(length, round(seconds_each * 25))
            start = int(rng.integers(length - frames + 1))
            cuts.append(self.cut(name, start, frames, context_start=start, context_frames=frames).latents)
        latents = torch.cat(cuts, dim=1).double()
        deviation = latents.std(dim=1, keepdim=True).clamp_min(1e-3)
        return latents.mean(dim=1, keepdim=True).float(), deviation.float()


_encoder: tuple[str, DuoTokenizer, Autoencoder, DiffusionDecoder | None] | None = None  # one per process


def _start(
    tokenizer: Path, vae: Path, decoder: Path | None, track: str, device: str, threads: int | None
) -> None:
    global _encoder
    if threads is not None:
        torch.set_num_threads(threads)
    draws = None if decoder is None else DiffusionDecoder.from_pretrained(decoder).to(device)
    _encoder = track, DuoTokenizer.from_pretrained(tokenizer).to(device), open_vae(vae).to(device), draws


@torch.inference_mode()
def _encode(item: Item) -> Pair:
    assert _encoder is not None
    return encode_item(item, *_encoder)


def encode_corpus(arguments: argparse.Namespace) -> None:
    """Encode the items that no shard holds yet."""
    workers, track = take_workers(vars(arguments)), arguments.track
    tokenizer, vae = DuoTokenizer.from_pretrained(arguments.tokenizer), open_vae(arguments.vae)
    require_latent_rate(vae, arguments.vae, tokenizer.frame_rate_hz)
    decoder = None if arguments.drawn_by is None else DiffusionDecoder.from_pretrained(arguments.drawn_by)
    if decoder is not None:
        decoder.require(tokenizer=tokenizer.fingerprint, vae=vae.known_as, track=track)
    origin = ShardOrigin(
        track=track,
        tokenizer_fingerprint=str(tokenizer.fingerprint),
        vae_fingerprint=str(vae.known_as),
        drawn_by="" if decoder is None else str(decoder.fingerprint),
    )
    drawn_by = None if arguments.drawn_by is None else arguments.drawn_by.absolute()
    start = (arguments.tokenizer.absolute(), arguments.vae.absolute(), drawn_by, track, arguments.device)

    def encoded(items: Sequence[Item]) -> Iterable[tuple[Item, Pair | str]]:
        if workers.are_apart:
            return workers.run(items, _encode, start=_start, arguments=(*start, 1))
        _start(*start, None)
        return ((item, _encode(item)) for item in items)

    add_items(arguments.out, read_manifest(arguments.manifest), encoded, origin, arguments.items_per_shard)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Codes and latents of a corpus, for the diffusion decoder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--vae", type=Path, required=True, help="VAE folder")
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL manifest of the corpus")
    text = "the codes of drums, bass and other are the accompaniment's"
    parser.add_argument("--track", choices=(*TRACKS, *STEMS[1:]), default="accompaniment", help=text)
    text = "decoder folder: the latents are those that it draws from the codes, not those of the sound"
    parser.add_argument("--drawn-by", type=Path, metavar="DECODER", help=text)
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--items-per-shard", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    add_worker_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.items_per_shard < 1:
        parser.error("--items-per-shard must be at least 1")
    return guard(lambda: encode_corpus(arguments))


if __name__ == "__main__":
    sys.exit(main())
