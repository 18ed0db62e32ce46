"""What codes and chroma say of the music: key, chords, tempo, pitch, activity, coherence."""
