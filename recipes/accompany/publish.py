"""Puts a model folder on the Hugging Face hub, whole and in one commit, where `--model owner/name` finds it.

Run: python -m duotok.recipes.accompany.publish MODEL owner/name [--private] [--revision BRANCH]
Log in first by `hf auth login`, or set HF_TOKEN. A model without README.md gets a plain card before.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duotok.tokenizer.common.command import guard


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, 1 (one line on stderr), 2 (usage), 130 (interrupted)."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.accompany.publish",
        description="Put a model folder on the Hugging Face hub, for generate --model owner/name.",
    )
    parser.add_argument("folder", type=Path, metavar="MODEL", help="bundle folder; checked before it is sent")
    parser.add_argument(
        "name", metavar="OWNER/NAME", help="of the model on the hub; made where it is missing"
    )
    parser.add_argument("--private", action="store_true", help="where it is made, for its owner only")
    parser.add_argument("--revision", metavar="BRANCH", help="made where it is missing (default: main)")
    arguments = parser.parse_args(argv)

    def publish() -> None:
        from duotok.recipes.accompany.bundle import CARD, load_bundle, write_card
        from duotok.tokenizer.common.hub import push_folder

        folder = arguments.folder
        bundle = load_bundle(folder)  # what does not load is no use to others
        if not (folder / CARD).is_file():
            write_card(folder)
        where = {"private": arguments.private, "revision": arguments.revision}
        told = f"DuoTok {bundle.name} {bundle.fingerprint}"
        print(push_folder(folder, arguments.name, message=told, **where))

    return guard(publish)


if __name__ == "__main__":
    sys.exit(main())
