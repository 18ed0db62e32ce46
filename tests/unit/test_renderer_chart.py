"""The chart beside the features: what a decoder makes of it, and that every part of a song hears its own."""

import numpy as np
import pytest
import torch

from duotok.lm.sheet.columns import CHART, CHORD, DRUMS, STYLE, unknown_sheet
from duotok.recipes.accompany.bundle import load_bundle
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.lm.sheets import write_chart
from duotok.renderer.chart import COLUMNS, LEVELS, UNKNOWN, ChartEmbedding, check_chart, column_sizes
from duotok.renderer.diffusion import DiffusionDecoder, DiffusionDecoderConfig, Known
from duotok.renderer.diffusion_path import Solver
from duotok.renderer.renderer import plan_windows
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import CHORDS

STYLES = ("ballad", "rock", "waltz")


def make_decoder(styles=STYLES) -> DiffusionDecoder:
    torch.manual_seed(0)
    decoder = DiffusionDecoder(
        DiffusionDecoderConfig(
            feature_dim=12, latent_dim=6, dim=16, heads=2, feed_forward_dim=24, blocks=1, condition_blocks=1,
            patch_frames=2, window_seconds=0.5, styles=styles,
        )
    ).eval()  # fmt: skip
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return decoder


def draw_chart(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = column_sizes(len(STYLES))
    return torch.stack([torch.randint(size, shape, generator=generator) for size in sizes], dim=-1)


def sample(decoder, features, **settings):
    generator = torch.Generator().manual_seed(3)
    return decoder.sample(features, steps=2, **{"guidance": 1.0, **settings}, generator=generator)


def test_a_chart_says_nothing_before_it_is_learned():
    embedding = ChartEmbedding(8, STYLES)
    assert not embedding(draw_chart(2, 7)).any()


def test_every_column_is_heard_and_unknown_is_no_chart():
    decoder, features = make_decoder(), torch.randn(2, 9, 12)
    untold = sample(decoder, features)
    unknown = torch.full((2, 9, COLUMNS), UNKNOWN)
    torch.testing.assert_close(sample(decoder, features, chart=unknown), untold)
    chart = draw_chart(2, 9)
    for column in range(COLUMNS):
        told = torch.full_like(chart, UNKNOWN)
        told[..., column] = chart[..., column]
        assert not torch.allclose(untold, sample(decoder, features, chart=told))


def test_a_chart_holds_for_its_own_frames():
    decoder, features = make_decoder(), torch.randn(1, 200, 12)
    chart = draw_chart(1, 200)
    changed = chart.clone()
    changed[:, 150:] = UNKNOWN
    first, second = (sample(decoder, features, chart=each) for each in (chart, changed))
    reach = 2 * 13 + 2  # frames that blocks of half a second see to each side
    assert torch.allclose(first[..., : 2 * (150 - reach)], second[..., : 2 * (150 - reach)], atol=1e-5)
    assert not torch.allclose(first[..., 300:], second[..., 300:], atol=1e-3)


def test_guidance_takes_the_chart_from_those_who_hear_no_features():
    decoder, features, chart = make_decoder(), torch.randn(1, 9, 12), draw_chart(1, 9)
    dropped = torch.tensor([True])
    blind = decoder.encode_condition(features, dropped, chart)
    other = decoder.encode_condition(torch.randn(1, 9, 12), dropped)
    torch.testing.assert_close(blind.hidden, other.hidden)
    told = sample(decoder, features, chart=chart, guidance=2.0)
    assert not torch.allclose(told, sample(decoder, features, guidance=2.0))


def test_a_chart_is_followed_as_if_it_said_three_times_as_much():
    decoder, features, chart = make_decoder(), torch.randn(1, 9, 12), draw_chart(1, 9)
    noise = torch.randn(1, 6, 18, generator=torch.Generator().manual_seed(3))
    nothing = Known(latents=torch.zeros(1, 6, 18), mask=torch.zeros(1, 1, 18))
    told = decoder.encode_condition(features, chart=chart)
    untold, blind = (decoder.encode_condition(features, dropped) for dropped in (None, torch.tensor([True])))
    answers = [decoder(noise, torch.ones(1), each, nothing) for each in (told, untold, blind)]
    expected = answers[1] + 3 * (answers[0] - answers[1])
    for guidance in (1.0, 3.0):
        if guidance != 1:
            expected = answers[2] + guidance * (expected - answers[2])
        end = Solver("flow", 1).step(expected, 0, noise, told.mean, told.deviation)
        generator = torch.Generator().manual_seed(3)
        found = decoder.sample(features, steps=1, guidance=guidance, generator=generator, chart=chart)
        torch.testing.assert_close(found, decoder.denormalize(end), atol=1e-4, rtol=1e-4)


def test_a_decoder_without_styles_ignores_charts():
    decoder, features = make_decoder(styles=()), torch.randn(1, 9, 12)
    assert decoder.chart is None
    assert torch.equal(sample(decoder, features), sample(decoder, features, chart=draw_chart(1, 9)))


def test_styles_are_stored_with_the_decoder(tmp_path):
    decoder = make_decoder()
    decoder.save_pretrained(tmp_path / "decoder")
    loaded = DiffusionDecoder.from_pretrained(tmp_path / "decoder")
    assert loaded.config.styles == STYLES
    features, chart = torch.randn(1, 9, 12), draw_chart(1, 9)
    assert torch.equal(sample(decoder, features, chart=chart), sample(loaded, features, chart=chart))


@pytest.mark.parametrize(
    ("column", "value"), [(0, CHORDS), (1, len(STYLES)), (2, LEVELS), (3, -2), (4, LEVELS)]
)
def test_what_no_chart_can_say_is_one_line(column, value):
    chart = draw_chart(1, 9)
    assert check_chart(chart, 9, len(STYLES)) is chart
    chart[0, 4, column] = value
    with pytest.raises(DataError, match=f"column {column} of a chart must be in -1"):
        sample(make_decoder(), torch.randn(1, 9, 12), chart=chart)


def test_a_chart_of_another_length_is_refused():
    with pytest.raises(DataError, match=r"not \[..., 9, 5\]; cut it alike"):
        sample(make_decoder(), torch.randn(1, 9, 12), chart=draw_chart(1, 8))


def test_each_window_of_a_song_is_told_its_own_part(tiny_bundle, monkeypatch):
    renderer = load_bundle(tiny_bundle).renderer
    decoder, frames = renderer.decoders["accompaniment"], 1600
    chart = torch.full((frames, COLUMNS), UNKNOWN)
    chart[:, 0] = torch.arange(frames) % CHORDS
    heard, original = [], decoder.sample

    def listen(features, **settings):
        heard.append(settings["chart"][0])
        return original(features, **settings)

    monkeypatch.setattr(decoder, "sample", listen)
    features = torch.randn(frames, decoder.config.feature_dim)
    renderer.render_latents(features, steps=1, guidance=1.0, seed=0, chart=chart)
    windows = plan_windows(frames)
    assert len(windows) > 1
    for window, part in zip(windows, heard, strict=True):
        assert torch.equal(part, chart[window.start : window.stop])


def test_a_style_is_known_to_the_decoder_by_its_name(tiny_bundle):
    bundle = load_bundle(tiny_bundle)
    assert bundle.lm.band.styles == ("ballad", "rock", "waltz")
    assert bundle.renderer.styles == ("swing", "rock", "ballad")
    sheet = unknown_sheet(4)
    sheet[:, STYLE] = torch.tensor([0, 1, 2, UNKNOWN])
    sheet[:, CHORD], sheet[:, DRUMS] = 7, 3
    before = sheet.clone()
    chart = bundle.chart(sheet)
    assert chart[:, 1].tolist() == [2, 1, UNKNOWN, UNKNOWN]  # its waltz is none of the decoder's
    assert chart[:, 0].tolist() == [7] * 4 and chart[:, 2].tolist() == [3] * 4
    assert torch.equal(sheet, before) and chart.shape == (4, len(CHART))
    assert bundle.chart(None) is None


def test_a_song_is_rendered_from_what_its_band_was_told(tiny_bundle, monkeypatch):
    accompanist = Accompanist.from_pretrained(tiny_bundle)
    decoder = accompanist.bundle.renderer.decoders["accompaniment"]
    told, original = [], decoder.sample

    def listen(features, **settings):
        told.append(settings["chart"][0])
        return original(features, **settings)

    monkeypatch.setattr(decoder, "sample", listen)
    time = np.arange(6 * 48_000) / 48_000
    wave = torch.from_numpy(0.3 * np.sin(2 * np.pi * 220 * time) * (1 + np.sin(2 * np.pi * 2 * time))).float()
    made = accompanist.accompany(
        wave.repeat(2, 1), seed=1, candidates=1, style="rock", without=("drums",), chords=None
    )
    (chart,) = told
    assert len(chart) == len(made.codes)
    assert set(chart[:, 1].tolist()) == {1} and set(chart[:, 2].tolist()) == {0}
    assert set(chart[:, 0].tolist()) != {UNKNOWN}


def test_the_chart_of_an_item_is_its_score(tiny_corpus):
    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.tokenizer.music.labels import chords_of_blocks

    item = read_manifest(tiny_corpus / "train.jsonl")[0]
    frames = round(item.seconds * 25)
    chart = write_chart(item, 25.0, ("none of these", item.style), frames=frames)
    assert chart.shape == (frames, COLUMNS)
    expected = chords_of_blocks(item.chords, len(chart), 25.0)
    assert chart[:, 0].tolist() == expected.tolist()
    assert set(chart[:, 1].tolist()) == {1}
    check_chart(chart, len(chart), 2)
    cut = write_chart(item, 25.0, ("none of these", item.style), frames=frames, start=7)
    assert torch.equal(cut[:-7], chart[7:]) and (cut[-7:] == UNKNOWN).all()
