import pytest
import torch

from duotok.recipes.accompany.output import OutputError, OutputFolder, write_result


def fill(folder, files=("report.json",)):
    for name in files:
        (folder / name).write_text("new")


def test_a_new_folder_appears_whole_with_its_parents(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with OutputFolder(out) as output:
        fill(output.work)
        assert not out.exists()
        output.publish()
    assert [path.name for path in out.iterdir()] == ["report.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777


def test_nothing_stays_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), OutputFolder(tmp_path / "a" / "b") as output:
        fill(output.work)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_loses_only_our_old_files(tmp_path):
    fill(tmp_path, ("report.json", "mix.wav", "mix-3.wav", "accompaniment-12.wav", "notes.txt", "my-mix.wav"))
    with OutputFolder(tmp_path) as output:
        fill(output.work, ("report.json", "mix.wav"))
        output.publish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mix.wav",
        "my-mix.wav",
        "notes.txt",
        "report.json",
    ]


def test_an_existing_folder_is_untouched_after_an_error(tmp_path):
    (tmp_path / "mix.wav").write_text("old")
    with pytest.raises(RuntimeError), OutputFolder(tmp_path) as output:
        fill(output.work, ("mix.wav",))
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("mix.wav", "old")]


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_a_file_in_the_way_is_an_error(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="--out"), OutputFolder(tmp_path / name):
        pass
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


def test_write_result(tmp_path):
    write_result(tmp_path, torch.zeros(2, 48_000), torch.zeros(2, 48_000), {"seed": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accompaniment.wav", "mix.wav", "report.json"]
    with pytest.raises(ValueError, match="JSON"):
        write_result(tmp_path, torch.zeros(2, 10), torch.zeros(2, 10), {"level": float("nan")})
