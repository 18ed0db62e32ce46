"""The figures of guidance and ranking, and the plain loop that decoding is timed against."""

import pytest
import torch

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.evaluation import decoding_part
from duotok.recipes.evaluation.heard_coherence import Coherence
from duotok.tokenizer.common.errors import ConfigError


def outcome(in_keys, first: float, best: float) -> decoding_part.Outcome:
    def heard(value: float) -> Coherence:
        return Coherence(harmony=value, in_key=value, beat_f=value)

    return decoding_part.Outcome(
        tokens=[{"in_key": value, "harmony": 2 * value} for value in in_keys],
        sound_first=heard(first),
        sound_best=heard(best),
    )


OUTCOMES = {
    1.0: [outcome((0.4, 0.2), 0.1, 0.5), outcome((0.6, 0.4), 0.3, 0.3)],
    3.0: [outcome((0.9, 0.5), 0.6, 0.8), outcome((0.7, 0.7), 0.4, 0.2)],
}


def test_curves_name_the_best_guidance():
    figures = decoding_part.describe_curves(decoding_part.draw_curves(OUTCOMES))
    assert figures["in_key_guidance_1"] == pytest.approx(0.4)
    assert figures["harmony_guidance_3"] == pytest.approx(1.4)
    assert figures["best_guidance"] == figures["best_guidance_sound"] == 3.0
    assert figures["in_key_best_guidance"] == pytest.approx(0.7)
    assert figures["in_key_sound_best_guidance"] == pytest.approx(0.5)


def test_ranking_is_compared_with_a_single_draw_and_the_best_possible():
    figures = decoding_part.describe_ranking([outcome((0.5, 0.9), 0.1, 0.5), outcome((0.8, 0.4), 0.3, 0.3)])
    assert figures["in_key_single"] == pytest.approx(0.65)
    assert figures["in_key_ranked"] == pytest.approx(0.65)
    assert figures["in_key_oracle"] == pytest.approx(0.85)
    assert figures["in_key_ranking_error"] == pytest.approx(0.2)
    assert figures["harmony_sound_ranked"] - figures["harmony_sound_single"] == pytest.approx(0.2)


def test_the_picture_of_guidance(tmp_path):
    path = tmp_path / "plots" / "guidance.png"
    references = {"in_key": 0.9, "harmony": 1.5}
    decoding_part.draw_guidance(decoding_part.draw_curves(OUTCOMES), references, "Guidance", path)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_plain_loop_samples_the_same_codes(tiny_bundle, guidance):
    lm = DualTrackLM.from_pretrained(tiny_bundle / "lm")
    vocal = torch.randint(0, 64, (20,), generator=torch.Generator().manual_seed(1))
    config = SamplingConfig(guidance=guidance)
    ours = lm.compose(vocal, seeds=[3], sampling=config).codes[0]
    assert torch.equal(decoding_part.generate_plainly(lm, vocal, 3, config), ours)
    with pytest.raises(ConfigError, match="one window"):
        decoding_part.generate_plainly(lm, vocal, 3, SamplingConfig(window_frames=10, overlap_frames=2))


def test_timing_counts_seconds_of_audio(tiny_bundle):
    lm = DualTrackLM.from_pretrained(tiny_bundle / "lm")
    figures = decoding_part.time_decoding(lm, torch.zeros(10).long(), 25.0, 2.0)
    assert figures["plain_loop_equal_codes"] == 1.0
    ratio = figures["plain_loop_seconds_per_second"] / figures["lm_seconds_per_second"]
    assert figures["times_faster_than_plain_loop"] == pytest.approx(ratio)
    assert figures["cost_of_4_candidates"] > 0
