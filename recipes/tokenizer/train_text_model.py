"""Train the sentencepiece model of the lyric head on the lyrics of a corpus (P 4.1).

Run: python -m duotok.recipes.tokenizer.train_text_model --manifest data/popband/train.jsonl \\
         --out runs/small/text.model
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_bytes

_SETTINGS = {"hard_vocab_limit": False, "character_coverage": 1.0, "normalization_rule_name": "identity"}
_SETTINGS |= {"bos_id": -1, "eos_id": -1, "num_threads": 1, "minloglevel": 2}


def train_text_model(lines: Sequence[str], pieces: int) -> bytes:
    """Return a serialized unigram sentencepiece model; it has fewer pieces where the lyrics hold no more."""
    import sentencepiece

    if not any(line.strip() for line in lines):
        raise DataError("the manifest has no lyrics; give a corpus whose items have notes or lyrics")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=pieces,
            **_SETTINGS,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-160:]
        raise DataError(f"sentencepiece cannot train {pieces} pieces on these lyrics: {reason}") from error
    return model.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Sentencepiece model of a corpus's lyrics")
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL manifest of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="the .model file")
    parser.add_argument("--pieces", type=int, default=400, help="size of the vocabulary")
    arguments = parser.parse_args(argv)
    if arguments.pieces < 8:
        parser.error("--pieces must be at least 8")
    return guard(lambda: write_text_model(arguments.manifest, arguments.out, arguments.pieces))


def write_text_model(manifest: Path, out: Path, pieces: int) -> None:
    """Train a text model on the lyrics of a manifest and put it in the file `out`."""
    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.tokenizer.text import SentencePieceVocabulary

    lines = [item.text_between(0.0, item.seconds) for item in read_manifest(manifest)]
    model = train_text_model(lines, pieces)
    write_bytes(out, model)
    print(f"{SentencePieceVocabulary(model).size} pieces -> {out}")


if __name__ == "__main__":
    sys.exit(main())
