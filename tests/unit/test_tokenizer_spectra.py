import pytest
import torch

from duotok.tokenizer.spectra import TARGET_RMS, Chroma, LogMel, level_gain, mel_filterbank, stft_power


def sine(frequency_hz: float, seconds: float = 1.0, amplitude: float = 0.5) -> torch.Tensor:
    times = torch.arange(round(48_000 * seconds)) / 48_000
    return amplitude * torch.sin(2 * torch.pi * frequency_hz * times)[None]


def test_log_mel_is_aligned_and_peaks_at_the_sine():
    mel = LogMel(128)(sine(1000.0))
    assert mel.shape == (1, 100, 128)
    low = LogMel(128)(sine(200.0))[0, 50].argmax()
    high = LogMel(128)(sine(4000.0))[0, 50].argmax()
    assert low < mel[0, 50].argmax() < high
    assert abs(float(mel[0, 50].max()) - torch.log10(torch.tensor(0.5)).item()) < 0.2


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_power_in_pieces_is_that_of_one_pass(batch):
    wave = torch.randn(batch, 150 * 480, generator=torch.Generator().manual_seed(0)).requires_grad_()
    window = torch.hann_window(512)
    padded = torch.nn.functional.pad(wave.detach(), (256, 256))
    spectrum = torch.fft.rfft(padded.unfold(-1, 512, 480)[:, :150] * (window * (2 / window.sum())))[..., :99]
    power = stft_power(wave, window, 480, 99)
    torch.testing.assert_close(power, torch.view_as_real(spectrum).square().sum(dim=-1))
    power.sum().backward()
    assert wave.grad is not None and bool((wave.grad != 0).any(dim=0).float().mean() > 0.9)


def test_every_mel_band_hears_something():
    assert (mel_filterbank(160, 4096).sum(dim=0) > 0).all()


def test_chroma_names_the_pitch_class():
    for frequency, pitch_class in ((440.0, 9), (261.63, 0), (1174.66, 2)):
        chroma = Chroma()(sine(frequency))
        assert chroma.shape == (1, 50, 12)
        assert int(chroma[0, 25].argmax()) == pitch_class
        assert float(chroma[0, 25].max()) == 1.0


def test_chroma_of_silence_is_zero():
    assert Chroma()(torch.zeros(1, 9600)).abs().max() == 0


def test_level_gain_ignores_pauses_and_leaves_silence_alone():
    wave = torch.cat([sine(300.0, 2.0, 0.2), torch.zeros(1, 96_000)], dim=-1)
    gained = wave * level_gain(wave)
    assert abs(float(gained[:, :96_000].square().mean().sqrt()) - TARGET_RMS) < 0.02
    assert float(level_gain(torch.zeros(1, 48_000))) == 1.0
