"""The rows of the results table about the language model: what it predicts, and what is decoded from it."""

from duotok.recipes.evaluation.table_row import Row, difference, plain

_L, _D = "lm.", "decoding."


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
