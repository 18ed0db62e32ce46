"""Everything that is run: corpus, training, evaluation, and `generate`."""

if __name__ == "recipes":
    raise ImportError("import duotok.recipes (after pip install), not recipes")
