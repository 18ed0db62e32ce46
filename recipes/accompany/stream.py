"""The mix as a WAV that begins while the rest is still composed, to be heard meanwhile.

What has been composed is rendered stretch by stretch: of the candidate that fits best as far as the first
stretch goes, at the level found there. The result's files are made as always, of all that was composed.
"""

import math
import os
import queue
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duotok.lm.contract import Candidates
from duotok.lm.sheet.plan import SongPlan
from duotok.recipes.accompany.arrangement import Arrangement
from duotok.recipes.accompany.bundle import Bundle
from duotok.recipes.accompany.mix import PEAK_LIMIT, fall, find_fade, join_prefix
from duotok.recipes.accompany.output import OutputError
from duotok.recipes.accompany.rank import Composition, rank
from duotok.recipes.accompany.request import GenerationSettings, Request
from duotok.recipes.accompany.wishes import find_beats, keep_rests
from duotok.renderer.renderer import LATENT_RATE_HZ, Renderer
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.long_waves import peak
from duotok.tokenizer.common.loudness import measure_loudness
from duotok.tokenizer.music.tuning import PitchClock

STANDARD_OUTPUT = "-"
HEADER_BYTES = 44
_STRETCH_FRAMES = 75, 250  # the first, which is waited for, and the longest; else as long as all before
_AHEAD_FRAMES = 12  # composed behind a stretch, which its features look at
_FEATURE_FRAMES = 250  # before it, as far as features may depend on others
_CONTEXT_FRAMES = 75  # before it, whose latents the renderer goes on from
_HELD_FRAMES = 24  # before it, whose sound's phases are held
_UNSETTLED_FRAMES = 3  # of sound that the next stretch makes again, knowing what follows
_MARGIN_SAMPLES = 3_840  # of sound that cross-fades and the clock of the tuning may still touch
_RAMP_SAMPLES = 2_400  # in which the level goes down where the sum would exceed full scale
_PER_FRAME = round(LATENT_RATE_HZ / 25)  # latents
_LARGEST_BYTES = 2**32 - 1 - 36  # that a WAV can say it has


def wav_header(samples: int) -> bytes:
    """The HEADER_BYTES before so many 16-bit stereo samples."""
    size, rate = min(4 * samples, _LARGEST_BYTES), SAMPLE_RATE_HZ
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 2, rate, 4 * rate, 4, 16)
    return struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE") + form + struct.pack("<4sI", b"data", size)


class WavStream:
    """A context of a 16-bit stereo WAV that grows in a file, a pipe or standard output (`-`).

    Written by a thread of its own, as a player at the other end takes its time. What cannot be written any
    more, because the listener left or the disk is full, is left out: `failure` says so.
    """

    def __init__(self, target: str, is_heard: Callable[[], bool] = lambda: True) -> None:
        """is_heard: whether anybody listens by now; before, nothing is rendered for it."""
        self._target, self.is_heard = target, is_heard
        self._pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.failure: str | None = None
        self.seconds = 0.0  # written so far
        self.seed: int | None = None  # of the candidate that is heard
        try:
            if target == STANDARD_OUTPUT:
                self._file = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
            else:
                if Path(target).is_file():
                    raise OutputError(f"{target} is there already; give another name for the stream")
                self._file = open(target, "wb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise OutputError(f"cannot stream to {target}: {error.strerror or error}") from error
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def begin(self, samples: int) -> None:
        """Say how long it will be."""
        self._pieces.put(wav_header(samples))

    def add(self, wave: Tensor) -> None:
        """Go on with wave [2, samples] between -1 and 1."""
        self._pieces.put((32_767 * wave.T).round().short().numpy().astype("<i2").tobytes())

    def _write(self) -> None:
        while (piece := self._pieces.get()) is not None:
            if self.failure is not None:
                continue
            try:
                rest = memoryview(piece)
                while rest:
                    rest = rest[self._file.write(rest) :]
                self.seconds += len(piece) / (4 * SAMPLE_RATE_HZ)
            except OSError as error:
                self.failure = error.strerror or str(error)

    def tell(self, seed: int) -> list[str]:
        """What to say of it beside a result of this seed."""
        told = [f"the stream ended after {self.seconds:.1f} s: {self.failure}"] if self.failure else []
        if self.seed not in (None, seed):
            told.append(
                f"the stream played seed {self.seed}, which fitted best at its beginning; "
                f"the result is seed {seed}, which fits best as a whole"
            )
        return told

    def __enter__(self) -> "WavStream":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Wait until all is written; after an error, leave no file, and do not wait for a player."""
        is_file = Path(self._target).is_file()
        if kind is not None:
            self.failure = "nothing more is made"
        self._pieces.put(None)
        if kind is None or is_file:
            self._writer.join()
            self._file.close()
        if kind is not None and is_file:
            Path(self._target).unlink()


def find_level(
    request: Request, settings: GenerationSettings, arrangement: Arrangement | None
) -> tuple[float | None, float]:
    """The band's loudness over the vocal's in dB, None: as it is; and the seconds it fades at its end."""
    prefix, level_db = request.prefix, settings.accompaniment_db
    is_given = request.accompaniment_db is None and isinstance(prefix, Tensor) and peak(prefix) > 0
    # A given start says how loud the band is.
    return None if is_given else level_db, 0.5 * arrangement.ending_seconds if arrangement else 0.0


@dataclass(kw_only=True)
class StretchRenderer:
    """Renders the codes of one of several candidates as they grow; `follow` of `LanguageModel.compose`."""

    stream: WavStream
    bundle: Bundle
    device: torch.device
    request: Request
    settings: GenerationSettings
    seeds: Sequence[int]
    styles: Sequence[str | None]  # of the candidates
    judge: Callable[[Sequence[int], Candidates, np.ndarray], list[Composition]]  # by seeds, codes and beats
    vocal: Tensor  # [2, samples] as it was given
    clock: PitchClock | None  # on which it is at pitch
    frames: int  # of codes, in the end
    plan: SongPlan | None
    arrangement: Arrangement | None
    prefix_frames: int

    def __post_init__(self) -> None:
        renderer = self.bundle.sound
        if not isinstance(renderer, Renderer):
            raise ConfigError("this model composes all of a song before it sounds; leave out --stream")
        self._renderer, self._hop = renderer, self.bundle.tokens.hop_samples
        self._level_db, self._fade_seconds = find_level(self.request, self.settings, self.arrangement)
        self._chosen = 0
        self._chart: Tensor | None = None  # of the one that is chosen
        self._rendered = self._settled = 0  # frames whose latents, and whose sound, are there
        self._latents: Tensor | None = None  # of the last of them, and the frame these begin at
        self._latents_frame = self._wave_frame = 0
        self._wave = torch.zeros(2, 0)  # their sound at pitch
        self._sent = 0  # samples of the song that were given to the stream
        self._gain: float | None = None  # of the band; None while it is silent
        self._joined_gain, self._mix_gain = 1.0, 1.0
        self._tail = torch.zeros(2, 0)  # of the mix, kept back for a ramp of its gain
        # Of the whole vocal, on another core than the first codes are composed on.
        self._vocal_lufs = (pool := ThreadPoolExecutor(1)).submit(measure_loudness, self.vocal)
        pool.shutdown(wait=False)
        self.stream.begin(self.vocal.shape[-1])

    def __call__(self, codes: Tensor) -> None:
        """Render what is new of codes [candidates, frames], if it is enough for a stretch."""
        known = self.frames if codes.shape[-1] == self.frames else codes.shape[-1] - _AHEAD_FRAMES
        first, longest = _STRETCH_FRAMES
        while self.stream.failure is None and self.stream.is_heard() and self._rendered < self.frames:
            wanted = min(self._rendered, longest) if self._rendered else first + self.prefix_frames
            if known < self.frames and known - self._rendered < wanted:
                return
            if not self._rendered:
                self._chosen = self._choose(codes)
                self.stream.seed = self.seeds[self._chosen]
                if self.arrangement is not None:
                    sheet = self.arrangement.tell(self.styles[self._chosen], self.stream.seed)
                    self._chart = self.bundle.chart(sheet)
            # More than a stretch where nobody has listened before.
            stop = min(known, self._rendered + wanted + longest)
            is_last = stop == self.frames
            self._paint(codes[self._chosen], stop)
            self._sound(stop, is_last)
            self._send(stop, is_last)

    def _choose(self, codes: Tensor) -> int:
        """The candidate that fits best so far."""
        beats = find_beats(self.plan)
        beats = beats[beats < codes.shape[-1] / self.bundle.tokens.frame_rate_hz]
        heard = Candidates(codes=codes, likelihood_nats=None, likelihood_alone_nats=None)
        return rank([each.fit for each in self.judge(self.seeds, heard, beats)])[0]

    def _paint(self, codes: Tensor, stop: int) -> None:
        """Latents up to frame `stop`, which go on from those before."""
        start = max(0, self._rendered - _CONTEXT_FRAMES)
        far = max(0, start - _FEATURE_FRAMES)
        features = self.bundle.tokens.features(codes[None, far:].to(self.device), "accompaniment")[0]
        before = self._latents
        self._latents = self._renderer.render_latents(
            features[start - far : stop - far],
            steps=self.settings.steps,
            guidance=self.settings.render_guidance,
            seed=self.seeds[self._chosen] + start,
            chart=None if self._chart is None else self._chart[start:stop],
            before=None if before is None else before[:, _PER_FRAME * (start - self._latents_frame) :],
        )
        self._latents_frame, self._rendered = start, stop

    def _sound(self, stop: int, is_last: bool) -> None:
        """Sound at pitch up to frame `stop`, which goes on from that before."""
        assert self._latents is not None
        start = max(0, self._settled - _HELD_FRAMES)
        held = self._wave[
            :, (start - self._wave_frame) * self._hop : (self._settled - self._wave_frame) * self._hop
        ]
        latents = self._latents[:, _PER_FRAME * (start - self._latents_frame) :]
        wave = self._renderer.decode_between(latents, held, torch.zeros(2, 0)).cpu().float()
        if not math.isfinite(peak(wave)):
            raise ConfigError("the model made no usable sound; choose milder settings or another --device")
        self._wave, self._wave_frame = wave, start
        self._settled = stop if is_last else stop - _UNSETTLED_FRAMES

    def _send(self, stop: int, is_last: bool) -> None:
        """Give on what is settled, in the singer's tuning, levelled and with the singer."""
        rate_hz, samples = self.bundle.tokens.frame_rate_hz, self.vocal.shape[-1]
        sheet = None if self.plan is None else self.plan.sheet[self._wave_frame : stop]
        wave, begin, sent = keep_rests(self._wave, sheet, rate_hz), self._wave_frame * self._hop, self._sent
        end = self._settled * self._hop - _MARGIN_SAMPLES
        if self.clock is not None:
            end = math.floor(float(self.clock.to_song(end / SAMPLE_RATE_HZ)) * SAMPLE_RATE_HZ)
        end = samples if is_last else min(end, samples)
        if self.clock is None:
            band = wave[:, sent - begin : end - begin] * self._joined_gain
        else:
            times = sent / SAMPLE_RATE_HZ, begin / SAMPLE_RATE_HZ
            band = self.clock.bring_back(wave, end - sent, *times) * self._joined_gain
        if sent == 0 and isinstance(self.request.prefix, Tensor):
            self._joined_gain = join_prefix(self.request.prefix, band)
        if self._gain is None:
            self._gain = self._find_gain(band)
        band *= self._gain or 1.0
        tail = round(find_fade(self._fade_seconds) * SAMPLE_RATE_HZ)
        if (late := max(sent, samples - tail)) < end:
            band[:, late - sent :] *= fall(tail)[late - (samples - tail) :][: end - late]
        self._sent = end
        self._give(self.vocal[:, sent:end] + band, is_last)

    def _find_gain(self, band: Tensor) -> float | None:
        """What brings a stretch of the band to its level over the whole vocal's; None of silence."""
        if self._level_db is None:
            return 1.0
        change_db = self._vocal_lufs.result() + self._level_db - measure_loudness(band)
        return 10 ** (change_db / 20) if math.isfinite(change_db) else None

    def _give(self, mix: Tensor, is_last: bool) -> None:
        """Write, turned down from now on where the sum would exceed full scale."""
        before, self._mix_gain = self._mix_gain, min(self._mix_gain, PEAK_LIMIT / max(peak(mix), 1e-9))
        ramp = torch.linspace(before, self._mix_gain, self._tail.shape[-1])
        kept = 0 if is_last else min(_RAMP_SAMPLES, mix.shape[-1])
        whole = mix.shape[-1] - kept
        self.stream.add(torch.cat([ramp * self._tail, self._mix_gain * mix[:, :whole]], dim=1))
        self._tail = mix[:, whole:]
