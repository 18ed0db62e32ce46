import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from duotok.recipes.accompany.pipeline import STAGES, Accompanist, choose_device
from duotok.tokenizer.common.audio import read_audio
from duotok.tokenizer.common.errors import AudioError, ConfigError
from duotok.tokenizer.music.tuning import PitchClock

HOP = 1_920


@pytest.fixture(scope="module")
def result(accompanist, vocal):
    return accompanist.accompany(vocal, seed=3, steps=2)


def test_as_long_as_the_vocal_and_below_full_scale(result, vocal):
    assert result.accompaniment.shape == result.mix.shape == (2, vocal.shape[1])
    assert 0 < float(result.accompaniment.abs().max()) < 1
    assert 0 < float(result.mix.abs().max()) < 1
    assert len(result.codes) == -(-vocal.shape[1] // HOP)


def test_the_end_fades_within_the_length(result):
    assert float(result.accompaniment[:, -1].abs().max()) == 0
    assert float(result.accompaniment[:, -100:].abs().max()) < 1e-3
    assert float(result.accompaniment[:, -48_000:-12_000].abs().max()) > 1e-2


def test_the_mix_is_the_sum_of_both(result, vocal):
    gain = 10 ** (result.report["levels"]["mix_gain_db"] / 20)
    both = gain * (vocal.repeat(2, 1) + result.accompaniment)
    assert torch.allclose(result.mix, both, atol=2e-3)


def test_the_report_is_json_and_says_what_was_done(result, vocal):
    report = json.loads(json.dumps(result.report, allow_nan=False))
    assert report["samples"] == vocal.shape[1]
    assert report["seed"] == 3
    assert report["settings"]["steps"] == 2
    assert report["model"]["name"] == "tiny"
    assert list(report["computing_seconds"]) == list(STAGES)
    assert report["chords"][-1][1] == pytest.approx(2.04)
    levels = report["levels"]
    assert levels["accompaniment_lufs"] - levels["vocal_lufs"] == pytest.approx(
        report["settings"]["accompaniment_db"], abs=0.02
    )


def test_seeds(accompanist, vocal, result):
    again = accompanist.accompany(vocal, seed=3, steps=2)
    other = accompanist.accompany(vocal, seed=4, steps=2)
    assert torch.equal(again.mix, result.mix)
    assert not torch.equal(other.codes, result.codes)
    assert not torch.equal(other.accompaniment, result.accompaniment)


def test_settings_reach_the_models(accompanist, vocal, result):
    assert not torch.equal(accompanist.accompany(vocal, seed=3, steps=3).accompaniment, result.accompaniment)
    quiet = accompanist.accompany(vocal, seed=3, steps=2, accompaniment_db=-9)
    assert quiet.report["levels"]["accompaniment_lufs"] == pytest.approx(
        result.report["levels"]["accompaniment_lufs"] - 8, abs=0.05
    )
    likeliest = [accompanist.accompany(vocal, seed=seed, steps=1, temperature=0).codes for seed in (1, 2)]
    assert torch.equal(*likeliest)


def test_the_model_says_how_many_are_drawn(accompanist, vocal):
    own = Accompanist(replace(accompanist.bundle, defaults={"candidates": 4, "top_p": 0.9, "steps": 1}))
    sketches = own.compose(vocal, seed=5)
    assert sorted(composition.seed for composition in sketches.ranked) == [5, 6, 7, 8]
    best = own.accompany(vocal, seed=5)
    assert torch.equal(best.codes, sketches.ranked[0].codes) and best.report["settings"]["top_p"] == 0.9
    assert [made.report["seed"] for made in own.vary(vocal, seed=5, variations=3, keep=2)] == [
        composition.seed for composition in sketches.ranked[:2]
    ]
    assert len(own.compose(vocal, candidates=1).ranked) == 1
    assert len(own.compose(vocal, candidates=1, variations=2).ranked) == 2


def test_a_level_that_cannot_be_reached_is_said(accompanist, vocal):
    loud = vocal / float(vocal.abs().max())
    report = accompanist.accompany(loud, steps=1, accompaniment_db=12).report
    levels = report["levels"]
    reached = levels["accompaniment_lufs"] - levels["vocal_lufs"]
    assert reached < 11
    assert [
        warning for warning in report["warnings"] if f"{reached:+.1f} LU" in warning and "+12.0" in warning
    ]
    assert accompanist.accompany(loud, steps=1).report["warnings"] == []  # nobody asked for a level


def test_a_prefix_is_kept_and_continued(accompanist, vocal, result):
    prefix = result.accompaniment[:, : 10 * HOP + 100]
    given = accompanist.bundle.tokenizer.encode(prefix[None, :, : 10 * HOP], "accompaniment")[0]
    continued = accompanist.accompany(vocal, seed=8, steps=1, prefix=prefix)
    assert torch.equal(continued.codes[:10], given)
    assert continued.report["prefix_seconds"] == pytest.approx(0.4)
    assert len(continued.codes) == len(result.codes)
    kept = continued.accompaniment[:, : prefix.shape[1]]
    assert torch.allclose(kept, prefix, atol=1e-6)  # as it sounds, and as loud
    for fields in ({"accompaniment_db": -20.0}, {"tuning": -30}):
        other = accompanist.accompany(vocal, seed=8, steps=1, prefix=prefix, **fields)
        start = other.accompaniment[:, : prefix.shape[1]]
        assert np.corrcoef(start.flatten(), prefix.flatten())[0, 1] > 0.9999
        levels = other.report["levels"]
        asked = levels["accompaniment_lufs"] - levels["vocal_lufs"] == pytest.approx(-20, abs=0.05)
        assert asked == ("accompaniment_db" in fields) and torch.allclose(start, prefix, atol=1e-6) != asked


def test_a_given_tempo_is_kept_whatever_the_prefix_plays(accompanist, vocal, result):
    prefix = result.accompaniment[:, : 20 * HOP]
    plan = accompanist.compose(vocal, prefix=prefix, tempo_bpm=150).plan
    assert plan.time_line.tempo_bpm == pytest.approx(150)


def test_a_prefix_that_is_no_frame(accompanist, vocal):
    with pytest.raises(AudioError, match="at least 1920"):
        accompanist.accompany(vocal, prefix=vocal[:, :1000])


def test_progress_runs_through_the_stages(accompanist, vocal):
    heard: list[tuple[str, float]] = []
    accompanist.accompany(vocal, steps=1, progress=lambda stage, share: heard.append((stage, share)))
    assert list(dict.fromkeys(stage for stage, _ in heard)) == list(STAGES)
    for stage in STAGES:
        shares = [share for name, share in heard if name == stage]
        assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1
    assert len([1 for stage, _ in heard if stage == "compose"]) > 10


def test_several_windows(accompanist, make_singing):
    vocal = torch.from_numpy(make_singing(32.5).T)
    result = accompanist.accompany(vocal, steps=1)
    assert result.accompaniment.shape == (2, vocal.shape[1])
    seconds = result.accompaniment.unfold(1, 48_000, 48_000).square().mean(dim=(0, 2))
    assert float(seconds.min()) > 0.05 * float(seconds.max())


def test_save_leaves_four_files(result, tmp_path):
    folder = result.save(tmp_path / "out")
    names = ["accompaniment.wav", "codes.safetensors", "mix.wav", "report.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    info = soundfile.info(folder / "mix.wav")
    assert (info.samplerate, info.channels, info.frames) == (48_000, 2, result.mix.shape[1])
    assert torch.allclose(read_audio(folder / "accompaniment.wav"), result.accompaniment, atol=1e-4)


def test_devices():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cpu"):
            choose_device("cuda")
    with pytest.raises(ConfigError, match="one of"):
        choose_device("abacus")


def test_the_report_has_the_lead_sheet(accompanist, vocal, result):
    sheet = result.report["lead_sheet"]
    chords = sheet["chords"]
    assert chords[0][0] == 0 and chords[-1][1] == pytest.approx(2.04)
    assert all(before[1] == after[0] for before, after in zip(chords[:-1], chords[1:], strict=True))
    made = accompanist.accompany(vocal, seed=3, steps=1, tempo_bpm=180, chords=[(0.4, 1.2, "D:min7")])
    told = made.report["lead_sheet"]
    assert any(start <= 0.4 and end >= 1.2 for start, end, name in told["chords"] if name == "D:min")
    assert told["tempo_bpm"] == made.report["tempo_bpm"] == pytest.approx(180)
    assert not torch.equal(made.codes, result.codes)


@pytest.mark.parametrize("cents", [-40.0, np.linspace(-30, 30, 6)])
def test_the_band_is_in_the_singers_tuning(accompanist, make_singing, cents):
    vocal = torch.from_numpy(make_singing(6.02).T)
    clock = PitchClock(cents, 6.02)
    vocal = clock.bring_back(vocal, vocal.shape[1])
    sketches = accompanist.compose(vocal, steps=1, chords=[(1.0, 3.0, "D:min")])
    made = accompanist.perform(sketches, sketches.ranked[0])
    told = made.report["tuning"]
    assert told["applied"] and told["cents"] == pytest.approx(np.mean(cents), abs=4)
    assert told["drift_cents"] == pytest.approx(np.ptp(cents), abs=12)
    assert made.accompaniment.shape == (2, vocal.shape[1]) and made.report["samples"] == vocal.shape[1]
    gain = 10 ** (made.report["levels"]["mix_gain_db"] / 20)
    assert torch.allclose(made.mix, gain * (vocal.repeat(2, 1) + made.accompaniment), atol=2e-3)
    # What was played at pitch, heard at pitch again; a random band is noise, some of it too high to be kept.
    left_alone = replace(sketches, pitch_clock=None, vocal=sketches.pitched)
    at_pitch = accompanist.perform(left_alone, sketches.ranked[0]).accompaniment[:, :240_000]
    heard = sketches.pitch_clock.bring_to_pitch(made.accompaniment)[:, :240_000]
    assert np.corrcoef(heard.flatten(), at_pitch.flatten())[0, 1] > 0.95
    chords = made.report["lead_sheet"]["chords"]
    assert any(start < 1.1 and end > 2.9 for start, end, name in chords if name == "D:min")
    assert chords[-1][1] == pytest.approx(6.02, abs=0.05)


def test_a_singer_at_pitch_or_of_unknown_tuning_is_left_alone(accompanist, vocal, result):
    assert not result.report["tuning"]["applied"] and abs(result.report["tuning"]["cents"]) < 3
    off = accompanist.accompany(vocal, seed=3, steps=2, tuning="off")
    assert torch.equal(off.mix, result.mix) and off.report["tuning"]["cents"] is None
    noise = accompanist.accompany(0.1 * torch.randn(2, 96_000), steps=1).report["tuning"]
    assert not noise["applied"] and noise["cents"] is None
    chart = [(0.0, 900.0, "C:maj"), (900.0, 901.0, "G:maj")]  # beyond the end, and the slowest tempo there is
    given = accompanist.accompany(vocal, seed=3, steps=2, tuning=100, tempo_bpm=55, chords=chart)
    assert given.report["tuning"]["applied"] and len(given.codes) > len(result.codes)
    assert given.accompaniment.shape == result.accompaniment.shape
