"""The protocol of AccompGen: MUSDB18's folder, what is compared with what."""

import shutil

import numpy as np
import pytest
import torch

from duotok.recipes.evaluation.accompgen_part import MUSDB_STEMS, compare_kinds, read_musdb
from duotok.tokenizer.common.audio import write_audio
from duotok.tokenizer.common.errors import DataError


@pytest.fixture
def musdb(tmp_path):
    for number, track in enumerate(("one", "two")):
        for stem in MUSDB_STEMS:
            wave = torch.zeros(2, 5 * 48_000)
            if stem == "vocals":  # is sung in the fourth second of one, the second of two
                wave[:, (3 - 2 * number) * 48_000 : (4 - 2 * number) * 48_000] = 0.1
            write_audio(tmp_path / "test" / track / f"{stem}.wav", wave)
    return tmp_path


def test_tracks_are_cut_where_somebody_sings(musdb):
    tracks = read_musdb(musdb)
    assert [track.folder.name for track in tracks] == ["one", "two"]
    assert [track.find_singing(1.0, 1) for track in tracks] == [[3.0], [1.0]]
    assert tracks[0].find_singing(2.0, 5) == [0.0, 2.0] and tracks[0].find_singing(9.0, 1) == [0.0]
    assert tracks[0].read("vocals", 4.5, 1.0).shape == (2, 48_000)
    assert [track.folder for track in read_musdb(musdb / "test")] == [track.folder for track in tracks]


def test_a_folder_without_stems_is_one_line(musdb):
    (musdb / "test" / "two" / "bass.wav").unlink()
    with pytest.raises(DataError, match=r"two has no bass\.wav; give MUSDB18-HQ"):
        read_musdb(musdb)
    shutil.rmtree(musdb / "test")
    with pytest.raises(DataError, match="holds no tracks of MUSDB18-HQ"):
        read_musdb(musdb)


def test_the_gap_is_what_separation_costs():
    rng = np.random.default_rng(0)
    true = [rng.normal(size=(40, 4)) for _ in range(3)]
    near = [song + 0.1 for song in true]
    found = compare_kinds({"true": true, "isolated": near, "separated": [song + 0.3 for song in true]})
    assert found["fad_isolated"] == pytest.approx(4 * 0.1**2, rel=1e-6)
    assert found["fad_gap"] == pytest.approx(4 * (0.3**2 - 0.1**2), rel=1e-6)
