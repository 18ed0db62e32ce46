"""Pruning drops rare codes and changes nothing for the others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duotok.recipes.lm.tokens import TokenIndex, append_shard
from duotok.recipes.tokenizer import prune as module
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig


@pytest.fixture
def tokenizer(tmp_path: Path, make_small_tokenizer: Callable[..., DuoTokenizer]) -> DuoTokenizer:
    return make_small_tokenizer(tmp_path / "tokenizer")


def test_frequent_codes_stay_what_they_were(tokenizer: DuoTokenizer) -> None:
    wave = torch.randn(1, 2, 96_000, generator=torch.Generator().manual_seed(1)) * 0.1
    route = tokenizer.route("vocal")
    with torch.no_grad():  # codes where the features are, so that many of them are used
        mel = tokenizer.normalize(tokenizer.log_mel(wave.mean(dim=1)))
        route.quantizer.fit_to(route.project_in(tokenizer.encoder(mel)[0]))
    before = tokenizer.encode(wave, "vocal")[0]
    counts = {"vocal": torch.full((11,), 40), "accompaniment": torch.full((13,), 40)}
    rare = int(before[0])
    counts["vocal"][rare] = 9  # less than a quarter of an even share
    pruned = module.prune(tokenizer, counts)
    assert (pruned.codebook_size("vocal"), pruned.codebook_size("accompaniment")) == (10, 13)
    after = pruned.encode(wave, "vocal")[0]
    stays = before != rare
    assert stays.any() and not stays.all()
    assert torch.equal(after[stays], before[stays] - (before[stays] > rare).long())
    # The others go to the nearest code that is left.
    vectors = tokenizer.code_vectors("vocal")
    left = [code for code in range(11) if code != rare]
    torch.testing.assert_close(pruned.code_vectors("vocal"), vectors[left])
    assert torch.equal(pruned.encode(wave, "accompaniment"), tokenizer.encode(wave, "accompaniment"))


def test_command(tokenizer: DuoTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, fingerprint in (("tokens", str(tokenizer.fingerprint)), ("other", "f" * 16)):
        sizes = {"vocal": 11, "accompaniment": 13}
        index = TokenIndex(tokenizer_fingerprint=fingerprint, codebook_sizes=sizes, frame_rate_hz=25.0)
        codes = {"vocal": torch.arange(130) % 10, "accompaniment": torch.arange(130) % 13}
        append_shard(tmp_path / name, index, {"a": ("a", "train", codes)})
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "pruned")]
    assert module.main([*options, "--tokens", str(tmp_path / "other")]) == 1
    assert "made by the tokenizer ffffffffffffffff" in capsys.readouterr().err
    assert module.main([*options, "--tokens", str(tmp_path / "tokens")]) == 0
    assert "vocal: 10 of 11 codes, accompaniment: 13 of 13 codes" in capsys.readouterr().out
    pruned = DuoTokenizer.from_pretrained(tmp_path / "pruned")
    assert pruned.config.vocal_codes == 10 and pruned.fingerprint != tokenizer.fingerprint
    assert module.main([*options, "--tokens", str(tmp_path / "tokens"), "--least", "1"]) == 1
    assert "least share" in capsys.readouterr().err


def test_a_shared_codebook_is_left_alone() -> None:
    settings = dict(mel_bands=16, dim=16, heads=2, feed_forward_dim=16, blocks=1, attention_window=4)
    settings |= dict(code_dim=4, vocal_codes=11, accompaniment_codes=11, head_dim=8, shared_codebook=True)
    with pytest.raises(ConfigError, match="share a codebook"):
        module.prune(DuoTokenizer(DuoTokenizerConfig(**settings)), {})
