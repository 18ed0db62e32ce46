"""Reading music out of chroma and waves: key, chords, tempo and beats, sung pitch, coherence."""
