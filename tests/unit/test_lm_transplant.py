"""A language model taken over to another tokenizer keeps what it knows."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.recipes.lm import transplant as module
from duotok.recipes.lm.token_shards import TokenIndex, TokenShards, append_shard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import DuoTokenizer

SIZES = {"vocal": 11, "accompaniment": 13}


def write_tokens(folder: Path, fingerprint: str, songs: dict[str, dict[str, Tensor]]) -> TokenShards:
    index = TokenIndex(tokenizer_fingerprint=fingerprint, codebook_sizes=SIZES, frame_rate_hz=25.0)
    append_shard(folder, index, {name: (name, "train", codes) for name, codes in songs.items()})
    return TokenShards(folder)


def make_songs(count: int = 4) -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(5)
    return {
        f"song-{n}": {t: torch.randint(0, size, (200,)) for t, size in SIZES.items()} for n in range(count)
    }


def make_lm(tokenizer: DuoTokenizer) -> DualTrackLM:
    torch.manual_seed(1)
    settings = dict(embedding_dim=8, hidden_dim=16, layers=2, heads=4, key_value_heads=2, feed_forward_dim=24)
    lm = DualTrackLM.for_tokenizer(tokenizer, DualTrackLMConfig(**settings)).eval()
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return lm


def test_codes_under_other_numbers_are_predicted_alike(
    tmp_path: Path, make_small_tokenizer: Callable[..., DuoTokenizer]
) -> None:
    old, new = (make_small_tokenizer(tmp_path / name, seed) for seed, name in enumerate(("old", "new")))
    lm, songs = make_lm(old), make_songs()
    renamed = {t: torch.randperm(size) for t, size in SIZES.items()}
    others = {name: {t: renamed[t][c] for t, c in codes.items()} for name, codes in songs.items()}
    tokens = write_tokens(tmp_path / "a", str(old.fingerprint), songs)
    moved = module.transplant(
        lm, tokens, write_tokens(tmp_path / "b", str(new.fingerprint), others), new
    ).eval()
    assert moved.tokenizer_fingerprint == new.fingerprint != lm.tokenizer_fingerprint

    def stack(corpus: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        return {t: torch.stack([codes[t][:20] for codes in corpus.values()]) for t in SIZES}

    expected = lm(lm.lay_out(stack(songs), "vocal_to_accompaniment"))["accompaniment"]
    found = moved(moved.lay_out(stack(others), "vocal_to_accompaniment"))["accompaniment"]
    torch.testing.assert_close(found[..., renamed["accompaniment"]], expected, atol=1e-4, rtol=1e-4)


def test_a_code_that_was_never_met_is_as_its_nearest(
    tmp_path: Path, make_small_tokenizer: Callable[..., DuoTokenizer]
) -> None:
    lm = make_lm(make_small_tokenizer(tmp_path / "old", 0))
    moved = make_lm(make_small_tokenizer(tmp_path / "new", 1)).codes_of("vocal")
    counts = torch.eye(11).double()
    counts[3] = 0
    with torch.no_grad():
        module.move_codes(lm.codes_of("vocal"), moved, counts)
        embedded = moved.embed(torch.arange(12))
    met = [code for code in range(11) if code != 3]
    nearest = met[int(torch.cdist(moved.vectors[3:4], moved.vectors[met]).argmin())]
    torch.testing.assert_close(embedded[3], embedded[nearest], atol=1e-5, rtol=1e-5)


def test_command_and_what_it_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_small_tokenizer: Callable[..., DuoTokenizer]
) -> None:
    old, new = (make_small_tokenizer(tmp_path / name, seed) for seed, name in enumerate(("old", "new")))
    make_lm(old).save_pretrained(tmp_path / "lm")
    write_tokens(tmp_path / "a", str(old.fingerprint), make_songs())
    write_tokens(tmp_path / "b", str(new.fingerprint), make_songs())
    options = ["--lm", str(tmp_path / "lm"), "--tokenizer", str(tmp_path / "new")]
    options += ["--out", str(tmp_path / "out"), "--old-tokens", str(tmp_path / "a")]
    assert module.main([*options, "--tokens", str(tmp_path / "b")]) == 0
    assert DualTrackLM.from_pretrained(tmp_path / "out").tokenizer_fingerprint == new.fingerprint
    assert module.main([*options, "--tokens", str(tmp_path / "a")]) == 1
    assert "make them again" in capsys.readouterr().err
    strangers = write_tokens(tmp_path / "c", str(new.fingerprint), {"else": make_songs(1)["song-0"]})
    with pytest.raises(DataError, match="in common"):
        module.count_together(TokenShards(tmp_path / "a"), strangers)
