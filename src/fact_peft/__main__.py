"""``python -m fact_peft ADAPTER``: print what a saved adapter holds, and draw where it acts."""

import argparse
from pathlib import Path

from .operations.inspection import describe, draw_increments, increment_norms, read_adapter


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fact_peft", description="Print what a saved FacT adapter holds.")
    parser.add_argument("adapter", help="folder of the adapter, or its name on the Hub")
    parser.add_argument("--map", type=Path, metavar="PNG", help="draw ||dW|| by block and matrix to this file")
    arguments = parser.parse_args()
    adapter = read_adapter(arguments.adapter)
    print(describe(adapter))
    if arguments.map:
        draw_increments(increment_norms(adapter), arguments.map)
        print(f"map         {arguments.map}")


if __name__ == "__main__":
    main()
