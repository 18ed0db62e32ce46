"""Draw an item: mel spectrograms of its stems with notes, chords and beats over them.

Run: python -m duotok.recipes.corpus.picture --manifest DIR/train.jsonl --id train-00000 --out picture.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.tokenizer.common.errors import DataError, DuoTokError
from duotok.tokenizer.heads import STEMS

MEL_BANDS, FFT_SIZE, HOP_SAMPLES = 128, 2_048, 480
LOWEST_DB = -80.0


def hz_to_mel(frequency: np.ndarray | float) -> np.ndarray:
    """Mel by the HTK formula."""
    return 2595 * np.log10(1 + np.asarray(frequency) / 700)


def mel_spectrogram(wave: np.ndarray, rate_hz: int) -> np.ndarray:
    """Decibels [MEL_BANDS, frames] of a mono wave, 0 = a full-scale sine in its band."""
    window = np.hanning(FFT_SIZE).astype(np.float32)
    padded = np.pad(wave, FFT_SIZE // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT_SIZE)[::HOP_SAMPLES]
    power = np.square(np.abs(np.fft.rfft(frames * window, axis=1)) / (window.sum() / 2))
    edges = 700 * (10 ** (np.linspace(0, hz_to_mel(rate_hz / 2), MEL_BANDS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(FFT_SIZE, 1 / rate_hz)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters = np.clip(np.minimum(rising, falling), 0, None)
    nearest = np.abs(bins[:, None] - edges[1:-1]).argmin(axis=0)
    empty = filters.sum(axis=0) == 0  # bands narrower than a bin take the nearest bin
    filters[nearest[empty], np.flatnonzero(empty)] = 1.0
    return np.maximum(10 * np.log10(power @ filters + 1e-12), LOWEST_DB).T


def draw_item(item: Item, out: Path, *, start_seconds: float = 0.0, seconds: float | None = None) -> None:
    """Write the picture of an item (or of a part of it) as a PNG file."""
    from matplotlib.figure import Figure

    seconds = min(seconds or item.seconds, item.seconds - start_seconds)
    if seconds <= 0:
        raise DataError(f"item {item.id} lasts {item.seconds:.1f} s; --start must be before that")
    figure = Figure(figsize=(max(10, seconds / 2), 14), layout="constrained")
    axes = figure.subplots(len(STEMS), 1, sharex=True)
    for axis, stem in zip(axes, STEMS, strict=True):
        wave = item.read(stem, start_seconds=start_seconds, seconds=seconds, channels=1)[0].numpy()
        levels = mel_spectrogram(wave, item.sample_rate_hz)
        axis.imshow(
            levels,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=LOWEST_DB,
            vmax=-15,
            extent=(start_seconds, start_seconds + seconds, 0, hz_to_mel(item.sample_rate_hz / 2)),
        )
        ticks = np.array([100, 250, 500, 1_000, 2_000, 4_000, 8_000, 16_000])
        axis.set_yticks(hz_to_mel(ticks), [str(tick) for tick in ticks])
        rms_db = 20 * np.log10(np.sqrt(np.mean(np.square(wave))) + 1e-9)
        axis.set_ylabel(f"{stem} ({rms_db:.0f} dB)\nHz")
        for beat in item.beats_seconds:
            strong = beat in item.downbeats_seconds
            axis.axvline(beat, color="white", alpha=0.7 if strong else 0.25, linewidth=0.9 if strong else 0.5)
    for start, end, pitch, syllable in item.notes:
        height = hz_to_mel(440 * 2 ** ((pitch - 69) / 12))
        axes[0].plot([start, end], [height, height], color="cyan", linewidth=2)
        axes[0].text(start, float(height) + 60, syllable, color="cyan", fontsize=7, clip_on=True)
    for start, _, label in item.chords:
        axes[-1].text(start, hz_to_mel(12_000), label, color="cyan", fontsize=8, clip_on=True)
    axes[0].set_xlim(start_seconds, start_seconds + seconds)
    axes[0].set_title(
        f"{item.id}: song {item.song}, voice {item.voice}, style {item.style}, "
        f"key {item.key or 'unknown'}, tempo {f'{item.tempo_bpm:.0f}' if item.tempo_bpm else 'unknown'}"
    )
    axes[-1].set_xlabel("seconds")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.corpus.picture", description="Draw an item."
    )
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--id", required=True)
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    parser.add_argument("--start", type=float, default=0.0, help="seconds")
    parser.add_argument("--seconds", type=float, help="length of the part to draw (default: all)")
    arguments = parser.parse_args(argv)
    try:
        items = {item.id: item for item in read_manifest(arguments.manifest)}
        if arguments.id not in items:
            raise DataError(
                f"{arguments.manifest} has no item {arguments.id}; its first is {next(iter(items), '-')}"
            )
        draw_item(
            items[arguments.id], arguments.out, start_seconds=arguments.start, seconds=arguments.seconds
        )
    except DuoTokError as error:
        print(f"picture: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
