"""The lead sheet: bars and chords read out of the singing, and the columns that the language model sees."""
