"""Make one language model of AccompGen's three trained stages.

Run: python -m duotok.recipes.lm.accompgen.join_stages runs/small/accompgen/{semantic,coarse,fine}/final \\
         --out runs/small/accompgen/lm
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duotok.tokenizer.common.command import guard


def join_stages(folders: Sequence[Path], out: Path) -> Path:
    """Write the language model; CheckpointError where the stages do not belong together."""
    from duotok.lm.hierarchical.model import HierarchicalLM
    from duotok.lm.hierarchical.stage import Stage

    HierarchicalLM.join([Stage.from_pretrained(folder) for folder in folders]).save_pretrained(out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="One language model of AccompGen's three stages")
    parser.add_argument("stages", type=Path, nargs=3, metavar="DIR", help="the stages' folders, in any order")
    parser.add_argument("--out", type=Path, required=True, help="folder of the language model")
    arguments = parser.parse_args(argv)
    return guard(lambda: print(join_stages(arguments.stages, arguments.out)))


if __name__ == "__main__":
    sys.exit(main())
