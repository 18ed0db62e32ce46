import math

import pytest
import torch

from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.simvq import SimVQ


def make_quantizer() -> SimVQ:
    torch.manual_seed(0)
    return SimVQ(codebook_size=64, code_dim=4)


def test_codes_are_the_nearest_entries():
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


def test_basis_is_frozen_and_map_learns():
    quantizer = make_quantizer()
    assert {name for name, _ in quantizer.named_parameters()} == {"map.weight", "map.bias"}
    quantizer(torch.randn(1, 5, 4)).commitment.backward()
    assert quantizer.map.weight.grad is not None and quantizer.map.weight.grad.abs().sum() > 0


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
