"""PopBand: the small corpus of sung melodies with full bands that the project makes for itself."""
