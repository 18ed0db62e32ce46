"""AccompGen's protocol (arXiv 2604.09054), for a bundle of any system: guidance, bits, Frechet on MUSDB18.

On the corpus: sets generated under guidance 1, 2 and 3, their coherence and distances, seconds of computing
per second, and, of AccompGen's stages, bits per second of music. On MUSDB18, where its folder is given: the
Frechet audio distance of accompaniments made for isolated vocals and for vocals that were separated from the
mix, and how far the second falls behind. Distances are by this project's listening features, and by VGGish
too where torchvggish is installed.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm.hierarchical.model import STAGES, HierarchicalLM
from duotok.recipes.accompany.bundle import default_bundle
from duotok.recipes.accompany.mix import match_level
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.accompany.request import OWN_SEPARATOR
from duotok.recipes.evaluation.distances import MusicFeatures, compare_sets, frechet_distance
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of, read_items
from duotok.recipes.evaluation.generate_part import compare_pairs, listen_to_singer
from duotok.recipes.evaluation.heard_coherence import listen_to
from duotok.recipes.lm.accompgen.train_stage import measure_stage
from duotok.recipes.separation.adapters import open_separator
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, audio_seconds, read_audio
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.layered import LayeredTokenizer

GUIDANCES = (1.0, 2.0, 3.0)  # lambda; the paper's is 3
MUSDB_STEMS = ("vocals", "drums", "bass", "other")
_MUSDB_SECONDS, _MUSDB_EXCERPTS = 10.0, 3  # of a track
_PATCH_SECONDS = 3  # of the listening features
_VGGISH_RATE_HZ = 16_000

Features = Callable[[Tensor], np.ndarray]  # wave [channels, samples] at 48 kHz -> [patches, features]


def measure_accompgen(settings: Settings) -> dict[str, float]:
    """Figures of the corpus' excerpts and, with settings.musdb, of MUSDB18's."""
    accompanist = Accompanist.from_pretrained(settings.bundle)
    figures = measure_guidances(accompanist, settings)
    excerpts = excerpts_of(settings, 12, 10.0)
    if isinstance(accompanist.bundle.lm, HierarchicalLM):
        figures |= measure_bits(accompanist, excerpts)
    if settings.musdb is not None:
        tracks = read_musdb(settings.musdb)[: settings.items]
        figures |= measure_musdb(accompanist, tracks, settings.seconds or _MUSDB_SECONDS, settings.seed)
    return figures


def measure_guidances(accompanist: Accompanist, settings: Settings) -> dict[str, float]:
    """Coherence, distances from the corpus' bands, and speed of sets under each guidance."""
    music = MusicFeatures.from_pretrained()
    excerpts = excerpts_of(settings, 12, 10.0)
    bands = np.concatenate(
        [music.of_wave(item.read("accompaniment")).double().numpy() for item in read_items(settings)]
    )
    true = [music.of_wave(each.read("accompaniment")).double().numpy() for each in excerpts]
    singings, songs = [listen_to_singer(each) for each in excerpts], [each.item.song for each in excerpts]
    figures: dict[str, float] = {"excerpts": len(excerpts), "excerpt_seconds": excerpts[0].seconds}
    for guidance in GUIDANCES:
        found, backings, seconds = [], [], 0.0
        for number, excerpt in enumerate(tqdm(excerpts, desc=f"guidance {guidance:g}", disable=None)):
            began = time.perf_counter()
            made = accompanist.accompany(
                excerpt.read("vocal"), seed=settings.seed + number, guidance=guidance, candidates=1
            )
            seconds += time.perf_counter() - began
            wave = match_level(made.accompaniment, excerpt.read("accompaniment"))
            found.append(music.of_wave(wave).double().numpy())
            backings.append(listen_to(wave))
        ending = f"_guidance_{guidance:g}"
        told = compare_sets(bands, true, found, seed=settings.seed)
        figures |= {f"{name}{ending}": value for name, value in told.items()}
        figures |= compare_pairs(singings, backings, songs, ending)
        if settings.speed:
            figures[f"seconds_per_second{ending}"] = seconds / sum(each.seconds for each in excerpts)
    return figures


def measure_bits(accompanist: Accompanist, excerpts: Sequence[Excerpt]) -> dict[str, float]:
    """Bits per second of true accompaniments: heard, alone and with another vocal; by stage, per token too.

    Each stage hears the true codes before it. mismatch_cost_percent: what another song's vocal adds to the
    bits of the semantic stage.
    """
    lm, tokens = accompanist.bundle.lm, accompanist.bundle.tokens
    assert isinstance(lm, HierarchicalLM) and isinstance(tokens, LayeredTokenizer)
    figures: dict[str, float] = {}
    totals: dict[str, float] = defaultdict(float)
    streams: list[list[Tensor]] = []
    for excerpt in tqdm(excerpts, desc="bits", disable=None):
        vocal, band = (excerpt.read(part)[None].to(accompanist.device) for part in ("vocal", "accompaniment"))
        coarse = lm.stage_of("coarse").config.target.levels
        codec = tokens.codec.encode(band)[0]
        semantic = [tokens.semantic.encode(wave) for wave in (vocal, band)]
        streams.append([*semantic, codec[:coarse], codec[coarse:]])
    for place, name in enumerate(STAGES):
        stage = lm.stage_of(name)
        seconds = min(excerpts[0].seconds, stage.config.window_seconds)
        source, target = (
            torch.stack([codes[place + k][:, : stream.frames(seconds)] for codes in streams]).cpu()
            for k, stream in enumerate((stage.config.source, stage.config.target))
        )
        for key, bits in measure_stage(stage, source, target).items():
            kind = key.rpartition("/")[2]
            figures[f"{name}_bits_per_token_{kind}"] = bits
            totals[kind] += bits * stage.config.target.tokens_hz
    figures |= {f"bits_per_second_{kind}": value for kind, value in totals.items()}
    heard, other = (figures[f"semantic_bits_per_token_{kind}"] for kind in ("heard", "mismatched"))
    return figures | {"mismatch_cost_percent": 100 * (other / heard - 1)}


@dataclass(frozen=True, kw_only=True)
class MusdbTrack:
    """A song of MUSDB18-HQ."""

    folder: Path

    def read(self, stem: str, start_seconds: float, seconds: float) -> Tensor:
        """Wave [2, samples] at 48 kHz of a stem, silence after its end."""
        wave = read_audio(
            self.folder / f"{stem}.wav", channels=2, start_seconds=start_seconds, seconds=seconds
        )
        return torch.nn.functional.pad(wave, (0, round(seconds * SAMPLE_RATE_HZ) - wave.shape[-1]))

    def find_singing(self, seconds: float, count: int) -> list[float]:
        """Where the `count` stretches begin in which most is sung, whole multiples of their length."""
        places = max(1, int(audio_seconds(self.folder / "vocals.wav") // seconds))
        levels = [float(self.read("vocals", k * seconds, seconds).square().mean()) for k in range(places)]
        return [seconds * k for k in sorted(np.argsort(levels)[::-1][:count].tolist())]


def read_musdb(folder: Path) -> list[MusdbTrack]:
    """The test tracks of a folder of MUSDB18-HQ; DataError where it holds none, or a stem is missing."""
    root = folder / "test" if (folder / "test").is_dir() else folder
    found = sorted({path.parent for path in root.glob("*/*.wav")})
    if not found:
        raise DataError(
            f"{root} holds no tracks of MUSDB18-HQ; give the folder with test/TRACK/vocals.wav and so on"
        )
    for track in found:
        missing = [stem for stem in MUSDB_STEMS if not (track / f"{stem}.wav").is_file()]
        if missing:
            raise DataError(f"{track} has no {missing[0]}.wav; give MUSDB18-HQ with all of its stems")
    return [MusdbTrack(folder=track) for track in found]


def measure_musdb(
    accompanist: Accompanist, tracks: Sequence[MusdbTrack], seconds: float, seed: int
) -> dict[str, float]:
    """Frechet audio distance between the true accompaniments and those made for two kinds of vocal.

    "…_isolated": the track's own vocal; "…_separated": taken out of the mix by the shipped mask head;
    "…_gap": how much larger the second is. The paper's, with VGGish: 2.02 (a later version: 2.08), gap 0.335.
    """
    separator = open_separator(OWN_SEPARATOR, str(default_bundle()), str(accompanist.device))
    hearers = find_hearers()
    heard: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in hearers}
    places = [(track, start) for track in tracks for start in track.find_singing(seconds, _MUSDB_EXCERPTS)]
    if len(places) * max(1, seconds // _PATCH_SECONDS) < 2:
        raise DataError("a Frechet distance needs two patches of 3 s at least; give more tracks or seconds")
    for number, (track, start) in enumerate(tqdm(places, desc="MUSDB18", disable=None)):
        stems = {stem: track.read(stem, start, seconds) for stem in MUSDB_STEMS}
        band = stems["drums"] + stems["bass"] + stems["other"]
        vocals = {"isolated": stems["vocals"]}
        vocals["separated"] = separator.separate(stems["vocals"] + band)["vocal"]
        sounds = {"true": band}
        for kind, vocal in vocals.items():
            made = accompanist.accompany(vocal, seed=seed + number, candidates=1).accompaniment
            sounds[kind] = match_level(made, band)
        for name, hear in hearers.items():
            for kind, wave in sounds.items():
                heard[name].setdefault(kind, []).append(hear(wave))
    figures: dict[str, float] = {"musdb_excerpts": len(places)}
    for name, sets in heard.items():
        figures |= {f"musdb_{name}_{kind}": value for kind, value in compare_kinds(sets).items()}
    return figures


def compare_kinds(sets: Mapping[str, Sequence[np.ndarray]]) -> dict[str, float]:
    """FAD of "isolated" and "separated" from "true", and the gap; sets: [patches, features] of each sound."""
    joined = {kind: np.concatenate(list(found)) for kind, found in sets.items()}
    found = {kind: frechet_distance(joined["true"], joined[kind]) for kind in ("isolated", "separated")}
    return {f"fad_{kind}": value for kind, value in found.items()} | {
        "fad_gap": found["separated"] - found["isolated"]
    }


def find_hearers() -> dict[str, Features]:
    """What sounds are compared by: "listening" always, "vggish" where torchvggish is installed."""
    music = MusicFeatures.from_pretrained()
    hearers: dict[str, Features] = {"listening": lambda wave: music.of_wave(wave).double().numpy()}
    if find_spec("torchvggish") is None:
        print("VGGish is left out: pip install torchvggish brings it")
        return hearers
    from torchvggish import vggish, vggish_input  # pyright: ignore[reportMissingImports]

    model = vggish(postprocess=False).eval()

    def hear(wave: Tensor) -> np.ndarray:
        mono = soxr.resample(wave.mean(dim=0).numpy(), SAMPLE_RATE_HZ, _VGGISH_RATE_HZ)
        with torch.no_grad():
            return model(vggish_input.waveform_to_examples(mono, _VGGISH_RATE_HZ)).double().numpy()

    return hearers | {"vggish": hear}
