"""Fixtures that many tests share."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
import torch

from duotok.recipes.accompany.bundle import assemble_bundle
from duotok.recipes.corpus.manifest import Item, write_manifest
from duotok.recipes.lm.tokens import TokenIndex, TokenShards, append_shard
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, write_audio

if TYPE_CHECKING:
    from duotok.recipes.accompany.pipeline import Accompanist
    from duotok.tokenizer.model import DuoTokenizer

STEM_LEVELS = {"vocal": 0.05, "drums": 0.03, "bass": 0.05, "other": 0.03}


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of synthetic items (8 s each): harmonic 'singing' over a drone, with clicks as drums."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 4), ("test", 3)):
        items = [_synthetic_item(root, split, number) for number in range(count)]
        write_manifest(root / f"{split}.jsonl", items)
    return root


def _synthetic_item(root: Path, split: str, number: int, seconds: float = 8.0) -> Item:
    rng = np.random.default_rng((number, len(split)))
    times = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    scale = np.array([0, 2, 4, 5, 7, 9, 11])
    notes, vocal = [], np.zeros_like(times)
    for start in np.arange(0.5, seconds - 1, 0.5):
        pitch = int(60 + number + rng.choice(scale))
        sung = (times >= start) & (times < start + 0.45)
        frequency = 440 * 2 ** ((pitch - 69) / 12)
        vocal[sung] = sum(np.sin(2 * np.pi * k * frequency * times[sung]) / k for k in range(1, 6))
        notes.append((float(start), float(start + 0.45), pitch, "la"))
    root_hz = 440 * 2 ** ((48 + number - 69) / 12)
    waves = {
        "vocal": vocal,
        "drums": rng.normal(size=times.size) * (times % 0.5 < 0.03),
        "bass": np.sin(2 * np.pi * root_hz * times),
        "other": sum(np.sin(2 * np.pi * 2 * root_hz * ratio * times) for ratio in (1, 1.26, 1.5)),
    }
    folder = root / "audio" / split / str(number)
    folder.mkdir(parents=True)
    total = torch.zeros(2, times.size)
    for stem, wave in waves.items():
        stereo = torch.from_numpy(np.stack([wave, wave]) * STEM_LEVELS[stem]).float()
        total += stereo
        write_audio(folder / f"{stem}.wav", stereo)
    write_audio(folder / "mix.wav", total)
    name = folder.relative_to(root).as_posix()
    return Item(
        id=f"{split}-{number}",
        split=split,
        source="synthetic",
        song=f"song-{split}-{number}",
        seconds=seconds,
        sample_rate_hz=SAMPLE_RATE_HZ,
        stems={stem: f"{name}/{stem}.wav" for stem in waves},
        mix=f"{name}/mix.wav",
        tempo_bpm=120.0,
        beats_seconds=[float(beat) for beat in np.arange(0, seconds, 0.5)],
        downbeats_seconds=[float(beat) for beat in np.arange(0, seconds, 2.0)],
        chords=[(0.0, seconds, "C:maj")],
        key="C:maj",
        notes=notes,
        voice="sine",
        style="drone",
        root=root,
    )


def save_tiny_components(root: Path, seed: int = 0) -> dict[str, Path]:
    """Real components of tiny size with random weights that belong together: {name: folder}."""
    # Imported here: most tests need no models, and these take seconds to import.
    from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
    from duotok.lm.sheet.playing import BandConfig
    from duotok.lm.sheet.reader import SheetReader, SheetReaderConfig
    from duotok.recipes.tokenizer.train_text_model import train_text_model
    from duotok.renderer.diffusion import DiffusionDecoder, DiffusionDecoderConfig
    from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
    from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig
    from duotok.tokenizer.music.score_reader import ScoreReader, ScoreReaderConfig
    from duotok.tokenizer.text import SentencePieceVocabulary

    torch.manual_seed(seed)
    folders = {name: root / name for name in ("tokenizer", "lm", "vae", "accompaniment", "score_reader")}
    tokenizer = DuoTokenizer(
        DuoTokenizerConfig(
            mel_bands=32, dim=32, heads=2, feed_forward_dim=64, blocks=2, attention_window=8, code_dim=8,
            vocal_codes=64, accompaniment_codes=64, head_dim=16,
        )
    ).with_heads(text=SentencePieceVocabulary(train_text_model(["la la", "la"], 8)), masks=False)  # fmt: skip
    tokenizer.save_pretrained(folders["tokenizer"])
    lm = DualTrackLM.for_tokenizer(
        tokenizer,
        DualTrackLMConfig(
            embedding_dim=16, hidden_dim=32, layers=2, heads=2, key_value_heads=1, feed_forward_dim=64
        ),
    )
    with torch.random.fork_rng():
        reader = SheetReader.for_tokenizer(tokenizer, SheetReaderConfig(dim=8, dilations=(1, 2)))
        lm.add_sheet_reader(reader)
        heard = [("ballad", 4, 70.0), ("rock", 4, 120.0), ("rock", 4, 120.0), ("waltz", 3, 120.0)]
        lm.add_band(BandConfig.count(heard))
        assert lm.sheet is not None
        for parameter in lm.sheet.parameters():  # a sheet that has not been learned yet changes nothing
            torch.nn.init.normal_(parameter, std=0.5)
        score_reader = ScoreReader(
            ScoreReaderConfig(feature_dim=tokenizer.dim, dim=8, dilations=(1,), dropout=0.0)
        )
        torch.nn.init.zeros_(score_reader.heads.bias)  # about half of what may be is played
        score_reader.tokenizer_fingerprint = tokenizer.fingerprint
        score_reader.save_pretrained(folders["score_reader"])
    lm.save_pretrained(folders["lm"])
    vae = SpectralVAE(
        SpectralVAEConfig(
            mid_latents=6, side_latents=2, low_bins=64, group=64, decoder_blocks=1, dim=16, phase_iterations=1
        )
    )
    bases = (torch.linalg.qr(torch.randn_like(basis)).Q for basis in (vae.mid_basis, vae.side_basis))
    loudness = vae.features(0.1 * torch.randn(1, 2, SAMPLE_RATE_HZ)).mean(dim=(0, 1))
    vae.set_linear(mean=loudness, mid_basis=next(bases), side_basis=next(bases), scale=0.1 * vae.latent_scale)
    vae.save_pretrained(folders["vae"])
    decoder = DiffusionDecoder(
        DiffusionDecoderConfig(
            feature_dim=tokenizer.dim, latent_dim=vae.latent_dim, dim=32, heads=2, feed_forward_dim=64,
            blocks=1, condition_blocks=1, styles=("swing", "rock", "ballad"),
        )
    )  # fmt: skip
    for name, parameter in decoder.named_parameters():
        if not parameter.any():  # layers that start at zero would not listen to the features
            torch.nn.init.normal_(parameter, std=0.005 if name.startswith("chart") else 0.05)
    decoder.latent_deviation.fill_(0.5)  # a band whose peaks do not turn the mix down
    decoder.tokenizer_fingerprint = tokenizer.fingerprint
    decoder.vae_fingerprint = vae.fingerprint
    decoder.save_pretrained(folders["accompaniment"])
    return folders


@pytest.fixture(scope="session")
def make_tiny_components() -> Callable[..., dict[str, Path]]:
    """The function that saves components with random weights: (root, seed) -> {name: folder}."""
    return save_tiny_components


@pytest.fixture(scope="session")
def tiny_components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Component folders with random weights, not to be changed."""
    torch.set_num_threads(1)
    return save_tiny_components(tmp_path_factory.mktemp("components"))


@pytest.fixture(scope="session")
def tiny_codec(
    tmp_path_factory: pytest.TempPathFactory, tiny_components: dict[str, Path], tiny_corpus: Path
) -> Path:
    """An acoustic codec of 4 levels of 8 codes at 50 Hz on the tiny VAE, not to be changed.

    Its codes are of the tiny corpus, all of them in use.
    """
    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.recipes.renderer.train_acoustic_codec import fit_scale
    from duotok.renderer.latent_codec import LatentCodec
    from duotok.renderer.renderer import open_vae

    folder = tmp_path_factory.mktemp("codec") / "codec"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        vae = open_vae(tiny_components["vae"])
        codec = LatentCodec.on_vae(vae, levels=4, codebook_size=8, blocks=1, dim=8)
        items = read_manifest(tiny_corpus / "train.jsonl")[:3]
        latents = torch.cat([vae.encode(item.read("accompaniment")[None]) for item in items], dim=2)
        fit_scale(codec, latents, 1.0)
        codec.quantizer.fit_to(codec.to_features(latents).flatten(0, 1), iterations=5)
        codec.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_small_tokenizer() -> Callable[..., "DuoTokenizer"]:
    """(folder, seed=0) -> a tokenizer with random weights that stands in the folder, far below tiny."""
    from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig

    settings = dict(mel_bands=16, dim=16, heads=2, feed_forward_dim=16, blocks=1, attention_window=4)
    settings |= dict(code_dim=4, vocal_codes=11, accompaniment_codes=13, head_dim=8)

    def make(folder: Path, seed: int = 0) -> DuoTokenizer:
        torch.manual_seed(seed)
        DuoTokenizer(DuoTokenizerConfig(**settings)).save_pretrained(folder)
        return DuoTokenizer.from_pretrained(folder)

    return make


@pytest.fixture(scope="session")
def small_tokenizer_folder(
    tmp_path_factory: pytest.TempPathFactory, make_small_tokenizer: Callable[..., "DuoTokenizer"]
) -> Path:
    """One of them, for tests that only read it."""
    folder = tmp_path_factory.mktemp("small_tokenizer") / "tokenizer"
    make_small_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_separator(tmp_path_factory: pytest.TempPathFactory, tiny_components: dict[str, Path]) -> Path:
    """A separator folder with random weights, not to be changed."""
    from duotok.tokenizer.model import DuoTokenizer
    from duotok.tokenizer.separator import MaskSeparator, SeparatorConfig

    torch.manual_seed(0)
    tokenizer = DuoTokenizer.from_pretrained(tiny_components["tokenizer"]).with_heads(text=None, masks=True)
    folder = tmp_path_factory.mktemp("separator") / "separator"
    config = SeparatorConfig(tokenizer=tokenizer.config, channels=4, scales=2, coarse_bands=16)
    MaskSeparator(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_components: dict[str, Path]) -> Path:
    """A bundle of real components with random weights, not to be changed."""
    return assemble_bundle(tmp_path_factory.mktemp("model") / "tiny", name="tiny", **tiny_components)


def sing(seconds: float, *, rate_hz: int = SAMPLE_RATE_HZ, channels: int = 1, seed: int = 0) -> np.ndarray:
    """A synthetic voice [samples, channels]: notes of a C major scale with a few harmonics and gaps."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    wave = np.zeros_like(times)
    for start in np.arange(0.0, seconds, 0.5):
        sung = (times >= start) & (times < start + 0.4)
        frequency = 440 * 2 ** ((60 + int(rng.choice([0, 2, 4, 5, 7, 9, 11])) - 69) / 12)
        wave[sung] = sum(np.sin(2 * np.pi * k * frequency * times[sung]) / k for k in range(1, 5))
    return np.repeat(0.1 * wave[:, None], channels, axis=1).astype(np.float32)


@pytest.fixture(scope="session")
def make_singing() -> Callable[..., np.ndarray]:
    """The function that makes a synthetic voice: (seconds, rate_hz=, channels=) -> [samples, channels]."""
    return sing


@pytest.fixture(scope="module")
def accompanist(tiny_bundle: Path) -> "Accompanist":
    """The tiny band."""
    from duotok.recipes.accompany.pipeline import Accompanist

    return Accompanist.from_pretrained(tiny_bundle)


@pytest.fixture(scope="module")
def vocal(make_singing: Callable[..., np.ndarray]) -> torch.Tensor:
    """A vocal [2, samples] of 2.02 s."""
    return torch.from_numpy(make_singing(2.02).T)


@pytest.fixture(scope="session")
def vocal_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mono vocal at 44.1 kHz of an odd length (2.5 s and 7 samples)."""
    path = tmp_path_factory.mktemp("vocal") / "song.wav"
    soundfile.write(path, np.pad(sing(2.5, rate_hz=44_100), ((0, 7), (0, 0))), 44_100)
    return path


@pytest.fixture(scope="session")
def listening_sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two systems with two clips each: tones of half a second to 0.8 s at different levels."""
    root = tmp_path_factory.mktemp("sounds")
    for number, system in enumerate(("original", "tokens")):
        for clip, seconds in (("one", 0.5), ("two", 0.8)):
            times = np.arange(round(seconds * 44_100)) / 44_100
            tone = (0.5 - 0.4 * number) * np.sin(2 * np.pi * (220 + 110 * number) * times)
            (root / system).mkdir(exist_ok=True)
            soundfile.write(root / system / f"{clip}.wav", tone, 44_100)
    return root


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., TokenShards]:
    """Write token shards of random codes, items of so many frames each per shard, and open them."""
    sizes = {"vocal": 11, "accompaniment": 13}

    def write(folder: Path, shards=((0, (30, 60)), (2, (90,)))) -> TokenShards:
        index = TokenIndex(tokenizer_fingerprint="x", codebook_sizes=sizes, frame_rate_hz=25.0)
        rng = np.random.default_rng(0)
        for first, lengths in shards:
            pairs = {
                f"item{first + n}": (
                    f"song{first + n}",
                    "train",
                    {
                        track: torch.from_numpy(rng.integers(size, size=length))
                        for track, size in sizes.items()
                    },
                )
                for n, length in enumerate(lengths)
            }
            append_shard(folder, index, pairs)
        return TokenShards(folder)

    return write


def _chunk(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _write_font(path: Path) -> Path:
    """A sound font whose three presets are one tone, at its own pitch the A of 440 Hz."""
    tone = (12_000 * np.sin(2 * np.pi * np.arange(44_000) / 100)).astype("<i2").tobytes() + b"\0" * 92
    presets = [(0, 0), (32, 0), (0, 128)]
    headers = [
        struct.pack("<20s3H3I", f"p{number}".encode(), *place, number, 0, 0, 0)
        for number, place in enumerate(presets)
    ]
    end = struct.pack("<20s3H3I", b"EOP", 0, 0, len(presets), 0, 0, 0)
    bags = b"".join(struct.pack("<2H", number, 0) for number in range(len(presets) + 1))
    generators = struct.pack("<2H", 41, 0) * len(presets) + bytes(4)
    sample = struct.pack("<20s5IBb2H", b"tone", 0, 44_000, 1_000, 43_000, 44_000, 69, 0, 0, 1)
    tables = (
        _chunk(b"phdr", *headers, end), _chunk(b"pbag", bags), _chunk(b"pmod", bytes(10)),
        _chunk(b"pgen", generators), _chunk(b"inst", struct.pack("<20sH20sH", b"i", 0, b"EOI", 1)),
        _chunk(b"ibag", struct.pack("<4H", 0, 0, 2, 0)), _chunk(b"imod", bytes(10)),
        _chunk(b"igen", struct.pack("<4H", 54, 1, 53, 0), bytes(4)),
        _chunk(b"shdr", sample, bytes(46)),
    )  # fmt: skip
    told = _chunk(b"LIST", b"INFO", _chunk(b"ifil", struct.pack("<2H", 2, 1)), _chunk(b"INAM", b"tone\0\0"))
    data = _chunk(b"LIST", b"sdta", _chunk(b"smpl", tone))
    path.write_bytes(_chunk(b"RIFF", b"sfbk", told, data, _chunk(b"LIST", b"pdta", *tables)))
    return path


@pytest.fixture(scope="session")
def font(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a sound font that has little in it."""
    return _write_font(tmp_path_factory.mktemp("font") / "tone.sf2")
