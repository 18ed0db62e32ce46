"""Reading TensorFlow's checkpoints without TensorFlow, and musicnn's network on them."""

import struct

import numpy as np
import pytest
import torch

pytest.importorskip("librosa")
from duotok.recipes.evaluation import music_features  # noqa: E402
from duotok.recipes.evaluation.music_features import MusicFeatures  # noqa: E402
from duotok.recipes.evaluation.tensor_bundle import read_tensor_bundle  # noqa: E402
from duotok.tokenizer.common.errors import DataError  # noqa: E402

MAGIC = 0xDB4775248B80FB57


def varint(value: int) -> bytes:
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(entries: list[tuple[bytes, bytes]], compression: int = 0) -> bytes:
    """A table's block: keys share beginnings with the one before, a restart every second entry."""
    found, restarts, before = b"", [], b""
    for number, (key, value) in enumerate(entries):
        if number % 2 == 0:
            restarts.append(len(found))
            before = b""
        shared = next((n for n, (a, b) in enumerate(zip(before, key, strict=False)) if a != b), len(before))
        found += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    found += b"".join(struct.pack("<I", restart) for restart in restarts) + struct.pack("<I", len(restarts))
    return found + bytes([compression]) + b"\0\0\0\0"


def write_bundle(folder, tensors, *, compression=0, shard=0, crop=0, magic=MAGIC) -> None:
    """A checkpoint in the form TensorFlow writes, made from its format's description alone."""
    data, entries = b"", [(b"", field(1, 1))]
    for name, values in sorted(tensors.items()):
        shape = b"".join(field(2, field(1, size)) for size in values.shape)
        raw = values.tobytes()
        kind = {"float32": 1, "int64": 9}[str(values.dtype)]
        checksum = varint(6 << 3 | 5) + b"\1\2\3\4"
        entry = field(1, kind) + field(2, shape) + (field(3, shard) if shard else b"")
        entry += (field(4, len(data)) if data else b"") + field(5, len(raw)) + checksum
        entries.append((name.encode(), entry))
        data += raw
    content = block(entries, compression)
    meta_at = len(content)
    content += block([])
    index_at = len(content)
    handle = varint(0) + varint(meta_at - 5)
    index = block([(entries[-1][0] + b"z", handle)])
    footer = varint(meta_at) + varint(index_at - meta_at - 5) + varint(index_at) + varint(len(index) - 5)
    content += index + footer.ljust(40, b"\0") + struct.pack("<Q", magic)
    (folder / "m.index").write_bytes(content)
    (folder / "m.data-00000-of-00001").write_bytes(data[: len(data) - crop])


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "dense/kernel": rng.normal(size=(3, 200)).astype(np.float32),
        "dense/bias": rng.normal(size=200).astype(np.float32),
        "dense_1/bias": rng.normal(size=(1, 2, 3)).astype(np.float32),
        "scale": np.array(2.5, dtype=np.float32),
        "step": np.array(7, dtype=np.int64),
    }


def test_a_checkpoint_is_read_back(tmp_path, tensors):
    write_bundle(tmp_path, tensors)
    found = read_tensor_bundle(tmp_path, "m")
    assert sorted(found) == sorted(set(tensors) - {"step"})
    for name, values in found.items():
        assert values.dtype == np.float32 and np.array_equal(values, tensors[name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"compression": 1}, "compressed"),
        ({"shard": 1}, "several shards"),
        ({"crop": 12}, "shorter than the index says"),
        ({"magic": 1}, "its last bytes"),
    ],
)
def test_a_damaged_checkpoint_is_told(tmp_path, tensors, damage, message):
    write_bundle(tmp_path, tensors, **damage)
    with pytest.raises(DataError, match=message):
        read_tensor_bundle(tmp_path, "m")


def test_a_missing_or_short_file_is_told(tmp_path, tensors):
    with pytest.raises(DataError, match="cannot read the checkpoint"):
        read_tensor_bundle(tmp_path, "m")
    write_bundle(tmp_path, tensors)
    (tmp_path / "m.index").write_bytes(b"short")
    with pytest.raises(DataError, match="m.index is no TensorFlow checkpoint"):
        read_tensor_bundle(tmp_path, "m")


def test_the_network_needs_no_package_for_its_shapes(musicnn_weights):
    network = MusicFeatures(musicnn_weights)
    times = torch.arange(48_000 * 7) / 48_000
    tone = 0.1 * torch.sin(2 * torch.pi * 440 * times).repeat(2, 1)
    features = network.of_wave(tone)
    assert features.shape == (2, 200) and bool(torch.isfinite(features).all())  # 7 s hold two patches
    # Patches are heard on their own, and one that is too short is continued by silence.
    assert torch.allclose(network.of_wave(tone[:, : 48_000 * 4])[0], features[0], atol=1e-3)
    assert network.of_wave(tone[:, :48_000]).shape == (1, 200)
    assert not torch.allclose(network.of_wave(0 * tone)[0], features[0], atol=0.1)


def test_pooling_sees_all_frames(musicnn_weights):
    network = MusicFeatures(musicnn_weights)
    mel = torch.from_numpy(np.random.default_rng(1).uniform(0, 2, (1, 187, 96)).astype(np.float32))
    base = network.of_patches(mel)
    for frame in (0, 93, 186):
        changed = mel.clone()
        changed[:, frame] += 5
        assert (network.of_patches(changed) - base).abs().max() > 1e-3


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setattr(music_features, "find_spec", lambda name: None)
    assert not music_features.has_music_features()
    with pytest.raises(DataError, match="pip install --no-deps musicnn"):
        MusicFeatures.from_package()


@pytest.mark.skipif(not music_features.has_music_features(), reason="needs pip install --no-deps musicnn")
def test_the_package_s_weights_tell_noise_from_tones():
    network = MusicFeatures.from_package()
    rng = torch.Generator().manual_seed(0)
    times = torch.arange(48_000 * 3) / 48_000
    tones = [0.1 * torch.sin(2 * torch.pi * hertz * times)[None] for hertz in (262, 277)]
    noise = 0.1 * torch.randn(1, len(times), generator=rng)
    first, second, other = (network.of_wave(wave)[0] for wave in (*tones, noise))
    assert (first - second).norm() < 0.5 * (first - other).norm()
