"""Train the sentencepiece model of the lyric head on the lyrics of a corpus (P 4.1).

Run: python -m duotok.recipes.tokenizer.text --manifest data/popband/train.jsonl --out runs/small/text.model
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path


def train_text_model(lines: Sequence[str], pieces: int) -> bytes:
    """Return a serialized unigram sentencepiece model; it has fewer pieces where the lyrics hold no more."""
    import sentencepiece

    from duotok.tokenizer.common.errors import DataError

    if not any(line.strip() for line in lines):
        raise DataError("the manifest has no lyrics; give a corpus whose items have notes or lyrics")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=pieces,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            minloglevel=2,
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
    parser.add_argument("--pieces", type=int, default=128, help="size of the vocabulary")
    arguments = parser.parse_args(argv)
    if arguments.pieces < 8:
        parser.error("--pieces must be at least 8")
    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.tokenizer.common.errors import DuoTokError
    from duotok.tokenizer.text import SentencePieceVocabulary

    try:
        items = read_manifest(arguments.manifest)
        lines = [item.text_between(0.0, item.seconds) for item in items]
        model = train_text_model(lines, arguments.pieces)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = arguments.out.with_name(arguments.out.name + ".part")
        temporary.write_bytes(model)
        temporary.replace(arguments.out)
    except DuoTokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot write {arguments.out}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"{SentencePieceVocabulary(model).size} pieces -> {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
