"""The probe's anchor with sound: statistics of the log-mel spectrogram that the codes were made from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.evaluation.diagnosis import Recording
from duotok.recipes.research.probe_data import ProbeSet, clip_starts
from duotok.recipes.research.probe_training import ClipFeatures
from duotok.tokenizer.common.errors import DataError, DuoTokError
from duotok.tokenizer.common.files import write_tensors
from duotok.tokenizer.model import HOP_SAMPLES, MEL_PER_FRAME, TRACKS
from duotok.tokenizer.spectra import LogMel, level_gain

MEL_BANDS = 128
_PER_FILE = 32

Statistics = dict[str, dict[str, Tensor]]  # id -> track -> [clips, 2 * MEL_BANDS]


def measure_mel(recordings: Sequence[Recording], folder: Path, clip_frames: int) -> Statistics:
    """Mean and deviation over time of each clip's log-mel, by recording and track, kept in a folder.

    Goes on where an earlier run with clips of the same length stopped; what cannot be read is left out.
    """
    found = _read_kept(folder, clip_frames)
    new = [recording for recording in recordings if recording.id not in found]
    log_mel = LogMel(MEL_BANDS)
    fresh: Statistics = {}
    for recording in tqdm(new, desc=f"mel of {folder.name}", disable=None):
        try:
            waves = recording.read()
        except DuoTokError:
            continue  # listed when its codes were made
        fresh[recording.id] = {track: _pool(waves[track], log_mel, clip_frames) for track in TRACKS}
        if len(fresh) >= _PER_FILE:
            _keep(folder, fresh, clip_frames)
            found, fresh = found | fresh, {}
    if fresh:
        _keep(folder, fresh, clip_frames)
    return found | fresh


def pool_mel(
    recordings: ProbeSet, statistics: Mapping[str, Mapping[str, Tensor]], tracks: Sequence[str]
) -> ClipFeatures:
    """Features of the recordings' clips, tracks side by side."""
    missing = [name for name in recordings.ids if name not in statistics]
    if missing:
        raise DataError(f"the sound of {missing[0]} cannot be read for the mel anchor; give --no-mel")
    rows = [
        torch.cat([statistics[name][track] for track in tracks], dim=1).numpy() for name in recordings.ids
    ]
    owners = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    return ClipFeatures(rows=np.concatenate(rows), owners=owners)


def _pool(wave: Tensor, log_mel: LogMel, clip_frames: int) -> Tensor:
    wave = torch.nn.functional.pad(wave, (0, -wave.shape[-1] % HOP_SAMPLES))
    mel = log_mel(wave * level_gain(wave))[0]  # [MEL_PER_FRAME * frames, MEL_BANDS]
    length = MEL_PER_FRAME * clip_frames
    clips = [
        mel[MEL_PER_FRAME * start :][:length] for start in clip_starts(len(mel) // MEL_PER_FRAME, clip_frames)
    ]
    return torch.stack([torch.cat([clip.mean(dim=0), clip.std(dim=0)]) for clip in clips])


def _read_kept(folder: Path, clip_frames: int) -> Statistics:
    found: Statistics = {}
    for path in sorted(folder.glob(f"mel-{clip_frames}-*.safetensors")):
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is damaged; delete it and run again") from error
        for name, rows in tensors.items():
            track, _, recording = name.partition(":")
            found.setdefault(recording, {})[track] = rows
    return found


def _keep(folder: Path, statistics: Statistics, clip_frames: int) -> None:
    number = len(list(folder.glob(f"mel-{clip_frames}-*.safetensors")))
    tensors = {
        f"{track}:{name}": rows for name, tracks in statistics.items() for track, rows in tracks.items()
    }
    write_tensors(folder / f"mel-{clip_frames}-{number:05d}.safetensors", tensors)
