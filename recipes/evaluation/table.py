"""Results as a Markdown table, also between the marks of a README.

Run: python -m duotok.recipes.evaluation.table results.json [--readme README.md]
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from duotok.recipes.evaluation.lm_rows import DECODING_ROWS, DECODING_SPEED_ROWS, LM_ROWS
from duotok.recipes.evaluation.table_row import Row
from duotok.recipes.evaluation.table_row import difference as _difference
from duotok.recipes.evaluation.table_row import plain as _plain
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_text
from duotok.tokenizer.heads import STEMS
from duotok.tokenizer.model import TRACKS

BEGIN, END = "<!-- results -->", "<!-- /results -->"
Figures = Mapping[str, float]


_FINE = ("50_300", "300_1000", "1000_3000")
_REAL = (
    "chroma_correlation",
    *(f"fine_structure_{band}_hz" for band in _FINE),
    "log10_mel_l1",
    "stereo_width_error_db",
    "loudness_error_lu",
)


def _codec_rows(prefix: str, name: str, chroma: str, mel: str) -> tuple[Row, ...]:
    fine = tuple(f"{prefix}_fine_structure_{band}_hz" for band in _FINE)
    return (
        Row(f"{name}: chroma correlation", (f"{prefix}_chroma_correlation",), _plain(2), chroma),
        Row(f"{name}: fine structure at 50-300 / 300-1000 / 1000-3000 Hz", fine, _plain(2), "1"),
        Row(f"{name}: log10-mel L1", (f"{prefix}_log10_mel_l1",), _plain(2), mel),
    )


_G, _T, _R = "generate.", "tokenizer.", "readouts."
_A, _V = "quality.accompaniment_", "quality.vocal_"
_ANCHORS = ("quality.frechet_same_style", "quality.frechet_other_style")
_MARGIN = "+0.15 or more"
_IN_KEY = ("in_key_real", "in_key_real_mismatched", "in_key_silence")
_HARMONY = ("harmony_real", "harmony_real_mismatched", "harmony_silence")
_BEAT_F = ("beat_f_real", "beat_f_real_mismatched", "beat_f_silence")
ROWS: dict[str, tuple[Row, ...]] = {
    "Generated accompaniment": (
        Row("harmony (1.0 is chance)", (_G + "harmony",), _plain(2), "1.3 or more"),
        Row("harmony with another song's vocal", (_G + "harmony_mismatched",), _plain(2), "about 1.0"),
        Row(
            "harmony of the corpus' own band / of another song's / of silence",
            tuple(_G + key for key in _HARMONY),
            _plain(2),
            "",
        ),
        Row("in-key minus mismatched", (_G + "in_key", _G + "in_key_mismatched"), _difference, _MARGIN),
        Row(
            "in-key of the corpus' own band / of another song's / of silence",
            tuple(_G + key for key in _IN_KEY),
            _plain(2),
            "",
        ),
        Row("beat F minus mismatched", (_G + "beat_f", _G + "beat_f_mismatched"), _difference, _MARGIN),
        Row(
            "beat F of the corpus' own band / of another song's / of silence",
            tuple(_G + key for key in _BEAT_F),
            _plain(2),
            "",
        ),
        Row(
            "chroma of the sound against that of its own tokens",
            (_G + "token_chroma_correlation",),
            _plain(2),
            "0.6 or more",
        ),
        Row("loudness against the vocal", (_G + "loudness_difference_lu",), _plain(1, " LU"), "within 12"),
        Row("highest peak", (_G + "peak",), _plain(3), "below 1"),
        Row(
            "longest silent stretch / in the corpus' own bands",
            (_G + "longest_silence_seconds", _G + "longest_silence_real_seconds"),
            _plain(1, " s"),
            "3 s or less",
        ),
    ),
    "Speed on two CPU cores": (
        Row("computing per second of audio, 30 s song", (_G + "rtf_30s",), _plain(2, " s"), "1.0 s or less"),
        Row("the same, 180 s song", (_G + "rtf_180s",), _plain(2, " s"), "no more than 10 % above"),
        Row("peak memory, 180 s song", (_G + "peak_memory_gb",), _plain(2, " GB"), "4 GB or less"),
        *DECODING_SPEED_ROWS,
    ),
    "Language model": LM_ROWS,
    "Guidance, ranking, whole songs": DECODING_ROWS,
    "Renderer": (
        *_codec_rows("renderer.vae", "VAE", "0.95 or more", "0.18 or less"),
        Row(
            "VAE: error of stereo width (side over mid) / of loudness",
            ("renderer.vae_stereo_width_error_db", "renderer.vae_loudness_error_lu"),
            lambda width, loudness: f"{width:.1f} dB / {loudness:.1f} LU",
            "1 dB / 0.5 LU or less",
        ),
        Row(
            "VAE on real recordings: chroma correlation; fine structure; log10-mel L1; width / loudness",
            tuple(f"renderer.recordings_vae_{key}" for key in _REAL),
            lambda chroma, low, middle, high, mel, width, loudness: (
                f"{chroma:.2f}; {low:.2f} / {middle:.2f} / {high:.2f}; {mel:.2f}; "
                f"{width:.1f} dB / {loudness:.1f} LU"
            ),
            "as on test songs",
        ),
        *_codec_rows("renderer.round_trip", "codes to sound", "0.80 or more", "0.40 or less"),
        Row(
            "the same in so few diffusion steps: worst loss of these measures against 50 steps",
            ("renderer.steps", "renderer.few_steps_loss_percent"),
            lambda steps, loss: f"{steps:.0f} steps: {loss:+.1f} %",
            "8 steps or fewer, 5 % or less",
        ),
        Row(
            "spectral flux over its median at joints of windows / of decoded chunks / anywhere",
            tuple(f"renderer.{place}_flux_ratio" for place in ("joint", "chunk_joint", "anywhere")),
            _plain(2),
            "1.2 or less",
        ),
        Row(
            "computing per second of audio, two CPU cores",
            ("renderer.seconds_per_second",),
            _plain(2, " s"),
            "0.25 s or less",
        ),
    ),
    "Quality of the sound": (
        Row(
            "mel distance of VAE / codes to sound / another song",
            tuple(f"{_A}{sound}_mel_distance" for sound in ("vae", "round_trip", "shuffled")),
            _plain(2),
            "lower",
        ),
        Row(
            "Frechet distance of codes to sound / generated / halves of one style / of two styles",
            (_A + "round_trip_frechet", _A + "generated_frechet", *_ANCHORS),
            _plain(1),
            "less than half of the last",
        ),
        Row(
            "vocal, codes to sound: PESQ / STOI (paper: 1.76 / 0.55)",
            (_V + "round_trip_pesq", _V + "round_trip_stoi"),
            _plain(2),
            "higher",
        ),
    ),
    "Tokenizer (vocal / accompaniment)": tuple(
        Row(label, (_T + "vocal_" + key, _T + "accompaniment_" + key), _plain(2), should)
        for label, key, should in (
            ("chroma read out of the codes, correlation", "chroma_correlation", "higher"),
            ("log10-mel read out of the codes, L1", "mel_l1", "lower"),
            ("codebook utilization", "utilization", "0.90 or more"),
            ("normalized entropy", "normalized_entropy", "higher"),
        )
    ),
    "Read out of codes, without audio": (
        Row(
            "chords of the accompaniment, majmin accuracy / from its audio / a constant guess",
            tuple(
                f"{_R}chord_accuracy_{name}" for name in ("accompaniment", "accompaniment_audio", "constant")
            ),
            _plain(2),
            "0.75 or more",
        ),
        Row(
            "key of the vocal, right or relative / from its audio / a constant guess",
            tuple(f"{_R}key_accuracy_or_relative_{name}" for name in ("vocal", "vocal_audio", "constant")),
            _plain(2),
            "0.75 or more",
        ),
        Row(
            "activity of the vocal, F1 / always on",
            (_R + "activity_f1_vocal", _R + "activity_f1_vocal_constant"),
            _plain(2),
            "higher",
        ),
        *(
            Row(
                f"{name} that the vocal asks for / a constant guess",
                (f"{_R}sheet_{key}_agreement", f"{_R}sheet_{key}_agreement_constant"),
                _plain(2),
                "higher",
            )
            for name, key in (("place in the bar, within a sixteenth of it,", "bar"), ("chord", "chord"))
        ),
    ),
    "Encoding (vocal / accompaniment)": tuple(
        Row(label, tuple(f"encoding.{track}_{key}" for track in TRACKS), _plain(digits), should)
        for label, key, digits, should in (
            ("tokens of 180 s equal, in chunks and in one pass", "chunked_equal", 4, "0.99 or more"),
            ("tokens equal at +6 dB", "gain_plus_6_db_equal", 3, "0.90 or more"),
            ("tokens equal at -6 dB", "gain_minus_6_db_equal", 3, "0.90 or more"),
            ("tokens equal after 16 bits at 44.1 kHz", "resampled_equal", 3, "0.90 or more"),
            ("times faster than the audio, two CPU cores", "times_real_time", 0, "20 or more"),
        )
    ),
    "Lyrics and separation": (
        Row(
            "lyric tokens read from vocal codes, error rate (worst voice)",
            ("lyrics.token_error_rate", "lyrics.token_error_rate_worst_voice"),
            lambda rate, worst: f"{rate:.2f} ({worst:.2f})",
            "0.40 or less",
        ),
        Row(
            "SI-SDR improvement of vocal / drums / bass / other on test mixes",
            tuple(f"separation.{stem}_si_sdr_improvement_db" for stem in STEMS),
            _plain(1, " dB"),
            "vocal 6 dB or more",
        ),
        Row(
            "SI-SDR improvement of the vocal on a real song",
            ("separation.real_vocal_si_sdr_improvement_db",),
            _plain(1, " dB"),
            "above 0",
        ),
    ),
}


def render_table(figures: Figures) -> str:
    """The Markdown table of the figures that are there, one section after the other."""
    lines = ["| measured on the test songs | value | should be |", "|---|---|---|"]
    for section, rows in ROWS.items():
        found = [row for row in rows if all(key in figures for key in row.keys)]
        if found:
            lines.append(f"| **{section}** | | |")
        for row in found:
            lines.append(f"| {row.label} | {row.form(*(figures[key] for key in row.keys))} | {row.should} |")
    return "\n".join(lines)


def put_between_marks(text: str, table: str) -> str:
    """The text with the table between its two marks; raises DataError where they are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"there must be one {BEGIN} and after it one {END} in the README")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Results as a Markdown table.")
    parser.add_argument("results", type=Path, help="results.json of score.py")
    parser.add_argument("--readme", type=Path, help="file whose block between the marks is replaced")
    arguments = parser.parse_args(argv)

    def show() -> None:
        from duotok.recipes.evaluation.results import read_results

        table = render_table(read_results(arguments.results))
        if arguments.readme is not None:
            _update(arguments.readme, table)
        print(table)

    return guard(show)


def _update(readme: Path, table: str) -> None:
    try:
        write_text(readme, put_between_marks(readme.read_text(encoding="utf-8"), table))
    except OSError as error:
        raise DataError(f"cannot update {readme}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
