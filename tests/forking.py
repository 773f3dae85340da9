"""Code run as a user runs it: every piece in a process of its own, without the seconds that a new process imports."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent

# Runs each line of its input, {"code", "name", "folder"}, in a process of its own, which starts with everything
# imported but fact_peft, and answers with the exit status.
STEPS = """
import contextlib, importlib, json, os, sys, traceback
import transformers.models.vit.modeling_vit, transformers.pipelines, transformers.trainer
import peft, torch
for optional in ("peft.tuners.lora.bnb", "timm"):
    with contextlib.suppress(ImportError):
        importlib.import_module(optional)

for line in sys.stdin:
    step = json.loads(line)
    process = os.fork()
    if process == 0:
        os.chdir(step["folder"])
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        try:
            exec(compile(step["code"], step["name"], "exec"), {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""

Fork = Callable[..., tuple[int, str]]


@contextmanager
def forking(home: Path, changes: Mapping[str, str]) -> Iterator[Fork]:
    """Yields a function that runs code in a folder and returns exit status and output.

    Args:
        home: For temporary files.
        changes: To the environment, from which all of Hugging Face's variables are taken out first.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src"), str(HERE.parent)]),
        "TMPDIR": str(home),
        **changes,
    }
    server = subprocess.Popen(
        [sys.executable, "-c", STEPS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None

    def run(code: str, folder: Path, name: str = "step") -> tuple[int, str]:
        print(json.dumps({"code": code, "name": name, "folder": str(folder)}), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return status, (folder / "output.txt").read_text()

    yield run
    server.stdin.close()
    assert server.wait() == 0
    server.stdout.close()
