"""How far the implementation is from the paper's equations, evaluated slice by slice in float64.

    python -m benchmarks.exactness

For the three kinds of layer in a ViT-B block, both decompositions and every dtype, prints the largest error of the
forward pass and of the merged weight, relative to the largest reference value. The column "plain" is the error of the
frozen layer alone in the same dtype: what that dtype costs without any adapter.
"""

import argparse

from benchmarks.exactness.equations import DTYPES, LAYERS, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16, help="rank of the factors (default: 16)")
    rank = parser.parse_args().rank
    print(f"| dtype | layer | decomposition | plain | forward | merged weight |\n|{'---|' * 6}")
    for dtype in DTYPES:
        for name, shape in LAYERS.items():
            for decomposition in ("tt", "tk"):
                row = " | ".join(f"{error:.1e}" for error in errors(shape, decomposition, dtype, rank))
                print(f"| {str(dtype).removeprefix('torch.')} | {name} | {decomposition} | {row} |")


if __name__ == "__main__":
    main()
