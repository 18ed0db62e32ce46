"""Chroma that a decoder foretells: how it is heard, and that what is drawn follows it where it may."""

import pytest
import torch
from torch import Tensor

from duotok.recipes.accompany.bundle import default_bundle, load_bundle
from duotok.renderer.diffusion import DiffusionDecoder, DiffusionDecoderConfig
from duotok.renderer.foretold_chroma import ChromaHead, correlate, follow_chroma, sounding
from duotok.tokenizer.music.chroma import correlate_chroma, measure_chroma
from duotok.tokenizer.spectra import Chroma

RATE = 48_000
CHANNELS = 12


@pytest.fixture(scope="module")
def bundle():
    torch.set_num_threads(1)
    return load_bundle(default_bundle())


def play(pitches: list[int], seconds: float = 2.0) -> Tensor:
    """A chord with a few partials, in the middle: [2, samples]."""
    times = torch.arange(round(seconds * RATE)) / RATE
    wave = torch.zeros(len(times))
    for pitch in pitches:
        frequency = 440 * 2 ** ((pitch - 69) / 12)
        wave += sum(torch.sin(2 * torch.pi * k * frequency * times) / k**2 for k in range(1, 5)) * 0.08
    return wave.expand(2, -1).contiguous()


def hear_channels(latents: Tensor) -> Tensor:
    """A chroma that latents simply are."""
    return latents.transpose(1, 2).exp()


def test_likeness_knows_neither_level_nor_scale():
    chroma = torch.rand(3, 7, 12)
    torch.testing.assert_close(correlate(chroma, 3 * chroma - 2), torch.ones(3, 7), atol=1e-4, rtol=0)
    torch.testing.assert_close(correlate(chroma, -chroma), -torch.ones(3, 7), atol=1e-4, rtol=0)
    assert not correlate(chroma, torch.full((3, 7, 12), 0.5)).any()


@torch.no_grad()
@pytest.mark.parametrize("pitches", [[60, 64, 67], [57, 60, 64], [62, 65, 69, 72]])
def test_chroma_of_latents_is_that_of_their_sound(bundle, pitches):
    wave = play(pitches)
    heard = bundle.renderer.vae.hear_chroma(bundle.renderer.vae.encode(wave[None]))
    assert heard.shape == (1, 100, 12) and sounding(heard).all()
    middle = heard[0, 20:80].mean(dim=0)
    assert set(middle.topk(len(pitches)).indices.tolist()) == {pitch % 12 for pitch in pitches}
    true = Chroma()(wave.mean(dim=0, keepdim=True))
    assert correlate(heard, true)[:, 20:80].mean() > 0.8


@torch.no_grad()
def test_silence_has_no_harmony(bundle):
    vae = bundle.renderer.vae
    assert not sounding(vae.hear_chroma(vae.encode(torch.zeros(1, 2, RATE)))).any()


def test_what_is_drawn_follows_but_for_what_is_held():
    torch.manual_seed(0)
    latents = torch.randn(2, CHANNELS, 20)
    wanted = torch.rand(2, 1, 12).expand(2, 20, 12)  # a chord for as long as it lasts
    free = torch.ones(2, 1, 20)
    free[:, :, :5] = 0
    with torch.inference_mode():  # as in a command
        moved = follow_chroma(latents, wanted, hear_channels, free)
        again = follow_chroma(latents, wanted, hear_channels, free)
    assert torch.equal(moved, again) and not moved.is_inference()
    assert torch.equal(moved[:, :, :5], latents[:, :, :5])
    before, after = (correlate(hear_channels(each), wanted) for each in (latents, moved))
    assert after[:, 5:].mean() > before[:, 5:].mean() + 0.2
    there = follow_chroma(latents, hear_channels(latents), hear_channels, free)
    assert (there - latents).abs().max() < 0.05  # no further than needed


def test_silent_frames_stay_as_they_are_and_the_way_is_smooth():
    torch.manual_seed(0)
    latents = 0.1 * torch.randn(1, CHANNELS, 80)
    latents[:, :, :40] -= 20
    moved = follow_chroma(latents, torch.rand(1, 80, 12), hear_channels, torch.ones(1, 1, 80))
    way = (moved - latents)[0]
    assert way[:, :30].abs().max() < 1e-2 and (way[:, 45:].abs().amax(dim=0) > 0.1).all()
    assert way[:, 45:].diff(dim=1).std() < 0.6 * way[:, 45:].std()  # 1.4 of what knows no neighbours


def test_chroma_head_hears_what_is_near():
    torch.manual_seed(0)
    head, hidden = ChromaHead(8, 2), torch.randn(1, 30, 8)
    other = hidden.clone()
    other[:, 15] += 1
    changed = (head(hidden) - head(other)).abs().sum(dim=-1)[0] > 1e-6
    assert head(hidden).shape == (1, 60, 12)
    assert changed.nonzero()[:, 0].tolist() == list(range(2 * 13, 2 * 18))


def make_decoder(*, foretells_chroma: bool) -> DiffusionDecoder:
    torch.manual_seed(0)
    decoder = DiffusionDecoder(
        DiffusionDecoderConfig(
            feature_dim=12, latent_dim=CHANNELS, dim=16, heads=2, feed_forward_dim=24, blocks=1,
            condition_blocks=1, patch_frames=2, window_seconds=0.5, foretells_chroma=foretells_chroma,
        )
    ).eval()  # fmt: skip
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_decoder_that_foretells_is_followed(guidance):
    torch.manual_seed(2)
    features, known = torch.randn(2, 40, 12), torch.ones(2, 12, 3)
    decoder = make_decoder(foretells_chroma=True)
    settings = {"steps": 2, "guidance": guidance, "known_latents": known}
    plain, moved = (
        decoder.sample(features, **settings, hear=hear, generator=torch.Generator().manual_seed(1))
        for hear in (None, hear_channels)
    )
    wanted = decoder.encode_condition(features).chroma
    assert wanted is not None
    before, after = (correlate(hear_channels(each), wanted)[:, 8:].mean() for each in (plain, moved))
    assert after > before + 0.1
    assert torch.equal(moved[:, :, :3], known)
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_a_decoder_that_foretells_nothing_draws_as_ever():
    decoder, features = make_decoder(foretells_chroma=False), torch.randn(1, 9, 12)
    plain, heard = (
        decoder.sample(features, steps=2, guidance=1.0, hear=hear, generator=torch.Generator().manual_seed(1))
        for hear in (None, hear_channels)
    )
    assert torch.equal(plain, heard)


def test_the_shipped_band_plays_the_harmony_that_it_foretells(bundle, monkeypatch):
    wave = torch.cat([play(chord, 1.5) for chord in ([57, 60, 64], [53, 57, 60], [55, 59, 62])], dim=1)
    codes = bundle.tokenizer.encode(wave[None], "accompaniment")
    features = bundle.tokenizer.features(codes, "accompaniment")[0]
    decoder = bundle.renderer.decoders["accompaniment"]
    with torch.no_grad():
        wanted = decoder.encode_condition(features[None]).chroma
    found = {}
    for name in ("plain", "moved"):
        if name == "plain":
            monkeypatch.setattr(type(bundle.renderer.vae), "hear_chroma", None)
        with torch.inference_mode():
            latents = bundle.renderer.render_latents(features, steps=4, guidance=1.0, seed=0)
            sound = bundle.renderer.decode(latents, wave.shape[1])
        monkeypatch.undo()
        found[name] = correlate_chroma(wanted[0].double().numpy(), measure_chroma(sound))
    assert found["moved"] > found["plain"] + 0.02
