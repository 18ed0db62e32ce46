"""What a result remembers, so that a stretch of it can be composed anew: codes.safetensors beside its waves.

The file holds what the band played and from what (codes of both tracks, the lead sheet, the singer's tuning),
and by which gains its sound became accompaniment.wav and mix.wav. `render --codes` plays it as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duotok.lm.sheet.columns import check_sheet
from duotok.recipes.accompany.output import FORMATS, REPORT
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError, DuoTokError
from duotok.tokenizer.common.files import read_json, shown_name, write_tensors
from duotok.tokenizer.common.long_waves import let_go
from duotok.tokenizer.music.tuning import PitchClock

CODES_KIND = "duotok-codes"
CODES = "codes.safetensors"
_NUMBERS = ("band_gain", "own_gain", "mix_gain", "fade_seconds")
_PARTS, _STEP_DB, _LOWEST_DB = 64, 0.5, -80.0  # of a fingerprint
_TOLERANCE_STEPS = 2  # a decoder, 16 bits
_AGAIN = "make it again by generate, or give another by --from"


@dataclass(frozen=True, kw_only=True)
class Take:
    """What a band played in a result, and by which gains it is heard there."""

    codes: Tensor  # [frames] int64
    vocal_codes: Tensor  # [frames] int64
    sheet: Tensor | None  # [frames, COLUMNS] that it was played from
    cents: np.ndarray | None  # [points] of the singer's tuning, see PitchClock; None: at A = 440 Hz
    samples: int  # that the codes stand for, at pitch
    band_gain: float  # accompaniment.wav over what was rendered
    own_gain: float  # accompaniment.wav over the band of the mix, before both were turned down
    mix_gain: float  # of both tracks in the mix
    fade_seconds: float  # of the end
    frame_rate_hz: float
    tokenizer_fingerprint: str

    def clock(self, samples: int) -> PitchClock | None:
        """The clock of a result of so many samples."""
        return None if self.cents is None else PitchClock(self.cents, samples / SAMPLE_RATE_HZ)

    def write(self, path: Path) -> None:
        """Write a codes file."""
        tensors = {"codes": self.codes.to(torch.int32), "vocal_codes": self.vocal_codes.to(torch.int32)}
        if self.sheet is not None:
            tensors["sheet"] = self.sheet.to(torch.int8)
        if self.cents is not None:
            tensors["cents"] = torch.from_numpy(np.asarray(self.cents, dtype=np.float64))
        header = codes_header(self.frame_rate_hz, self.tokenizer_fingerprint)
        header |= {"track": "accompaniment", "samples": str(self.samples)}
        write_tensors(path, tensors, header | {name: repr(getattr(self, name)) for name in _NUMBERS})

    @classmethod
    def read(cls, path: Path) -> "Take":
        """Read the codes file of a result; DataError where it is damaged or of something else."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            codes, vocal_codes = (tensors[name].long() for name in ("codes", "vocal_codes"))
            sheet, cents = tensors.get("sheet"), tensors.get("cents")
            if codes.ndim != 1 or codes.shape != vocal_codes.shape or not len(codes):
                raise DataError(f"codes {tuple(codes.shape)} and {tuple(vocal_codes.shape)}")
            return cls(
                codes=codes,
                vocal_codes=vocal_codes,
                sheet=None if sheet is None else check_sheet(sheet.long(), len(codes)),
                cents=None if cents is None else cents.double().numpy(),
                samples=int(header["samples"]),
                frame_rate_hz=float(header["frame_rate_hz"]),
                tokenizer_fingerprint=header["tokenizer_fingerprint"],
                **{name: float(header[name]) for name in _NUMBERS},
            )
        except (OSError, SafetensorError, KeyError, ValueError, DataError) as error:
            raise DataError(f"{shown_name(path)} is damaged or of something else; {_AGAIN}") from error


def codes_header(frame_rate_hz: float, tokenizer_fingerprint: str | None) -> dict[str, str]:
    """What is written into a codes file beside the codes and must be the same in the model that reads it."""
    return {
        "kind": CODES_KIND,
        "frame_rate_hz": f"{frame_rate_hz:g}",
        "tokenizer_fingerprint": str(tokenizer_fingerprint),
    }


def fingerprint(wave: Tensor) -> str:
    """The levels of 64 parts of a recording [channels, samples], in steps of 0.5 dB below full scale: hex."""
    edges = np.linspace(0, wave.shape[-1], _PARTS + 1).astype(int)
    steps = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        power = float(wave[:, start:end].square().mean())
        let_go(wave)
        level_db = max(10 * np.log10(max(power, 1e-12)), _LOWEST_DB)
        steps.append(round(min(-level_db, -_LOWEST_DB) / _STEP_DB) if level_db < 0 else 0)
    return bytes(steps).hex()


def describe_recording(wave: Tensor) -> dict[str, Any]:
    """The part of report.json by which a recording is known again."""
    return {"samples": wave.shape[-1], "fingerprint": fingerprint(wave)}


@dataclass(frozen=True, kw_only=True)
class Found:
    """A result of `generate`, or one of the accompaniments in it, whose waves have not been read."""

    name: str  # as it is shown
    report: Mapping[str, Any]
    take: Take
    format: str  # one of FORMATS
    files: Mapping[str, Path]  # accompaniment, mix and, of a mix, separated-vocal; codes, report

    def require_wish(self, stretch: tuple[float, float], format: str | None, model: str | None) -> None:
        """Raise unless a stretch in seconds can be made anew.

        format: that is asked for, or None; model: fingerprint of the model that is to do it, or None where it
        is not loaded. ConfigError, of another model CheckpointError.
        """
        start, end = stretch
        made_by = self.report.get("model") or {}
        if model is not None and made_by.get("fingerprint") != model:
            name = made_by.get("name")
            raise CheckpointError(f"{self.name} was made by another model ({name}); give that one by --model")
        if format not in (None, self.format):
            raise ConfigError(f"{self.name} is of the format {self.format}; leave out --format")
        samples, rate_hz = self.report["samples"], self.take.frame_rate_hz
        seconds = samples / SAMPLE_RATE_HZ
        if end > seconds + 0.5 / rate_hz:
            raise ConfigError(
                f"the stretch {start:g}-{end:g} s is outside of {self.name}, of {seconds:.2f} s"
            )
        given = float(self.report.get("prefix_seconds") or 0.0)
        free = given + 3 / rate_hz  # the start itself may end within a frame, and fades
        clock = self.take.clock(samples)
        free = free if clock is None else float(clock.to_song(free))
        if given and start < free:
            raise ConfigError(
                f"the first {given:g} s of {self.name} were given by --prefix; repaint from {free:.2f} s on"
            )

    def read(self) -> "Original":
        """Read the waves; DataError where they do not belong to the rest."""
        kinds = ("accompaniment", "mix", "separated-vocal")
        waves = {kind: read_audio(self.files[kind]) for kind in kinds if kind in self.files}
        frames = -(-self.take.samples * self.take.frame_rate_hz // SAMPLE_RATE_HZ)
        lengths = {wave.shape[-1] for wave in waves.values()}
        if lengths != {self.report["samples"]} or frames != len(self.take.codes):
            raise DataError(f"the files of {self.name} do not belong together; {_AGAIN}")
        return Original(
            **vars(self),
            accompaniment=waves["accompaniment"],
            mix=waves["mix"],
            separated_vocal=waves.get("separated-vocal"),
        )


@dataclass(frozen=True, kw_only=True)
class Original(Found):
    """A result of `generate` of which a stretch is to be composed anew."""

    accompaniment: Tensor  # [2, samples] as it was written
    mix: Tensor  # [2, samples]
    separated_vocal: Tensor | None  # [2, samples], of a mix

    @property
    def samples(self) -> int:
        """Length of both waves."""
        return self.accompaniment.shape[-1]

    @property
    def beats_seconds(self) -> np.ndarray:
        """The beats [beats] that it was played from; none where there was no plan."""
        return np.array(self.report["beats_seconds"] if self.report.get("lead_sheet") else ())

    def require_recording(self, wave: Tensor) -> None:
        """Raise ConfigError unless a wave [channels, samples] is the recording that this was made of."""
        told = self.report["recording"]
        levels = (
            np.frombuffer(bytes.fromhex(text), np.uint8) for text in (told["fingerprint"], fingerprint(wave))
        )
        mine, given = (each.astype(int) for each in levels)
        if told["samples"] != wave.shape[-1] or np.abs(mine - given).max() > _TOLERANCE_STEPS:
            seconds, own = (count / SAMPLE_RATE_HZ for count in (wave.shape[-1], told["samples"]))
            raise ConfigError(
                f"{self.name} was made of another recording, {self.report.get('vocal') or 'a wave'} of "
                f"{own:.3f} s; this one has {seconds:.3f} s: give that one to repaint it"
            )


def find_original(source: str | Path, name: str | None = None) -> Found:
    """Find a folder that `generate` wrote, or one of the accompaniments in it by its file (-2, -3, ...).

    name: as it is shown. Raises DataError, in one line, where it cannot be repainted.
    """
    path = Path(source)
    folder, suffix = (path, "") if path.is_dir() else (path.parent, path.stem.removeprefix("accompaniment"))
    name = name or shown_name(path)
    is_named = path.is_dir() or (path.is_file() and path.stem == f"accompaniment{suffix}")
    try:
        report = read_json(folder / REPORT) if is_named and (folder / REPORT).is_file() else None
    except DuoTokError:
        report = None
    if not isinstance(report, dict) or report.get("made_by") != "duotok generate":
        raise DataError(
            f"{name} is no result of generate (no {REPORT}); give by --from a folder that it wrote"
        )
    if suffix:
        number = suffix.removeprefix("-")
        rows = [row for row in report.get("variations") or () if str(row.get("rank")) == number]
        report = {**report, **rows[0]} if rows else {}
    codes = folder / f"codes{suffix}.safetensors"
    if not codes.is_file() or "recording" not in report or type(report.get("samples")) is not int:
        raise DataError(f"{name} holds no {codes.name}, as an older version left it; {_AGAIN}")
    take = Take.read(codes)
    files = {"codes": codes, REPORT: folder / REPORT}
    endings = dict.fromkeys(row[0] for row in FORMATS.values())
    for kind in ("accompaniment", "mix"):
        paths = [folder / f"{kind}{suffix}{ending}" for ending in endings]
        paths = [path for path in paths if path.is_file() and path.name in report.get("files", ())]
        if not paths:
            raise DataError(f"{name} has lost its {kind}; {_AGAIN}")
        files[kind] = paths[0]
    format = _format_of(files["mix"])
    if format == "mp3":
        raise DataError(f"{name} holds an MP3, which cannot be changed in part; make it again as wav or flac")
    separated = f"separated-vocal{FORMATS[format][0]}"
    if separated in report.get("files", ()):
        files["separated-vocal"] = folder / separated
    return Found(name=name, report=report, take=take, format=format, files=files)


def _format_of(path: Path) -> str:
    subtype = soundfile.info(path).subtype
    found = (name for name, (ending, kind, _) in FORMATS.items() if (ending, kind) == (path.suffix, subtype))
    return next(found, "mp3" if path.suffix == ".mp3" else "wav")
