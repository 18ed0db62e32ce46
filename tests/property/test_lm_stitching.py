"""Stitching windows: exact lengths, kept prefixes and a start that always moves on, for any lengths."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.sampling import next_window_start

torch.manual_seed(0)
LM = DualTrackLM(
    DualTrackLMConfig(
        vocal_codes=5, accompaniment_codes=7, code_dim=4, embedding_dim=4, hidden_dim=8, layers=1, heads=2,
        key_value_heads=1, feed_forward_dim=8,
    )
).eval()  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(1, 60),
    window=st.integers(1, 20),
    overlap=st.integers(0, 19),
    prefix=st.integers(0, 30),
    seed=st.integers(0, 2**31),
)
def test_length_and_prefix(frames: int, window: int, overlap: int, prefix: int, seed: int) -> None:
    overlap = min(overlap, window - 1)
    vocal, given_codes = torch.arange(frames) % 5, torch.arange(prefix) % 7
    sampling = SamplingConfig(window_frames=window, overlap_frames=overlap)
    codes = LM.compose(vocal, seeds=[seed], sampling=sampling, prefix=given_codes).codes[0]
    assert codes.shape == (frames,)
    assert codes.dtype == torch.int64
    kept = min(frames, prefix)
    assert torch.equal(codes[:kept], given_codes[:kept])
    assert 0 <= int(codes.min()) <= int(codes.max()) < 7


@settings(max_examples=200, deadline=None)
@given(
    frames=st.integers(1, 5000),
    done=st.integers(0, 4999),
    window=st.integers(1, 900),
    overlap=st.integers(0, 899),
)
def test_windows_move_on_and_keep_their_past(frames: int, done: int, window: int, overlap: int) -> None:
    overlap, done = min(overlap, window - 1), min(done, frames - 1)
    config = SamplingConfig(window_frames=window, overlap_frames=overlap)
    start = next_window_start(done, frames, config)
    assert 0 <= start <= done < start + window  # something new fits
    assert done - start >= min(done, overlap)  # at least the overlap is seen
