import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig

torch.manual_seed(0)
TOKENIZER = DuoTokenizer(
    DuoTokenizerConfig(
        mel_bands=16, dim=16, heads=2, feed_forward_dim=16, blocks=1, attention_window=4, code_dim=4,
        vocal_codes=16, accompaniment_codes=16, head_dim=8,
    )
).eval()  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(1, 60_000), chunk=st.integers(1, 40), seed=st.integers(0, 99))
def test_length_and_vocabulary_hold_for_any_wave_and_chunk(samples, chunk, seed):
    wave = torch.randn(1, 1, samples, generator=torch.Generator().manual_seed(seed))
    TOKENIZER.CHUNK_FRAMES = chunk
    codes = TOKENIZER.encode(wave, "accompaniment")
    frames = math.ceil(samples / 1920)
    assert codes.shape == (1, frames)
    assert 0 <= int(codes.min()) and int(codes.max()) < 16
    read_out = TOKENIZER.read_out(codes, "accompaniment")
    assert read_out.mel.shape == (1, 4 * frames, 16)
    assert read_out.chroma.shape == (1, 2 * frames, 12)
    assert torch.isfinite(read_out.mel).all()
