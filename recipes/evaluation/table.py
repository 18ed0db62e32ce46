"""Results as a Markdown table: eight rows in a README, all of them on a page of their own.

Run: python -m duotok.recipes.evaluation.table results.json [--readme README.md] [--results docs/results.md]
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_text

BEGIN, END = "<!-- results -->", "<!-- /results -->"
PAGE_HEAD = """\
# Results

Measured on songs of POP909's test split that no part was trained on, by

    python -m duotok.recipes.evaluation.score all --corpus data/popband --out results.json
    python -m duotok.recipes.evaluation.table results.json --readme README.md --results docs/results.md

Seconds of computing are those of two cores of a shared AMD EPYC with AVX-512; they differ by a tenth or two
from run to run.
"""
# A section's rows: the label (* = one of the few for a README), then its figures ("a.{b,c} d" = a.b, a.c, d;
# without all of them the row is left out) | the form of each value, or of all of them | what it should be.
_ROWS = """\
# Generated accompaniment
harmony (1.0 is chance) *
    generate.harmony | {:.2f} | 1.3 or more
harmony with another song's vocal
    generate.harmony_mismatched | {:.2f} | about 1.0
harmony of the corpus' own band / of another song's / of silence
    generate.harmony_{real,real_mismatched,silence} | {:.2f} |
in-key minus mismatched *
    generate.in_key{,_mismatched} | difference | +0.15 or more
in-key of the corpus' own band / of another song's / of silence
    generate.in_key_{real,real_mismatched,silence} | {:.2f} |
beat F minus mismatched *
    generate.beat_f{,_mismatched} | difference | +0.15 or more
beat F of the corpus' own band / of another song's / of silence
    generate.beat_f_{real,real_mismatched,silence} | {:.2f} |
chroma of the sound against that of its own tokens
    generate.token_chroma_correlation | {:.2f} | 0.6 or more
loudness against the vocal
    generate.loudness_difference_lu | {:.1f} LU | within 12
highest peak
    generate.peak | {:.3f} | below 1
longest silent stretch / in the corpus' own bands
    generate.longest_silence_{,real_}seconds | {:.1f} s | 3 s or less
# Speed on two CPU cores
computing per second of audio, 30 s song *
    generate.rtf_30s | {:.2f} s | 1.0 s or less
the same, 180 s song
    generate.rtf_180s | {:.2f} s | no more than 10 % above
first sound of `generate --stream`, 180 s song, from the start of the command
    generate.first_sound_seconds | {:.1f} s | 8 s or less
peak memory, 180 s song *
    generate.peak_memory_gb | {:.2f} GB | 4 GB or less
language model, computing per second of audio: one song / best of 4
    decoding.lm_seconds_per_second{,_4} | {:.3f} s | one song 0.15 s or less
decoding against a plain `transformers` loop, the same codes
    decoding.times_faster_than_plain_loop | {:.1f} times faster | 2.5 times faster or more
# Language model
cnBPT, accompaniment alone
    lm.cnbpt_unconditional_accompaniment | {:.3f} | lower
cnBPT, vocal to accompaniment
    lm.cnbpt_vocal_to_accompaniment | {:.3f} | lower
how much the vocal lowers the accompaniment's cnBPT *
    lm.cnbpt_{unconditional,vocal_to}_accompaniment | lowered | 5 % or more (paper: 8.3 %)
cost of another song's vocal, first 5 s without prefix
    lm.mismatch_cost_first_5s_percent | {:.1f} % | 10 % or more
the same, 30 s after a prefix of 2 s
    lm.mismatch_cost_percent | {:.1f} % | above 3 % (paper: 17.3 %)
cost of the vocal 0.04 / 0.2 / 1 / 4 s late
    lm.shift_{40ms,200ms,1s,4s}_cost_percent | {:.1f} % | above 0, rising
cost of a quarter / half / three quarters / all of the vocal hidden
    lm.{mask_quarter,mask_half,mask_three_quarters,no_vocal}_cost_percent | {:.1f} % | above 0, rising
cnBPT of the accompaniment in windows of 5 / 10 / 20 / 30 s, from the vocal
    lm.context_cnbpt_vocal_to_accompaniment_{5,10,20,30}s | {:.3f} | falling at every step
the same, both tracks alone: accompaniment
    lm.context_cnbpt_unconditional_accompaniment_{5,10,20,30}s | {:.3f} | falling at every step
# Guidance, ranking, whole songs
in-key of the accompaniment, best guidance minus none, read from codes
    decoding.best_guidance decoding.in_key_{best_guidance,guidance_1} | best_over_one | above 0
in-key of the accompaniment, best guidance minus none, heard
    decoding.best_guidance_sound decoding.in_key_sound_{best_guidance,guidance_1} | best_over_one | above 0
in-key, best-ranked of 4 minus a single draw, read from codes
    decoding.in_key_{ranked,single} | difference | above 0
harmony, best-ranked of 4 minus a single draw, read from codes
    decoding.harmony_{ranked,single} | difference | above 0
in-key, best-ranked of 4 minus a single draw, heard
    decoding.in_key_sound_{ranked,single} | difference | above 0
harmony, best-ranked of 4 minus a single draw, heard
    decoding.harmony_sound_{ranked,single} | difference | above 0
180 s song: 30 s windows in the singer's key, by codes / heard / of the corpus' own band
    long.key_agreement{,_sound,_real} | {:.2f} | 0.85 or more
180 s song: the beat moves at joints / inside windows, by so many beats, heard
    long.{joint,inside}_beat_error_sound | {:.3f} | no more at joints
# Songs of 2 to 5 minutes with their pauses (`popband --whole`, `score whole`)
30 s windows of the band in the song's key, sung / pauses
    whole.key_windows_{sung,unsung} | {:.2f} | 0.93 or more
the same of the corpus' own band
    whole.key_windows_{sung,unsung}_real | {:.2f} |
second singing of a passage against the first, chroma correlation of the band / of the corpus' own
    whole.chorus_chroma_correlation{,_real} | {:.2f} | 0.8 or more
place in the bar within a sixteenth / chords, majmin / tempo within 4 %
    whole.{bars_right,chords_majmin,tempo_right} | {:.2f} | 0.6 / 0.45 or more
last beats off the true ones, tempo read / given
    whole.end_beat_error_{,given_}ms | {:.0f} ms | 150 / 20 ms or less
a minute of silence first: key / tempo of the band in it right
    whole.silence_intro_{key,tempo}_right | {:.2f} | 0.9 or more
# Real singers (`score singers`, ten clips of 10 s)
harmony / of what was really played / with another singer
    singers.harmony{,_real,_mismatched} | {:.2f} | 1.6 or more
in-key, the same three
    singers.in_key{,_real,_mismatched} | {:.2f} | 0.84 or more
beat F against what was really played / with another singer
    singers.beat_f{,_mismatched} | {:.2f} | higher
kernel distance x 1000 from what was really played
    singers.kernel_distance | {:.0f} | 1,200 or less
# Tuning and continuation
singers of -50 to +50 cents / of a drift of 60 cents: cents between band and singer, worst
    tuning.cents_worst{,_drift} | {:.1f} | 10 or less
a start of 2 s: correlation inside it; level step at the joint
    continuation.prefix_correlation continuation.level_step_db | {:.3f}; {:.1f} dB | 1; 0.5 dB or less
the 10 s after it: key right / beat F, with the start
    continuation.{key,beat_f} | {:.2f} |
the same without a start
    continuation.{key,beat_f}_none | {:.2f} |
# Renderer
VAE: chroma correlation
    renderer.vae_chroma_correlation | {:.2f} | 0.95 or more
VAE: fine structure at 50-300 / 300-1000 / 1000-3000 Hz
    renderer.vae_fine_structure_{50_300,300_1000,1000_3000}_hz | {:.2f} | 1
VAE: log10-mel L1
    renderer.vae_log10_mel_l1 | {:.2f} | 0.18 or less
VAE: error of stereo width (side over mid) / of loudness
    renderer.vae_{stereo_width_error_db,loudness_error_lu} | {:.1f} dB / {:.1f} LU | 1 dB / 0.5 LU or less
VAE on real recordings: chroma correlation; fine structure; log10-mel L1; width / loudness
    renderer.recordings_vae_chroma_correlation \
renderer.recordings_vae_fine_structure_{50_300,300_1000,1000_3000}_hz \
renderer.recordings_vae_{log10_mel_l1,stereo_width_error_db,loudness_error_lu} \
| {:.2f}; {:.2f} / {:.2f} / {:.2f}; {:.2f}; {:.1f} dB / {:.1f} LU | as on test songs
codes to sound: chroma correlation *
    renderer.round_trip_chroma_correlation | {:.2f} | 0.80 or more
codes to sound: fine structure at 50-300 / 300-1000 / 1000-3000 Hz
    renderer.round_trip_fine_structure_{50_300,300_1000,1000_3000}_hz | {:.2f} | 1
codes to sound: log10-mel L1
    renderer.round_trip_log10_mel_l1 | {:.2f} | 0.40 or less
codes and their chart to sound: chroma correlation / fine structure at 50-300 Hz / log10-mel L1
    renderer.told_round_trip_{chroma_correlation,fine_structure_50_300_hz,log10_mel_l1} | {:.2f} | as above
the same in so few diffusion steps: worst loss of these measures against 50 steps
    renderer.{steps,few_steps_loss_percent} | {:.0f} steps: {:+.1f} % | 8 steps or fewer, 5 % or less
spectral flux over its median at joints of windows / of decoded chunks / anywhere
    renderer.{joint,chunk_joint,anywhere}_flux_ratio | {:.2f} | 1.2 or less
computing per second of audio, two CPU cores
    renderer.seconds_per_second | {:.2f} s | 0.25 s or less
# Quality of the sound
mel distance of VAE / codes to sound / another song
    quality.accompaniment_{vae,round_trip,shuffled}_mel_distance | {:.2f} | lower
Frechet distance of codes to sound / generated / another song's own band / of two styles *
    quality.accompaniment_{round_trip,generated,shuffled}_frechet quality.frechet_other_style \
| {:.1f} | generated: as the third
codes and their chart to sound: Frechet / kernel x 1000 / standardized Frechet distance
    quality.accompaniment_told_round_trip_frechet quality.kernel_distance_told_round_trip \
quality.accompaniment_told_round_trip_frechet_standardized | {:.1f} / {:.0f} / {:.0f} | lower
kernel distance x 1000 of VAE / codes to sound / generated to the corpus' own bands
    quality.kernel_distance_{vae,round_trip,generated} | {:.0f} | lower
kernel distance x 1000 of other styles / silence / noise to the corpus' own bands
    quality.kernel_distance_{other_style,silent,random} | {:.0f} |
standardized Frechet distance of codes to sound / generated / other styles / silence / noise to them
    quality.accompaniment_{round_trip,generated,other_style,silent,random}_frechet_standardized \
| {:.0f} | generated: 1.25 times codes to sound or less
generated over true: spread between songs / distinct 4-grams / entropy of codes
    quality.accompaniment_generated_{spread,distinct_4_grams,entropy} | {:.2f} | 0.85 or more each
onsets per beat, generated / codes to sound / the corpus' own bands
    quality.accompaniment_{generated,round_trip,original}_onsets_per_beat | {:.2f} | as the last
bars with drums / bass / chords, generated
    quality.accompaniment_generated_bars_with_{drums,bass,chords} | {:.2f} | as below
bars with drums / bass / chords, the corpus' own bands
    quality.accompaniment_original_bars_with_{drums,bass,chords} | {:.2f} |
vocal, codes to sound: PESQ / STOI (paper: 1.76 / 0.55)
    quality.vocal_round_trip_{pesq,stoi} | {:.2f} | higher
# Styles (`score style`)
style told by a probe: of true codes / the one asked for
    style.style_probe_accuracy style.asked_heard | {:.2f} | 0.7 or more
bars with drums by a probe of codes: true codes told rightly / generated / without drums
    style.drums_probe_{balanced_accuracy,asked,without_drums} | {:.2f} | the last about 0
bars with drums / bass / chords heard, generated
    style.bars_with_{drums,bass,chords}_asked | {:.2f} |
the same, each asked to be left out
    style.bars_with_drums_without_drums style.bars_with_bass_without_bass \
style.bars_with_chords_without_chords | {:.2f} | about 0
# Meters (`score meter` on songs in three)
3/4 asked for: songs in whose onsets three beats a bar lead; the corpus' own bands
    meter.in_3_kept meter.true_in_3_kept | {:.2f} | higher
share of the drums' / bass' / the rest's pulse at thirds of the bar; the corpus' own bands
    meter.{in,true_in}_3_{drums,bass,other}_at_3 | {:.2f} | higher
the same at quarters
    meter.{in,true_in}_3_{drums,bass,other}_at_4 | {:.2f} | lower
# The band's score (`score notes`)
onsets within 50 ms of drums / bass / the rest, F
    notes.onset_f_{drums,bass,other} | {:.2f} | 0.75, 0.70, 0.55
what sounds of the rest, F
    notes.frame_f_other | {:.2f} | 0.75
chroma correlation of the score by a sound font with the band it was read from
    notes.chroma_correlation_by_font | {:.2f} | 0.80
the same of the true notes, which is the most that can be read
    notes.chroma_correlation_of_true_notes | {:.2f} |
Frechet distance of listening features from the bands: by the sound font / rendered from the codes
    notes.frechet_{font,rendered} | {:.1f} | lower than the second
# Tokenizer (vocal / accompaniment)
chroma read out of the codes, correlation
    tokenizer.{vocal,accompaniment}_chroma_correlation | {:.2f} | higher
log10-mel read out of the codes, L1
    tokenizer.{vocal,accompaniment}_mel_l1 | {:.2f} | lower
codebook utilization
    tokenizer.{vocal,accompaniment}_utilization | {:.2f} | 0.90 or more
normalized entropy
    tokenizer.{vocal,accompaniment}_normalized_entropy | {:.2f} | higher
# Read out of codes, without audio
chords of the accompaniment, majmin accuracy / from its audio / a constant guess
    readouts.chord_accuracy_{accompaniment,accompaniment_audio,constant} | {:.2f} | 0.75 or more
key of the vocal, right or relative / from its audio / a constant guess
    readouts.key_accuracy_or_relative_{vocal,vocal_audio,constant} | {:.2f} | 0.75 or more
activity of the vocal, F1 / always on
    readouts.activity_f1_vocal{,_constant} | {:.2f} | higher
place in the bar, within a sixteenth of it, that the vocal asks for / a constant guess
    readouts.sheet_bar_agreement{,_constant} | {:.2f} | higher
chord that the vocal asks for / a constant guess
    readouts.sheet_chord_agreement{,_constant} | {:.2f} | higher
meter that the vocal asks for, share right
    readouts.sheet_meter_right | {:.2f} | higher
# Encoding (vocal / accompaniment)
tokens of 180 s equal, in chunks and in one pass
    encoding.{vocal,accompaniment}_chunked_equal | {:.4f} | 0.99 or more
tokens equal at +6 dB
    encoding.{vocal,accompaniment}_gain_plus_6_db_equal | {:.3f} | 0.90 or more
tokens equal at -6 dB
    encoding.{vocal,accompaniment}_gain_minus_6_db_equal | {:.3f} | 0.90 or more
tokens equal after 16 bits at 44.1 kHz
    encoding.{vocal,accompaniment}_resampled_equal | {:.3f} | 0.90 or more
times faster than the audio, two CPU cores
    encoding.{vocal,accompaniment}_times_real_time | {:.0f} | 20 or more
# Lyrics and separation
lyric tokens read from vocal codes, error rate (worst voice)
    lyrics.token_error_rate{,_worst_voice} | {:.2f} ({:.2f}) | 0.40 or less
SI-SDR improvement of vocal / drums / bass / other on test mixes
    separation.{vocal,drums,bass,other}_si_sdr_improvement_db | {:.1f} dB | vocal 6 dB or more
SI-SDR improvement of the vocal on a real song
    separation.real_vocal_si_sdr_improvement_db | {:.1f} dB | above 0
"""


def difference(value: float, other: float) -> str:
    """Return how far the first value is above the second, and both."""
    return f"{value - other:+.2f} ({value:.2f} against {other:.2f})"


_FORMS: dict[str, Callable[..., str]] = {
    "difference": difference,
    "lowered": lambda value, other: f"{100 * (1 - other / value):.1f} %",
    "best_over_one": lambda guidance, best, one: f"{difference(best, one)} at {guidance:g}",
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    keys: list[str]  # the figures it needs
    form: str
    should: str
    in_readme: bool

    def show(self, figures: Mapping[str, float]) -> str:
        """Its cell with the values."""
        values = [figures[key] for key in self.keys]
        if self.form in _FORMS:
            return _FORMS[self.form](*values)
        if self.form.count("{") > 1:
            return self.form.format(*values)
        return " / ".join(self.form.format(value) for value in values)


def _read_rows() -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    section, label = "", ""
    for line in _ROWS.splitlines():
        if line.startswith("# "):
            section = line.removeprefix("# ")
        elif not line.startswith(" "):
            label = line
        else:
            figures, form, should = (part.strip() for part in line.split("|"))
            keys = [key for name in figures.split() for key in _expand(name)]
            row = Row(label.removesuffix(" *"), keys, form, should, label.endswith(" *"))
            rows.setdefault(section, []).append(row)
    return rows


def _expand(name: str) -> list[str]:
    before, _, rest = name.partition("{")
    middle, _, after = rest.partition("}")
    return [f"{before}{choice}{after}" for choice in middle.split(",")]


ROWS = _read_rows()


def render_table(figures: Mapping[str, float], *, in_readme: bool = False) -> str:
    """The Markdown table of the figures that are there, by section, or of the README's rows alone."""
    lines = ["| measured on the test songs | value | should be |", "|---|---|---|"]
    for section, rows in ROWS.items():
        found = [row for row in rows if all(key in figures for key in row.keys)]
        if found and not in_readme:
            lines.append(f"| **{section}** | | |")
        for row in found:
            if row.in_readme or not in_readme:
                lines.append(f"| {row.label} | {row.show(figures)} | {row.should} |")
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
