"""The rows of the results table: which figures each shows, in which form, and what they should be."""

from collections.abc import Callable
from typing import NamedTuple

from duotok.recipes.corpus.manifest import STEMS
from duotok.tokenizer.model import TRACKS


class Row(NamedTuple):
    """One line of the table."""

    label: str
    keys: tuple[str, ...]  # the figures it needs; a row without them is left out
    form: Callable[..., str]  # of the figures' values
    should: str  # what the figure should be


def _plain(digits: int, unit: str = "") -> Callable[..., str]:
    return lambda *values: " / ".join(f"{value:.{digits}f}{unit}" for value in values)


def _difference(value: float, other: float) -> str:
    return f"{value - other:+.2f} ({value:.2f} against {other:.2f})"


def _lowered(value: float, other: float) -> str:
    return f"{100 * (1 - other / value):.1f} %"


def _best_over_one(guidance: float, best: float, one: float) -> str:
    return f"{_difference(best, one)} at {guidance:g}"


_FINE = ("50_300", "300_1000", "1000_3000")


def _codec_rows(prefix: str, name: str, chroma: str, mel: str) -> tuple[Row, ...]:
    fine = tuple(f"{prefix}_fine_structure_{band}_hz" for band in _FINE)
    return (
        Row(f"{name}: chroma correlation", (f"{prefix}_chroma_correlation",), _plain(2), chroma),
        Row(f"{name}: fine structure at 50-300 / 300-1000 / 1000-3000 Hz", fine, _plain(2), "1"),
        Row(f"{name}: log10-mel L1", (f"{prefix}_log10_mel_l1",), _plain(2), mel),
    )


_G, _L, _T, _R, _D = "generate.", "lm.", "tokenizer.", "readouts.", "decoding."
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
        Row(
            "language model, computing per second of audio: one song / best of 4",
            (_D + "lm_seconds_per_second", _D + "lm_seconds_per_second_4"),
            _plain(3, " s"),
            "one song 0.15 s or less",
        ),
        Row(
            "decoding against a plain `transformers` loop, the same codes",
            (_D + "times_faster_than_plain_loop",),
            lambda times: f"{times:.1f} times faster",
            "2.5 times faster or more",
        ),
    ),
    "Language model": (
        Row("cnBPT, accompaniment alone", (_L + "cnbpt_unconditional_accompaniment",), _plain(3), "lower"),
        Row("cnBPT, vocal to accompaniment", (_L + "cnbpt_vocal_to_accompaniment",), _plain(3), "lower"),
        Row(
            "how much the vocal lowers the accompaniment's cnBPT",
            (_L + "cnbpt_unconditional_accompaniment", _L + "cnbpt_vocal_to_accompaniment"),
            _lowered,
            "5 % or more (paper: 8.3 %)",
        ),
        Row(
            "cost of another song's vocal, first 5 s without prefix",
            (_L + "mismatch_cost_first_5s_percent",),
            _plain(1, " %"),
            "10 % or more",
        ),
        Row(
            "the same, 30 s after a prefix of 2 s",
            (_L + "mismatch_cost_percent",),
            _plain(1, " %"),
            "above 3 % (paper: 17.3 %)",
        ),
        Row(
            "cost of the vocal 0.04 / 0.2 / 1 / 4 s late",
            tuple(f"{_L}shift_{amount}_cost_percent" for amount in ("40ms", "200ms", "1s", "4s")),
            _plain(1, " %"),
            "above 0, rising",
        ),
        Row(
            "cost of a quarter / half / three quarters / all of the vocal hidden",
            tuple(
                f"{_L}{name}_cost_percent"
                for name in ("mask_quarter", "mask_half", "mask_three_quarters", "no_vocal")
            ),
            _plain(1, " %"),
            "above 0, rising",
        ),
        Row(
            "cnBPT of the accompaniment in windows of 5 / 10 / 20 / 30 s, from the vocal",
            tuple(f"{_L}context_cnbpt_vocal_to_accompaniment_{seconds}s" for seconds in (5, 10, 20, 30)),
            _plain(3),
            "falling at every step",
        ),
        Row(
            "the same, both tracks alone: accompaniment",
            tuple(f"{_L}context_cnbpt_unconditional_accompaniment_{seconds}s" for seconds in (5, 10, 20, 30)),
            _plain(3),
            "falling at every step",
        ),
    ),
    "Guidance, ranking, whole songs": (
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
                _difference,
                "above 0",
            )
            for end, heard in (("", "read from codes"), ("_sound", "heard"))
            for measure, name in (("in_key", "in-key"), ("harmony", "harmony"))
        ),
        Row(
            "180 s song: 30 s windows in the singer's key, by codes / heard / of the corpus' own band",
            tuple(f"long.key_agreement{ending}" for ending in ("", "_sound", "_real")),
            _plain(2),
            "0.85 or more",
        ),
        Row(
            "180 s song: the beat moves at joints / inside windows, by so many beats, heard",
            ("long.joint_beat_error_sound", "long.inside_beat_error_sound"),
            _plain(3),
            "no more at joints",
        ),
    ),
    "Renderer": (
        *_codec_rows("renderer.vae", "VAE", "0.85 or more", "0.25 or less"),
        *_codec_rows("renderer.round_trip", "codes to sound", "higher", "lower"),
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
