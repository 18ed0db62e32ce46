"""Losses of waves: the ear's filter, what magnitudes and phases notice, and the losses of an adversary."""

import math

import pytest
import torch
from scipy.signal import freqz
from torch import Tensor

from duotok.recipes.renderer.adversary import (
    Judgement,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from duotok.recipes.renderer.train_waveform_vae import (
    DiscriminatorConfig,
    Discriminators,
    KWeighting,
    WaveformLossConfig,
    WaveformLosses,
    divergence,
)
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.loudness import K_WEIGHTING, measure_loudness

RATE_HZ = 48_000
FFT_SIZES = (1024, 256, 64)
MAGNITUDES = ("convergence", "magnitude")
PHASES = ("frequency", "group_delay", "correlation")


def measure(found: Tensor, target: Tensor, **settings: float) -> dict[str, float]:
    losses = WaveformLosses(WaveformLossConfig(fft_sizes=FFT_SIZES, **settings))(found, target)
    return {name: value.item() for name, value in losses.items()}


def of_channel(channel: str, found: Tensor, target: Tensor) -> dict[str, float]:
    return measure(
        found, target, **{name: float(name == channel) for name in ("left", "right", "mid", "side")}
    )


def tones(detune: float = 1.0, samples: int = 12_000) -> Tensor:
    """Some partials, different on both sides [1, 2, samples]."""
    times = torch.arange(samples) / RATE_HZ
    left = sum(torch.sin(2 * math.pi * 220 * detune * k * times + k) / k for k in range(1, 12))
    right = sum(torch.sin(2 * math.pi * 330 * detune * k * times) / k for k in range(1, 12))
    return 0.1 * torch.stack([torch.as_tensor(left), torch.as_tensor(right)])[None]


@pytest.fixture(scope="module")
def wave() -> Tensor:
    torch.manual_seed(0)
    return tones() + 0.003 * torch.randn(1, 2, 12_000)


@pytest.mark.parametrize("frequency_hz", [20, 40, 100, 500, 1000, 2000, 5000, 12_000, 20_000])
def test_the_filter_has_the_response_of_the_biquads(frequency_hz):
    wanted = 0.0
    for numerator, denominator in K_WEIGHTING:
        _, response = freqz(numerator, denominator, worN=[frequency_hz], fs=RATE_HZ)
        wanted += 20 * math.log10(abs(response[0]))
    taps = KWeighting().response.double()
    angles = 2 * math.pi * frequency_hz / RATE_HZ * torch.arange(len(taps), dtype=torch.double)
    found = torch.polar(taps, -angles).sum().abs()
    assert 20 * math.log10(found) == pytest.approx(wanted, abs=0.1)


def test_almost_no_energy_is_cut_off():
    short, long = KWeighting().response, KWeighting(taps=48_000).response
    assert long[len(short) :].square().sum() < 1e-6 * long.square().sum()


def test_the_filtered_level_of_a_tone_is_its_loudness():
    tone = 0.2 * torch.sin(2 * math.pi * 100 * torch.arange(2 * RATE_HZ) / RATE_HZ)
    power = KWeighting()(tone)[RATE_HZ:].square().mean()
    assert -0.691 + 10 * math.log10(power) == pytest.approx(measure_loudness(tone[None]), abs=0.1)
    # BS.1770-4: a full-scale sine of 997 Hz has -3.01 LUFS.
    sine = torch.sin(2 * math.pi * 997 * torch.arange(RATE_HZ) / RATE_HZ)
    power = KWeighting()(sine)[RATE_HZ // 2 :].square().mean()
    assert -0.691 + 10 * math.log10(power) == pytest.approx(-3.01, abs=0.02)


def test_equal_waves_have_no_loss_and_silence_has_a_finite_one(wave):
    assert all(value == pytest.approx(0, abs=1e-5) for value in measure(wave, wave).values())
    silence = torch.zeros_like(wave).requires_grad_()
    for found, target in ((silence, wave), (wave.clone().requires_grad_(), torch.zeros_like(wave))):
        losses = WaveformLosses(WaveformLossConfig(fft_sizes=FFT_SIZES))(found, target)
        losses["reconstruction"].backward()
        assert all(value.isfinite() for value in losses.values())
        assert found.grad is not None and found.grad.isfinite().all()
        assert losses["reconstruction"] > 0.5


def test_magnitudes_notice_levels_and_phases_do_not(wave):
    rows = [measure(wave * 10 ** (db / 20), wave) for db in (1, 3, 6)]
    for name in MAGNITUDES:
        assert 0.01 < rows[0][name] < rows[1][name] < rows[2][name]
    assert all(row[name] == pytest.approx(0, abs=1e-3) for row in rows for name in PHASES)
    # 3 dB on each of four channels of weight one half.
    assert rows[1]["convergence"] == pytest.approx(2 * (10 ** (3 / 20) - 1), rel=0.02)


def test_only_the_correlation_notices_the_polarity(wave):
    row = measure(-wave, wave)
    assert row["correlation"] == pytest.approx(2, abs=1e-4)
    assert all(row[name] == pytest.approx(0, abs=1e-3) for name in (*MAGNITUDES, "frequency", "group_delay"))


def test_phases_notice_a_delay(wave):
    same, one, five = (measure(wave.roll(shift, dims=-1), wave) for shift in (0, 1, 5))
    for name in PHASES:
        assert same[name] + 1e-3 < one[name] < five[name]
    # A delay of one sample turns the phase of neighbouring bins by 2 pi / FFT size against each other.
    torch.manual_seed(0)
    noise = 0.1 * torch.randn(1, 2, 12_000)
    alone = WaveformLosses(WaveformLossConfig(fft_sizes=(64,)))
    assert alone(noise.roll(1, dims=-1), noise)["group_delay"].item() == pytest.approx(
        2 * math.pi / 64, rel=0.25
    )


def test_detuning_raises_every_loss(wave):
    rows = [measure(tones(2 ** (cents / 1200)), tones()) for cents in (0, 5, 50)]
    for name in (*MAGNITUDES, "frequency", "correlation"):
        assert rows[0][name] + 1e-3 < rows[1][name] < rows[2][name], name
    assert rows[1]["group_delay"] > rows[0]["group_delay"] + 1e-3


def test_errors_count_as_the_ear_hears_them():
    torch.manual_seed(0)
    noise = 0.01 * torch.randn(1, 2, 24_000)
    times = torch.arange(24_000) / RATE_HZ
    errors = [0.1 * torch.sin(2 * math.pi * frequency_hz * times) for frequency_hz in (40, 3000)]
    rumble, whistle = (measure(noise + error, noise)["convergence"] for error in errors)
    assert whistle > 2 * rumble


def test_swapped_sides_are_noticed_on_the_sides_alone(wave):
    for name in MAGNITUDES:
        assert min(of_channel(side, wave.flip(1), wave)[name] for side in ("left", "right")) > 0.1
        assert max(of_channel(sum_, wave.flip(1), wave)[name] for sum_ in ("mid", "side")) < 1e-3
    assert measure(wave.flip(1), wave)["correlation"] > 0.5
    # Phases are of left and right alone: in a nearly mono sound nothing tells that the side is upside down.
    narrow = wave.mean(dim=1, keepdim=True) + 0.01 * wave
    assert measure(narrow.flip(1), narrow)["correlation"] < 0.01


def test_a_lost_side_is_noticed_by_the_side(wave):
    mono = wave.mean(dim=1, keepdim=True).expand(-1, 2, -1)
    assert of_channel("mid", mono, wave)["convergence"] < 1e-3
    assert of_channel("side", mono, wave)["convergence"] > 0.5
    # A side of rounding errors weighs no more than its share of the sound.
    assert of_channel("side", mono * torch.tensor([1.0, 1.001])[:, None], mono)["convergence"] < 0.01


def test_the_phase_of_silence_does_not_count():
    torch.manual_seed(0)
    loud = tones().clone()
    loud[..., 6000:] = 0
    other = loud.clone()
    other[..., 7000:] += 1e-6 * torch.randn(1, 2, 5000)
    row = measure(other, loud)
    assert all(row[name] < 1e-3 for name in PHASES)


@pytest.mark.parametrize("name", ["convergence", "magnitude", "frequency", "group_delay", "correlation"])
def test_every_loss_leads_to_its_wave(wave, name):
    torch.manual_seed(1)
    found = (wave + 0.01 * torch.randn_like(wave)).requires_grad_()
    losses = WaveformLosses(WaveformLossConfig(fft_sizes=FFT_SIZES))
    before = losses(found, wave)[name]
    (gradient,) = torch.autograd.grad(before, found)
    after = losses(found - 0.001 * gradient / gradient.square().mean().sqrt(), wave)[name]
    assert after < before - 1e-4


def test_the_weighted_sum_is_what_is_told(wave):
    found = wave.roll(3, dims=-1) * 0.7
    weights = {name: 0.1 * (n + 1) for n, name in enumerate((*MAGNITUDES, *PHASES))}
    row = measure(found, wave, **weights)
    assert row["reconstruction"] == pytest.approx(sum(weights[name] * row[name] for name in weights))


def test_divergence_is_that_of_torch():
    torch.manual_seed(0)
    mean, deviation = torch.randn(2, 3, 5), torch.rand(2, 3, 5) + 0.1
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(divergence(mean, deviation), wanted.sum(dim=1).mean())


def test_discriminators_judge_each_wave_of_a_batch():
    torch.manual_seed(0)
    small = DiscriminatorConfig(periods=(2, 5), period_width=2, fft_sizes=(128, 64), band_width=4)
    discriminators = Discriminators(small)
    waves = 0.1 * torch.randn(3, 2, 1203)
    judged = discriminators(waves)
    assert len(judged) == 4 and all(one.logits.shape[:2] == (3, 1) for one in judged)
    assert [len(one.features) for one in judged] == [5, 5, 25, 25]
    # Each wave by itself, and both sides: another right one is another judgement.
    alone = discriminators(waves[1:2])
    other = discriminators(torch.stack([waves[1:2, 0], -waves[1:2, 1]], dim=1))
    for one, same, changed in zip(judged, alone, other, strict=True):
        torch.testing.assert_close(one.logits[1:2], same.logits)
        assert not torch.allclose(same.logits, changed.logits)


def test_discriminators_learn_to_tell_a_tone_from_noise():
    torch.manual_seed(0)
    one_each = DiscriminatorConfig(periods=(2,), period_width=2, fft_sizes=(128,), band_width=4)
    discriminators = Discriminators(one_each)
    tone = 0.3 * torch.sin(2 * math.pi * 440 * torch.arange(1200) / RATE_HZ).expand(2, 2, -1)
    noise = 0.2 * torch.randn(2, 2, 1200)
    optimizer = torch.optim.AdamW(discriminators.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        discriminator_loss(discriminators(tone), discriminators(noise)).backward()
        optimizer.step()
    real, other = discriminators(tone), discriminators(noise)
    # 0.5 is what one that cannot tell gets.
    assert all(discriminator_loss([a], [b]) < 0.25 for a, b in zip(real, other, strict=True))


def test_adversarial_losses_by_hand():
    real = [Judgement(torch.tensor([1.0, 0.5]), [torch.tensor([2.0, -2.0])])]
    rebuilt = [Judgement(torch.tensor([0.0, 1.0]), [torch.tensor([1.0, -2.0])])]
    assert discriminator_loss(real, rebuilt).item() == pytest.approx(0.125 + 0.5)
    assert adversarial_loss(rebuilt).item() == pytest.approx(0.5)
    assert feature_matching_loss(real, rebuilt).item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: WaveformLossConfig(fft_sizes=()), "loss.fft_sizes"),
        (lambda: WaveformLossConfig(fft_sizes=(1001,)), "loss.fft_sizes"),
        (lambda: WaveformLossConfig(side=-1), "loss.side must not be negative, got -1"),
        (lambda: WaveformLossConfig(kl=math.nan), "loss.kl"),
        (lambda: DiscriminatorConfig(periods=(), fft_sizes=()), "need periods or fft_sizes"),
        (lambda: DiscriminatorConfig(periods=(0,)), "periods must be at least 1"),
        (lambda: DiscriminatorConfig(fft_sizes=(32,)), "fft_sizes must be multiples of 4 from 64"),
        (lambda: DiscriminatorConfig(band_width=0), "band_width must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(make, told):
    with pytest.raises(ConfigError, match=told) as refusal:
        make()
    assert "\n" not in str(refusal.value)
