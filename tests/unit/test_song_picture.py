"""The picture of a song: everything in it stands where it sounds, and a chart comes back as it was."""

from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch

from duotok.recipes.accompany.wishes import parse_chart
from duotok.recipes.service.song_picture import chart_text, draw_song, file_peaks, wave_peaks

REPORT = {
    "seconds": 8.0,
    "chords": [],
    "lead_sheet": {
        "bar_lines_seconds": [1.0, 3.0, 5.0, 7.0],
        "chords": [[0.0, 3.0, "Eb:min"], [3.0, 5.0, "N"], [5.0, 8.0, "C:maj"]],
        "sections": [[0.0, 5.0, "verse", "A"], [5.0, 8.0, "<chorus>", "B"]],
    },
}
SVG = "{http://www.w3.org/2000/svg}"


def drawn(report) -> ElementTree.Element:
    peaks = np.linspace(0, 1, 400)
    text = draw_song(report, peaks, peaks[::-1]).replace(
        "<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1
    )
    return ElementTree.fromstring(text)


def test_bars_chords_and_sections_stand_where_they_are():
    picture = drawn(REPORT)
    bars = picture.findall(f"{SVG}line")
    assert [float(bar.attrib["x1"].rstrip("%")) for bar in bars] == [12.5, 37.5, 62.5, 87.5]
    placed = {
        "".join(part.itertext()): (part.attrib["x"], part.attrib["width"])
        for part in picture.findall(f"{SVG}svg")
        if "".join(part.itertext())
    }
    assert placed == {
        "verse A": ("0.000%", "62.500%"),
        "<chorus> B": ("62.500%", "37.500%"),
        "Ebm": ("0.000%", "37.500%"),
        "–": ("37.500%", "25.000%"),
        "C": ("62.500%", "37.500%"),
    }
    words = picture.attrib["aria-label"]
    assert "8.0 seconds" in words and "Ebm – C" in words and "<chorus> B from 5.0 s" in words
    times = [part.text for part in picture.findall(f"{SVG}text") if part.attrib["class"] == "time"]
    assert times == ["0:00", "0:05"]


def test_a_song_without_a_sheet_is_drawn_too():
    picture = drawn({"seconds": 2.5, "chords": [[0.0, 2.5, "A:min"]], "lead_sheet": None})
    assert "Am" in "".join(picture.itertext()) and picture.findall(f"{SVG}line") == []


def test_peaks_are_the_loudest_of_each_column(tmp_path):
    wave = torch.zeros(2, 480_000)
    wave[1, 240_000] = -0.5
    soundfile.write(tmp_path / "band.wav", wave.numpy().T, 48_000, subtype="FLOAT")
    peaks = wave_peaks(wave)
    assert len(peaks) == 400 and peaks[200] == 0.5 and peaks.sum() == 0.5
    assert np.array_equal(file_peaks(tmp_path / "band.wav"), peaks)


@pytest.mark.parametrize("intro", [0.0, 2.0])
def test_a_chart_goes_back_in_by_itself(intro):
    chords = [[0.0, 2.04, "C:maj"], [2.04, 4.0, "?"], [4.0, 6.0, "N"], [6.0, 8.0002, "A:min"]]
    chart = parse_chart(chart_text(chords, intro), "chart")
    assert [label for *_, label in chart] == ["C:maj", "N", "A:min"]
    assert chart[-1][1] >= 8.0002 - intro  # until the last frame
    assert chart[0][1] == pytest.approx(2.04 - intro) and chart[1][0] == pytest.approx(4.0 - intro)
