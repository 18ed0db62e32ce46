"""Wave to two token streams at 25 Hz, and back to what the tokens know (mel, chroma, features)."""

if __name__ == "tokenizer":
    raise ImportError("import duotok.tokenizer (after pip install), not tokenizer")
