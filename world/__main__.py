"""Write the embedded world: its data, its policy and its judge."""

import argparse
import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

import world
from engine import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m world")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write data/, policy/ and judge/ to"
    )
    parser.add_argument("--seed", type=int, default=0, help="of its data and its models")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    try:
        print(f"the embedded world is in {world.build(args.out, args.quiet, args.seed)}")
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
