"""A corpus of noise and a vocabulary of nothing: enough to run a recipe where only its size matters."""

from pathlib import Path

import numpy as np
import torch

from duotok.recipes.corpus.manifest import Item, write_manifest
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, write_audio
from duotok.tokenizer.heads import STEMS

NOTE_SECONDS = 0.5
SYLLABLE = "la"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_noise_corpus(root: Path, *, seconds: float, items: int = 1) -> Path:
    """Write items of noise, sung on throughout as far as the labels say; return the manifest."""
    rng = np.random.default_rng(0)
    samples = round(seconds * SAMPLE_RATE_HZ)
    written = []
    for number in range(items):
        folder = root / "audio" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        waves = {stem: torch.from_numpy(rng.normal(scale=0.05, size=(1, samples))).float() for stem in STEMS}
        for name, wave in (*waves.items(), ("mix", torch.stack(list(waves.values())).sum(dim=0))):
            write_audio(folder / f"{name}.wav", wave)
        starts = np.arange(0.0, seconds, NOTE_SECONDS)
        ends = np.minimum(starts + NOTE_SECONDS, seconds)
        written.append(
            Item(
                id=f"noise-{number}",
                split="train",
                source="noise",
                song=f"noise-{number}",
                seconds=seconds,
                sample_rate_hz=SAMPLE_RATE_HZ,
                stems={stem: f"audio/{number}/{stem}.wav" for stem in STEMS},
                mix=f"audio/{number}/mix.wav",
                tempo_bpm=120.0,
                beats_seconds=[float(beat) for beat in starts],
                downbeats_seconds=[float(beat) for beat in starts[::4]],
                chords=[(0.0, seconds, "N")],
                key="C:maj",
                notes=[(float(a), float(b), 60, SYLLABLE) for a, b in zip(starts, ends, strict=True)],
                voice="noise",
                style="noise",
                root=root,
            )
        )
    manifest = root / "train.jsonl"
    write_manifest(manifest, written)
    return manifest


def write_vocabulary(folder: Path, tokens: int) -> Path:
    """Write a Hugging Face text tokenizer of so many tokens that knows the noise's syllable."""
    from transformers import BertTokenizer

    words = [*SPECIAL_TOKENS, SYLLABLE]
    words += [f"{SYLLABLE}{number}" for number in range(tokens - len(words))]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(str(folder))
    return folder
