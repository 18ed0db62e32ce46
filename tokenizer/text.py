"""Lyrics as token indices for the lyric head: sentencepiece, or a Hugging Face tokenizer by name (P 4.1)."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .common.errors import CheckpointError, ConfigError


class TextVocabulary(Protocol):
    """Text to token indices 0..size - 1 and back; the lyric head's blank is the index `size`."""

    size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def describe(self) -> dict[str, Any]:
        """Return what `open_vocabulary` needs, ready for JSON."""
        ...


class SentencePieceVocabulary:
    """A sentencepiece model, kept as bytes so that a tokenizer folder needs no other file."""

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise CheckpointError("the sentencepiece model is damaged; train it again") from error
        self.size = int(self._processor.GetPieceSize())

    def encode(self, text: str) -> list[int]:
        return list(self._processor.EncodeAsIds(text))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._processor.DecodeIds([int(token) for token in tokens]))

    def describe(self) -> dict[str, Any]:
        return {"kind": "sentencepiece", "model": base64.b64encode(self._model).decode("ascii")}


class HuggingFaceVocabulary:
    """A tokenizer of `transformers` by folder or hub name; the paper's is bert-base-multilingual-cased."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        self._name = name
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"no text tokenizer {name!r} can be loaded; give a folder or hub name"
            ) from error
        self.size = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(token) for token in tokens]))

    def describe(self) -> dict[str, Any]:
        return {"kind": "huggingface", "name": self._name}


def read_vocabulary(source: str) -> TextVocabulary:
    """Open a .model file of sentencepiece, or the Hugging Face tokenizer of that name."""
    if not source.endswith(".model"):
        return HuggingFaceVocabulary(source)
    try:
        return SentencePieceVocabulary(Path(source).read_bytes())
    except OSError as error:
        raise ConfigError(
            f"cannot read the text model {source}: {error.strerror or error}; "
            f"make it by python -m duotok.recipes.tokenizer.train_text_model"
        ) from error


def open_vocabulary(description: Any) -> TextVocabulary:
    """Return the vocabulary that `describe` told of."""
    match description:
        case {"kind": "sentencepiece", "model": str(model)}:
            try:
                return SentencePieceVocabulary(base64.b64decode(model, validate=True))
            except ValueError as error:
                raise CheckpointError("the text model of the tokenizer folder is damaged") from error
        case {"kind": "huggingface", "name": str(name)}:
            return HuggingFaceVocabulary(name)
    kind = description.get("kind") if isinstance(description, dict) else description
    raise CheckpointError(f"unknown kind of text vocabulary {kind!r}, or it lacks its model; upgrade duotok")


def collapse_alignment(best: Sequence[int], blank: int) -> list[int]:
    """Return the tokens of a frame-wise best path: repeats merged, blanks dropped (Graves et al., 2006)."""
    tokens, before = [], blank
    for token in best:
        if token != before and token != blank:
            tokens.append(int(token))
        before = token
    return tokens
