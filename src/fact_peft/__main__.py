"""``python -m fact_peft ADAPTER``: print what a saved adapter holds, and draw where it acts.

``python -m fact_peft convert FILE OUT --from DONOR``: a checkpoint of another implementation of FacT as an adapter.
"""

import argparse
import sys
from pathlib import Path

from .converters.conversion import DONORS, convert_checkpoint
from .operations.inspection import describe, draw_increments, increment_norms, read_adapter
from .storage.quoting import for_terminal

CONVERT = "convert"


def main() -> None:
    try:
        if sys.argv[1:2] == [CONVERT]:
            convert(sys.argv[2:])
        else:
            inspect(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        line = " ".join(str(error).split())
        raise SystemExit(for_terminal(f"python -m fact_peft: {line or type(error).__name__}")) from error


def inspect(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fact_peft",
        description="Print what a saved FacT adapter holds.",
        epilog=f"python -m fact_peft {CONVERT} --help: make one from a checkpoint of another implementation of FacT.",
    )
    parser.add_argument("adapter", help="folder of the adapter, or its name on the Hub")
    parser.add_argument("--map", type=Path, metavar="PNG", help="draw ||dW|| by block and matrix to this file")
    asked = parser.parse_args(arguments)
    adapter = read_adapter(asked.adapter)
    print(describe(adapter))
    if asked.map:
        draw_increments(increment_norms(adapter), asked.map)
        print(f"map         {asked.map}")


def convert(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"python -m fact_peft {CONVERT}",
        description="Convert a checkpoint of another implementation of FacT to an adapter, exactly.",
    )
    parser.add_argument("file", help="the checkpoint; pickles are read as tensors alone")
    parser.add_argument("out", help="folder of the adapter to write")
    parser.add_argument("--from", dest="donor", required=True, choices=DONORS, help="whose checkpoint it is")
    parser.add_argument("--scale", type=float, help="the factor s of the run, where the donor does not store it")
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="WORD", help="drop tensors with such a word in their names"
    )
    asked = parser.parse_args(arguments)
    convert_checkpoint(asked.file, asked.out, asked.donor, asked.scale, asked.leave_out)
    print(describe(read_adapter(asked.out)))


if __name__ == "__main__":
    main()
