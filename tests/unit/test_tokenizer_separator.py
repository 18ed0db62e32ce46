"""The separator: stems that sum to the mixture, masks that follow the truth, chunks without seams."""

import pytest
import torch

from duotok.tokenizer import separator as module
from duotok.tokenizer.common.errors import AudioError, ConfigError
from duotok.tokenizer.heads import STEMS, ideal_ratio_masks
from duotok.tokenizer.model import DuoTokenizerConfig
from duotok.tokenizer.separator import MaskSeparator, SeparationObjective, SeparatorConfig, fine_bands

TINY = DuoTokenizerConfig(
    mel_bands=32, dim=32, heads=2, feed_forward_dim=32, blocks=1, attention_window=3, code_dim=4,
    vocal_codes=8, accompaniment_codes=8, head_dim=16, mask_head=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def separator() -> MaskSeparator:
    torch.manual_seed(0)
    return MaskSeparator(SeparatorConfig(tokenizer=TINY, channels=4, scales=3, coarse_bands=16)).eval()


def noise(seconds: float, channels: int = 2) -> torch.Tensor:
    return 0.1 * torch.randn(channels, round(seconds * 48_000), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("samples", [1, 1919, 1920, 100_001])
def test_stems_sum_to_the_mixture(separator, samples):
    wave = noise(3)[:, :samples]
    stems = separator.separate(wave)
    assert tuple(stems) == STEMS
    torch.testing.assert_close(sum(stems.values()), wave, atol=1e-6, rtol=0)
    assert all(stem.shape == wave.shape for stem in stems.values())


def test_chunks_give_the_stems_of_one_pass(separator, monkeypatch):
    wave = noise(5)
    whole = separator.separate(wave)
    monkeypatch.setattr(module, "CHUNK_FRAMES", 40)
    pieces = separator.separate(wave)
    for stem in STEMS:
        torch.testing.assert_close(pieces[stem], whole[stem], atol=2e-4, rtol=0)


def test_level_does_not_change_the_masks(separator):
    wave = noise(2)
    quiet, loud = separator.separate(wave * 0.1), separator.separate(wave)
    torch.testing.assert_close(quiet["vocal"] * 10, loud["vocal"], atol=1e-3, rtol=0)


def test_training_moves_the_masks_towards_the_stems():
    torch.manual_seed(0)
    separator = MaskSeparator(SeparatorConfig(tokenizer=TINY, channels=8, scales=2, coarse_bands=16))
    objective = SeparationObjective(separator)
    time = torch.arange(96_000) / 48_000
    stems = torch.zeros(1, 4, 96_000)
    stems[0, 0] = 0.1 * torch.sin(2 * torch.pi * 880 * time)
    stems[0, 2] = 0.1 * torch.sin(2 * torch.pi * 110 * time)
    trained = [p for p in objective.parameters() if p.requires_grad]
    assert len(trained) < len(list(objective.parameters()))  # the tokenizer is frozen
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    with torch.no_grad():
        first = {name: float(value) for name, value in objective(stems).items()}
    # Nothing plays drums: what the masks give them is all error, 30 dB over the floor at most.
    assert 0 < first["drums"] < 30 and -3 < first["vocal"] < 3
    for _ in range(70):
        loss = objective(stems)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first["total"] - 10
    found = separator.separate(stems.sum(dim=1))
    error = (found["vocal"] - stems[0, 0])[:, 8_000:-8_000].square().mean()
    assert error < 0.02 * stems[0, 0].square().mean()


def test_ideal_masks_are_shares_of_the_power():
    power = torch.tensor([[4.0, 0.0], [1.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    masks = ideal_ratio_masks(power)
    torch.testing.assert_close(masks[:, 0], torch.tensor([0.5, 0.125, 0.0, 0.375]))
    torch.testing.assert_close(masks[:, 1], torch.full((4,), 0.25))  # silence belongs to nobody


def test_bands_cover_every_bin_once():
    bands = fine_bands(16)
    assert (bands.sum(dim=1) == 1).all() and (bands.sum(dim=0) >= 1).all()


def test_bad_input_is_refused(separator):
    with pytest.raises(AudioError, match="channels, samples"):
        separator.separate(torch.zeros(2, 0))
    with pytest.raises(ConfigError, match="mask head"):
        SeparatorConfig(tokenizer=DuoTokenizerConfig())
    with pytest.raises(ConfigError, match="multiple of 32"):
        SeparatorConfig(tokenizer=TINY, scales=5, coarse_bands=16)
    with pytest.raises(ConfigError, match="positive"):
        SeparatorConfig(tokenizer=TINY, scales=0)
