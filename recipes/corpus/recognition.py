"""Sentence times from a speech recognizer: faster-whisper with a model folder on this machine."""

from collections.abc import Sequence
from pathlib import Path

from duotok.recipes.corpus.song_stems import SongStems
from duotok.recipes.corpus.transcripts import Sentence
from duotok.recipes.corpus.voice_activity import Spans
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, resample
from duotok.tokenizer.common.errors import ConfigError

RATE_HZ = 16_000
LONGEST_SECONDS = 28.0  # the model looks at 30 s
LONGEST_GAP_SECONDS = 1.5
MARGIN_SECONDS = 0.2
MOST_SILENCE = 0.6  # sentences that the model takes for silence more than this are not kept
FILES = ("model.bin", "config.json")


class WhisperRecognizer:
    """Transcribes the sung stretches of a vocal stem."""

    def __init__(self, model: str, device: str = "cpu", language: str | None = None) -> None:
        folder = Path(model)
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{folder} is not a faster-whisper model ({missing[0]} is missing); give the folder of a "
                "model converted for CTranslate2 by --whisper"
            )
        try:
            from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                "--whisper needs the package faster-whisper: pip install faster-whisper"
            ) from error
        try:
            self.model = WhisperModel(
                str(folder),
                device=device,
                compute_type="int8" if device == "cpu" else "float16",
                cpu_threads=1,
                local_files_only=True,
            )
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(f"cannot load the faster-whisper model in {folder}: {reason}") from error
        self.language = language

    def transcribe(self, stems: SongStems, voice: Spans) -> list[Sentence]:
        """Sentences in seconds of the song, in order; voice: where singing was found."""
        sentences, language = [], self.language
        for start, end in join_for_recognition(voice):
            start, end = max(0.0, start - MARGIN_SECONDS), min(stems.seconds, end + MARGIN_SECONDS)
            audio = resample(stems.read(start, end)[0].mean(dim=0), SAMPLE_RATE_HZ, RATE_HZ).numpy()
            found, info = self.model.transcribe(audio, language=language, condition_on_previous_text=False)
            for each in found:
                if each.no_speech_prob < MOST_SILENCE and each.text.strip():
                    stop = min(end, start + each.end)
                    sentences.append(Sentence(start + each.start, stop, " ".join(each.text.split())))
            language = language or info.language  # one language a song
        return [each for each in sentences if each.end > each.start]


def join_for_recognition(voice: Sequence[tuple[float, float]]) -> Spans:
    """Neighbouring spans joined as far as the model's window reaches; longer ones are parted evenly."""
    joined: Spans = []
    for start, end in voice:
        pieces = int((end - start) // LONGEST_SECONDS) + 1
        step = (end - start) / pieces
        for piece in range(pieces):
            begin, stop = start + piece * step, start + (piece + 1) * step
            near = bool(joined) and begin - joined[-1][1] <= LONGEST_GAP_SECONDS
            if near and stop - joined[-1][0] <= LONGEST_SECONDS:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((begin, stop))
    return joined
