import math

import pytest
import torch

from duotok.recipes.accompany.bundle import default_bundle
from duotok.tokenizer import quantizers
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import TRACKS, DuoTokenizer
from duotok.tokenizer.quantizers import PlainVQ, SimVQ


def make_quantizer(kind: type[SimVQ] | type[PlainVQ] = SimVQ):
    torch.manual_seed(0)
    return kind(codebook_size=64, code_dim=4)


@pytest.mark.parametrize("at_a_time", [2**25, 3 * 64])
def test_codes_are_the_nearest_entries(at_a_time, monkeypatch):
    monkeypatch.setattr(quantizers, "DISTANCES_AT_A_TIME", at_a_time)
    quantizer = make_quantizer()
    features = torch.randn(2, 10, 4)
    brute = torch.cdist(features, quantizer.entries()[None]).argmin(dim=-1)
    assert torch.equal(quantizer.encode(features), brute)
    assert torch.equal(quantizer(features).codes, brute)


def test_value_is_the_code_and_gradient_is_the_feature():
    quantizer = make_quantizer()
    features = torch.randn(1, 5, 4, requires_grad=True)
    out = quantizer(features)
    torch.testing.assert_close(out.vectors, quantizer.entries()[out.codes], atol=1e-6, rtol=0)
    out.vectors.sum().backward()
    torch.testing.assert_close(features.grad, torch.ones_like(features))


@pytest.mark.parametrize(("kind", "learned"), [(SimVQ, ["map.weight", "map.bias"]), (PlainVQ, ["basis"])])
def test_commitment_moves_the_features_and_the_codebook_loss_the_codes(kind, learned):
    quantizer = make_quantizer(kind)
    assert [name for name, _ in quantizer.named_parameters()] == learned
    features = torch.randn(1, 5, 4, requires_grad=True)
    out = quantizer(features)
    error = (features - quantizer.entries()[out.codes]).square().mean()
    torch.testing.assert_close(out.commitment, error)
    torch.testing.assert_close(out.codebook, error)
    out.commitment.backward()
    assert features.grad is not None and features.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    features.grad = None
    out.codebook.backward()
    assert features.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())


@pytest.mark.parametrize("track", TRACKS)
def test_codes_under_autocast_are_those_of_float32(track):
    route = DuoTokenizer.from_pretrained(default_bundle() / "tokenizer").route(track)
    entries = route.quantizer.entries().detach()
    torch.manual_seed(0)
    # Between two codes each, as the features of a song often are.
    pairs = torch.randint(len(entries), (2, 500))
    features = (entries[pairs].mean(dim=0) + 0.1 * torch.randn(500, entries.shape[1]))[None]
    plain = route.quantizer(features)
    with torch.autocast("cpu", torch.bfloat16):
        cast, encoded = route.quantizer(features), route.quantizer.encode(features)
    assert torch.equal(cast.codes, plain.codes) and torch.equal(encoded, plain.codes)
    assert torch.equal(cast.vectors, plain.vectors) and torch.equal(cast.usage, plain.usage)


def test_memory_is_bounded_with_many_codes(monkeypatch):
    """The largest tensor kept for the gradient holds far less than [frames, codebook_size]."""
    monkeypatch.setattr(quantizers, "DISTANCES_AT_A_TIME", 2**15)
    torch.manual_seed(0)
    quantizer = SimVQ(codebook_size=2048, code_dim=4)
    features = torch.randn(2, 100, 4, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = quantizer(features)
    assert max(kept) <= 2048 * 4
    out.usage.backward()
    gradient = features.grad
    monkeypatch.setattr(quantizers, "DISTANCES_AT_A_TIME", 2**25)
    features.grad = None
    whole = quantizer(features)
    whole.usage.backward()
    torch.testing.assert_close(out.usage, whole.usage)
    torch.testing.assert_close(features.grad, gradient)


def test_usage_is_zero_for_uniform_use_and_large_for_one_code():
    quantizer = make_quantizer()
    spread = quantizer(quantizer.entries()[None].detach().repeat(1, 4, 1)).usage
    single = quantizer(quantizer.entries()[:1].detach().expand(1, 50, 4) + 1e-3 * torch.randn(1, 50, 4)).usage
    assert float(spread) < 1.0 < float(single) <= math.log(64) + 1e-4


def test_fit_puts_every_code_where_features_are():
    torch.manual_seed(0)
    quantizer = SimVQ(codebook_size=64, code_dim=3)
    centres = 10 * torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    features = centres.repeat(20, 1) + 0.01 * torch.randn(1280, 3)
    quantizer.fit_to(features)
    codes = quantizer.encode(features[None])[0]
    assert len(codes.unique()) >= 60
    error = float((quantizer.entries()[codes].detach() - features).square().mean())
    assert error < 0.05 * float(features.var())
    with pytest.raises(ConfigError, match="at least as many frames"):
        quantizer.fit_to(features[:10])
