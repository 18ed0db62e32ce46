"""MagnaTagATune's protocol on a synthetic folder of its layout."""

import json

import numpy as np
import pytest
import soundfile

from duotok.recipes.research import diagnose
from duotok.recipes.research.tagging import find_clip, read_annotations, split_of
from duotok.tokenizer.common.errors import DataError

RATE_HZ = 16_000
TAGS = ["harp", "no vocals", "weird", "noise", "never"]


def write_folder(root, clips, tags=TAGS) -> None:
    """clips: {mp3_path: tags, or None for a file that is missing}; noise or a tone by the tag "noise"."""
    rows = ["\t".join(f'"{name}"' for name in ("clip_id", *tags, "mp3_path"))]
    rng = np.random.default_rng(0)
    for number, (path, marks) in enumerate(clips.items()):
        marked = marks or set()
        rows.append("\t".join([f'"{number}"', *(f'"{int(tag in marked)}"' for tag in tags), f'"{path}"']))
        if marks is None:
            continue
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        times = np.arange(2 * RATE_HZ) / RATE_HZ
        tone = np.sin(2 * np.pi * (200 + 10 * number) * times)
        wave = rng.normal(size=len(times)) if "noise" in marked else tone
        soundfile.write(root / path, 0.1 * wave, RATE_HZ, format="MP3")
    (root / "annotations_final.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def magnatagatune(tmp_path_factory):
    root = tmp_path_factory.mktemp("magnatagatune")
    clips: dict[str, set[str] | None] = {}
    for number, folder in enumerate("0123ab" * 2 + "ccc" + "dddeeefff"):
        marks = {"noise", "weird"} if number % 2 else {"harp"}
        if number % 5 == 0:
            marks = marks | {"no vocals"}
        clips[f"{folder}/artist-{number}-0-29.mp3"] = marks
    clips["d/missing-0-29.mp3"] = None
    clips["f/empty-0-29.mp3"] = {"noise"}
    write_folder(root, clips)
    (root / "f" / "empty-0-29.mp3").write_bytes(b"")  # the data set has three of these
    return root


def test_folders_are_the_split_of_twelve_one_and_three():
    splits = [split_of(f"{folder}/x.mp3") for folder in "0123456789abcdef"]
    assert splits == ["train"] * 12 + ["validation"] + ["test"] * 3
    assert split_of("g/x.mp3") is None and split_of("extra/x.mp3") is None


def test_the_most_frequent_tags_come_first(magnatagatune):
    tags, clips, missing = read_annotations(magnatagatune)
    assert tags == ("noise", "harp", "weird", "no vocals")  # by frequency, then by place; "never" is no tag
    assert missing == 1 and len(clips) == 25
    assert clips[1].tags.tolist() == [1, 0, 1, 0]
    assert read_annotations(magnatagatune, count=2)[0] == ("noise", "harp")


def test_clips_are_found_under_mp3_too(tmp_path):
    write_folder(tmp_path / "mp3", {"0/a.mp3": {"harp"}})
    assert find_clip(tmp_path, "0/a.mp3") == tmp_path / "mp3" / "0" / "a.mp3"
    assert find_clip(tmp_path, "0/b.mp3") is None


def test_the_protocol_end_to_end(magnatagatune, tiny_components, tmp_path):
    options = ["--corpus", "unused", "--tokenizer", str(tiny_components["tokenizer"]), "--out", str(tmp_path)]
    options += ["--magnatagatune", str(magnatagatune), "--parts", "tagging", "--epochs", "15"]
    assert diagnose.main(options) == 0
    figures = json.loads((tmp_path / "diagnostics.json").read_text())
    counts = [figures[f"tagging.{name}_clips"] for name in ("train", "validation", "test", "missing")]
    assert counts == [12, 3, 9, 2]
    assert figures["tagging.majority_macro_auc"] == 0.5
    # Noise and tones have different codes under any tokenizer.
    assert figures["tagging.tag_noise_auc"] > 0.8
    assert figures["tagging.codes_linear_macro_auc"] > 0.6
    assert figures["tagging.codes_conformer_macro_ap"] > figures["tagging.majority_macro_ap"]
    assert "tagging.tag_no_vocals_ap" in figures
    assert (tmp_path / "tagging.png").stat().st_size > 10_000
    assert list(json.loads((tmp_path / "unreadable.json").read_text())) == ["25"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("clip_id,harp,mp3_path\n1,0,0/a.mp3\n", "tab separated"),
        ("clip_id\tharp\tmp3_path\n1\tyes\t0/a.mp3\n", "row 2"),
        ("clip_id\tharp\tmp3_path\n1\t0/a.mp3\n", "row 2"),
    ],
)
def test_bad_annotations_are_told(tmp_path, text, message):
    if text is not None:
        (tmp_path / "annotations_final.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_annotations(tmp_path)


def test_a_folder_without_test_clips_is_one_line(tiny_components, tmp_path, capsys):
    write_folder(tmp_path / "data", {"0/a.mp3": {"harp"}, "c/b.mp3": {"noise"}})
    options = ["--corpus", "unused", "--tokenizer", str(tiny_components["tokenizer"])]
    options += [
        "--out",
        str(tmp_path / "out"),
        "--magnatagatune",
        str(tmp_path / "data"),
        "--parts",
        "tagging",
    ]
    assert diagnose.main(options) == 1
    assert "has no clips in the folders d, e, f (test)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        diagnose.main([*options[:4], "--out", str(tmp_path / "out"), "--parts", "tagging"])
