"""Execute the notebooks and write them back with their outputs.

    python examples/notebooks/execute.py                        # all of them
    python examples/notebooks/execute.py fine_tune_look_share

Warnings of installed packages and the times at which cells ran are left out.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def executed(file: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in a folder of its own and without a network.

    Raises:
        CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(file, as_version=4)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cells[0].outputs = []  # the imports
    for cell in cells:
        cell.outputs = [output for output in cell.outputs if not is_warning(output)]
    return notebook


def is_warning(output: nbformat.NotebookNode) -> bool:
    """Whether an output is the log of a package, on standard error or, as DeepSpeed does it, on standard output."""
    return output.get("name") == "stderr" or "] [WARNING] [" in output.get("text", "")


def main() -> None:
    for file in sorted(FOLDER.glob("*.ipynb")):
        if file.stem in (sys.argv[1:] or [file.stem]):
            with tempfile.TemporaryDirectory() as folder:
                notebook = executed(file, Path(folder))
            nbformat.write(notebook, file)
            print(f"{file.name}: {file.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
