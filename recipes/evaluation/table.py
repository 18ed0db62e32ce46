"""Results as a Markdown table: eight rows in a README, all of them on a page of their own.

Run: python -m duotok.recipes.evaluation.table results.json [--readme README.md] [--results docs/results.md]
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_text
from duotok.tokenizer.heads import STEMS
from duotok.tokenizer.model import TRACKS

_L, _D = "lm.", "decoding."
BEGIN, END = "<!-- results -->", "<!-- /results -->"
PAGE_HEAD = """\
# Results

Measured on songs of POP909's test split that no part was trained on, by

    python -m duotok.recipes.evaluation.score all --corpus data/popband --out results.json
    python -m duotok.recipes.evaluation.table results.json --readme README.md --results docs/results.md

Seconds of computing are those of two cores of a shared AMD EPYC with AVX-512; they differ by a tenth or two
from run to run.
"""
Figures = Mapping[str, float]
_FINE = ("50_300", "300_1000", "1000_3000")
_REAL = (
    "chroma_correlation",
    *(f"fine_structure_{band}_hz" for band in _FINE),
    "log10_mel_l1",
    "stereo_width_error_db",
    "loudness_error_lu",
)
_G, _T, _R = "generate.", "tokenizer.", "readouts."
_A, _V = "quality.accompaniment_", "quality.vocal_"
_ANCHORS = ("quality.frechet_same_style", "quality.frechet_other_style")
_MARGIN = "+0.15 or more"
_IN_KEY = ("in_key_real", "in_key_real_mismatched", "in_key_silence")
_HARMONY = ("harmony_real", "harmony_real_mismatched", "harmony_silence")
_BEAT_F = ("beat_f_real", "beat_f_real_mismatched", "beat_f_silence")


class Row(NamedTuple):
    """One line of the table."""

    label: str
    keys: tuple[str, ...]  # the figures it needs; a row without them is left out
    form: Callable[..., str]  # of the figures' values
    should: str  # what the figure should be
    in_readme: bool = False  # one of the few that tell the most


def plain(digits: int, unit: str = "") -> Callable[..., str]:
    """Return the form that shows all values with so many digits, and their unit."""
    return lambda *values: " / ".join(f"{value:.{digits}f}{unit}" for value in values)


def difference(value: float, other: float) -> str:
    """Return how far the first value is above the second, and both."""
    return f"{value - other:+.2f} ({value:.2f} against {other:.2f})"


def _lowered(value: float, other: float) -> str:
    return f"{100 * (1 - other / value):.1f} %"


def _best_over_one(guidance: float, best: float, one: float) -> str:
    return f"{difference(best, one)} at {guidance:g}"


LM_ROWS = (
    Row("cnBPT, accompaniment alone", (_L + "cnbpt_unconditional_accompaniment",), plain(3), "lower"),
    Row("cnBPT, vocal to accompaniment", (_L + "cnbpt_vocal_to_accompaniment",), plain(3), "lower"),
    Row(
        "how much the vocal lowers the accompaniment's cnBPT",
        (_L + "cnbpt_unconditional_accompaniment", _L + "cnbpt_vocal_to_accompaniment"),
        _lowered,
        "5 % or more (paper: 8.3 %)",
        True,
    ),
    Row(
        "cost of another song's vocal, first 5 s without prefix",
        (_L + "mismatch_cost_first_5s_percent",),
        plain(1, " %"),
        "10 % or more",
    ),
    Row(
        "the same, 30 s after a prefix of 2 s",
        (_L + "mismatch_cost_percent",),
        plain(1, " %"),
        "above 3 % (paper: 17.3 %)",
    ),
    Row(
        "cost of the vocal 0.04 / 0.2 / 1 / 4 s late",
        tuple(f"{_L}shift_{amount}_cost_percent" for amount in ("40ms", "200ms", "1s", "4s")),
        plain(1, " %"),
        "above 0, rising",
    ),
    Row(
        "cost of a quarter / half / three quarters / all of the vocal hidden",
        tuple(
            f"{_L}{name}_cost_percent"
            for name in ("mask_quarter", "mask_half", "mask_three_quarters", "no_vocal")
        ),
        plain(1, " %"),
        "above 0, rising",
    ),
    Row(
        "cnBPT of the accompaniment in windows of 5 / 10 / 20 / 30 s, from the vocal",
        tuple(f"{_L}context_cnbpt_vocal_to_accompaniment_{seconds}s" for seconds in (5, 10, 20, 30)),
        plain(3),
        "falling at every step",
    ),
    Row(
        "the same, both tracks alone: accompaniment",
        tuple(f"{_L}context_cnbpt_unconditional_accompaniment_{seconds}s" for seconds in (5, 10, 20, 30)),
        plain(3),
        "falling at every step",
    ),
)
DECODING_ROWS = (
    *(
        Row(
            f"in-key of the accompaniment, best guidance minus none, {heard}",
            tuple(
                f"{_D}{key}"
                for key in (
                    f"best_guidance{end}",
                    f"in_key{end}_best_guidance",
                    f"in_key{end}_guidance_1",
                )
            ),
            _best_over_one,
            "above 0",
        )
        for end, heard in (("", "read from codes"), ("_sound", "heard"))
    ),
    *(
        Row(
            f"{name}, best-ranked of 4 minus a single draw, {heard}",
            (f"{_D}{measure}{end}_ranked", f"{_D}{measure}{end}_single"),
            difference,
            "above 0",
        )
        for end, heard in (("", "read from codes"), ("_sound", "heard"))
        for measure, name in (("in_key", "in-key"), ("harmony", "harmony"))
    ),
    Row(
        "180 s song: 30 s windows in the singer's key, by codes / heard / of the corpus' own band",
        tuple(f"long.key_agreement{ending}" for ending in ("", "_sound", "_real")),
        plain(2),
        "0.85 or more",
    ),
    Row(
        "180 s song: the beat moves at joints / inside windows, by so many beats, heard",
        ("long.joint_beat_error_sound", "long.inside_beat_error_sound"),
        plain(3),
        "no more at joints",
    ),
)
DECODING_SPEED_ROWS = (
    Row(
        "language model, computing per second of audio: one song / best of 4",
        (_D + "lm_seconds_per_second", _D + "lm_seconds_per_second_4"),
        plain(3, " s"),
        "one song 0.15 s or less",
    ),
    Row(
        "decoding against a plain `transformers` loop, the same codes",
        (_D + "times_faster_than_plain_loop",),
        lambda times: f"{times:.1f} times faster",
        "2.5 times faster or more",
    ),
)


def _codec_rows(prefix: str, name: str, chroma: str, mel: str) -> tuple[Row, ...]:
    fine = tuple(f"{prefix}_fine_structure_{band}_hz" for band in _FINE)
    return (
        Row(
            f"{name}: chroma correlation",
            (f"{prefix}_chroma_correlation",),
            plain(2),
            chroma,
            prefix == "renderer.round_trip",
        ),
        Row(f"{name}: fine structure at 50-300 / 300-1000 / 1000-3000 Hz", fine, plain(2), "1"),
        Row(f"{name}: log10-mel L1", (f"{prefix}_log10_mel_l1",), plain(2), mel),
    )


ROWS: dict[str, tuple[Row, ...]] = {
    "Generated accompaniment": (
        Row("harmony (1.0 is chance)", (_G + "harmony",), plain(2), "1.3 or more", True),
        Row("harmony with another song's vocal", (_G + "harmony_mismatched",), plain(2), "about 1.0"),
        Row(
            "harmony of the corpus' own band / of another song's / of silence",
            tuple(_G + key for key in _HARMONY),
            plain(2),
            "",
        ),
        Row("in-key minus mismatched", (_G + "in_key", _G + "in_key_mismatched"), difference, _MARGIN, True),
        Row(
            "in-key of the corpus' own band / of another song's / of silence",
            tuple(_G + key for key in _IN_KEY),
            plain(2),
            "",
        ),
        Row("beat F minus mismatched", (_G + "beat_f", _G + "beat_f_mismatched"), difference, _MARGIN, True),
        Row(
            "beat F of the corpus' own band / of another song's / of silence",
            tuple(_G + key for key in _BEAT_F),
            plain(2),
            "",
        ),
        Row(
            "chroma of the sound against that of its own tokens",
            (_G + "token_chroma_correlation",),
            plain(2),
            "0.6 or more",
        ),
        Row("loudness against the vocal", (_G + "loudness_difference_lu",), plain(1, " LU"), "within 12"),
        Row("highest peak", (_G + "peak",), plain(3), "below 1"),
        Row(
            "longest silent stretch / in the corpus' own bands",
            (_G + "longest_silence_seconds", _G + "longest_silence_real_seconds"),
            plain(1, " s"),
            "3 s or less",
        ),
    ),
    "Speed on two CPU cores": (
        Row(
            "computing per second of audio, 30 s song",
            (_G + "rtf_30s",),
            plain(2, " s"),
            "1.0 s or less",
            True,
        ),
        Row("the same, 180 s song", (_G + "rtf_180s",), plain(2, " s"), "no more than 10 % above"),
        Row("peak memory, 180 s song", (_G + "peak_memory_gb",), plain(2, " GB"), "4 GB or less", True),
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
            plain(2),
            "1.2 or less",
        ),
        Row(
            "computing per second of audio, two CPU cores",
            ("renderer.seconds_per_second",),
            plain(2, " s"),
            "0.25 s or less",
        ),
    ),
    "Quality of the sound": (
        Row(
            "mel distance of VAE / codes to sound / another song",
            tuple(f"{_A}{sound}_mel_distance" for sound in ("vae", "round_trip", "shuffled")),
            plain(2),
            "lower",
        ),
        Row(
            "Frechet distance of codes to sound / generated / halves of one style / of two styles",
            (_A + "round_trip_frechet", _A + "generated_frechet", *_ANCHORS),
            plain(1),
            "less than half of the last",
            True,
        ),
        Row(
            "kernel distance x 1000 of VAE / codes to sound / generated to the corpus' own bands",
            tuple(f"quality.kernel_distance_{sound}" for sound in ("vae", "round_trip", "generated")),
            plain(0),
            "lower",
        ),
        Row(
            "vocal, codes to sound: PESQ / STOI (paper: 1.76 / 0.55)",
            (_V + "round_trip_pesq", _V + "round_trip_stoi"),
            plain(2),
            "higher",
        ),
    ),
    "Tokenizer (vocal / accompaniment)": tuple(
        Row(label, (_T + "vocal_" + key, _T + "accompaniment_" + key), plain(2), should)
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
            plain(2),
            "0.75 or more",
        ),
        Row(
            "key of the vocal, right or relative / from its audio / a constant guess",
            tuple(f"{_R}key_accuracy_or_relative_{name}" for name in ("vocal", "vocal_audio", "constant")),
            plain(2),
            "0.75 or more",
        ),
        Row(
            "activity of the vocal, F1 / always on",
            (_R + "activity_f1_vocal", _R + "activity_f1_vocal_constant"),
            plain(2),
            "higher",
        ),
        *(
            Row(
                f"{name} that the vocal asks for / a constant guess",
                (f"{_R}sheet_{key}_agreement", f"{_R}sheet_{key}_agreement_constant"),
                plain(2),
                "higher",
            )
            for name, key in (("place in the bar, within a sixteenth of it,", "bar"), ("chord", "chord"))
        ),
    ),
    "Encoding (vocal / accompaniment)": tuple(
        Row(label, tuple(f"encoding.{track}_{key}" for track in TRACKS), plain(digits), should)
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
            plain(1, " dB"),
            "vocal 6 dB or more",
        ),
        Row(
            "SI-SDR improvement of the vocal on a real song",
            ("separation.real_vocal_si_sdr_improvement_db",),
            plain(1, " dB"),
            "above 0",
        ),
    ),
}


def render_table(figures: Figures, *, in_readme: bool = False) -> str:
    """The Markdown table of the figures that are there, by section, or of the README's rows alone."""
    lines = ["| measured on the test songs | value | should be |", "|---|---|---|"]
    for section, rows in ROWS.items():
        found = [row for row in rows if all(key in figures for key in row.keys)]
        if found and not in_readme:
            lines.append(f"| **{section}** | | |")
        for row in found:
            if row.in_readme or not in_readme:
                value = row.form(*(figures[key] for key in row.keys))
                lines.append(f"| {row.label} | {value} | {row.should} |")
    return "\n".join(lines)


def put_between_marks(text: str, table: str) -> str:
    """The text with the table between its two marks; raises DataError where they are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"there must be one {BEGIN} and after it one {END} in the README")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Results as a Markdown table.")
    parser.add_argument("figures", metavar="results.json", type=Path, help="results.json of score.py")
    parser.add_argument("--readme", type=Path, help="its block gets the rows that tell most")
    parser.add_argument("--results", dest="page", type=Path, metavar="PAGE", help="page of all rows")
    arguments = parser.parse_args(argv)
    return guard(lambda: _show(arguments.figures, arguments.readme, arguments.page))


def _show(results: Path, readme: Path | None, page: Path | None) -> None:
    from duotok.recipes.evaluation.results import read_results

    figures = read_results(results)
    table = render_table(figures)
    if readme is not None:
        few = render_table(figures, in_readme=True)
        if page is not None:
            place = os.path.relpath(page, readme.parent).replace(os.sep, "/")
            few += f"\n\nAll figures: [{place}]({place})."
        try:
            write_text(readme, put_between_marks(readme.read_text(encoding="utf-8"), few))
        except OSError as error:
            raise DataError(f"cannot read {readme}: {error.strerror or error}") from error
    if page is not None:
        write_text(page, f"{PAGE_HEAD}\n{table}\n")
    print(table)


if __name__ == "__main__":
    sys.exit(main())
