"""Size of adapters on disk, for FacT and PEFT's methods at equal rank, on the shapes of ViT-B and ViT-L.

    python -m benchmarks.bytes
    python -m benchmarks.bytes --write benchmarks/bytes/MEASURED.md

All linear layers of the blocks are adapted and no head is saved, so that the files hold what the method holds. What
`save_pretrained` writes is split into the numbers, the rest of the safetensors file (its header) and
adapter_config.json. Overhead is what is written beyond the numbers, in percent of them: of the safetensors file alone,
and with the config. Backbones have shapes but no weights; only measured settings that are missing are measured.
"""

import argparse
from pathlib import Path

from benchmarks.bytes.adapter_files import BACKBONES, METHODS, RANKS, TINY, measure, table
from benchmarks.reporting.markdown import write_generated
from benchmarks.reporting.results import Results

COMMAND = "python -m benchmarks.bytes"
RESULTS = Path(__file__).parent / "results" / "adapter_bytes.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help=f"JSON file of the results (default: {RESULTS})")
    parser.add_argument("--quick", action="store_true", help="a tiny backbone, rank 4; needs --results")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the table into")
    arguments = parser.parse_args()
    if arguments.quick and arguments.results is None:
        parser.error("--quick needs --results, so that it does not mix with the real ones.")
    results = Results(arguments.results or RESULTS)
    backbones, ranks = ({"tiny": TINY}, (4,)) if arguments.quick else (BACKBONES, RANKS)
    for backbone, shape in backbones.items():
        for method, config in METHODS.items():
            for rank in ranks:
                setting = {"backbone": backbone, "method": method, "rank": rank}
                if results.find(**setting) is None:
                    results.add(setting, measure(shape, config(rank)))
    text = table(results)
    print(text)
    if arguments.write is not None:
        write_generated(arguments.write, COMMAND, text)


if __name__ == "__main__":
    main()
