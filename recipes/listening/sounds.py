"""Sounds for a listening test from a corpus: originals of test songs, and what a bundle makes of them."""

from tqdm import tqdm

from duotok.recipes.evaluation.excerpts import choose_excerpts, read_test_items
from duotok.recipes.evaluation.quality_sounds import SoundMaker
from duotok.recipes.evaluation.settings import Settings
from duotok.tokenizer.common.audio import write_audio
from duotok.tokenizer.common.errors import DataError

SYSTEMS = ("original", "vae", "round_trip", "generated")
_ITEMS, _SECONDS = 6, 8.0


def write_corpus_sounds(settings: Settings, track: str) -> list[str]:
    """Write settings.folder/SYSTEM/ITEM.wav of each excerpt and each of SYSTEMS there is; return the systems.

    Nothing is generated but accompaniments. Raises DataError for a bundle without a decoder of the track.
    """
    folder = settings.folder
    if folder is None:
        raise DataError("sounds of a corpus need a folder to be written to")
    excerpts = choose_excerpts(
        read_test_items(settings.corpus),
        count=settings.items or _ITEMS,
        seconds=settings.seconds or _SECONDS,
        seed=settings.seed,
    )
    maker = SoundMaker(settings.bundle, settings.seed)
    if track not in maker.rendered_tracks:
        raise DataError(
            f"{settings.bundle} has no decoder of the {track}; it has one of the "
            f"{' and '.join(maker.rendered_tracks)}"
        )
    systems: list[str] = []
    for excerpt in tqdm(excerpts, desc="sounds", disable=None):
        made = maker.make(excerpt, excerpt, track)
        systems = [system for system in SYSTEMS if system in made]
        for system in systems:
            wave = made[system]
            try:
                (folder / system).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"cannot write {folder / system}: {error.strerror or error}") from error
            # Codes do not know a recording's level: what comes out may exceed full scale.
            write_audio(folder / system / f"{excerpt.item.id}.wav", wave / max(1.0, float(wave.abs().max())))
    return systems
