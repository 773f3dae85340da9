"""A real service on loopback: examples/serving with two replicas, in processes of its own, on tiny random adapters."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import torch
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from fact_peft import FacTConfig

T = TypeVar("T")
SERVE = Path(__file__).parents[1] / "examples" / "serving" / "serve.py"
RAY_SETTINGS = {
    "RAY_metrics_report_interval_ms": "1000",  # instead of ten seconds
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # instead of 5 s, too few on a busy machine
}
LABELS = {"fruit": ["apple", "pear", "plum"], "sky": ["clear", "cloudy"]}
READ_TIMEOUT = 10  # seconds
PATIENCE = 600  # seconds after which what is waited for hangs; on a busy machine Ray alone took 200 to start


@dataclass
class Answer:
    status: int
    body: dict | str


@dataclass
class Served:
    url: str
    folder: Path
    process: subprocess.Popen

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: bytes | dict | None = None,
        token: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        headers = {**(headers or {}), **({"Authorization": f"Bearer {token}"} if token else {})}
        if isinstance(body, dict):
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            with urlopen(Request(self.url + path, body, headers, method=method), timeout=PATIENCE) as answer:
                text = answer.read().decode()
                return Answer(answer.status, json.loads(text) if "json" in answer.headers["Content-Type"] else text)
        except HTTPError as error:
            with error:
                text = error.read().decode()
            return Answer(error.code, json.loads(text)["detail"] if text.startswith('{"detail"') else text)

    def predict(self, image: bytes, *names: str, top: int = 10) -> Answer:
        query = urlencode([*(("adapter", name) for name in names), ("top", top)])
        return self.ask(f"/predict?{query}", "POST", image)

    def replicas(self) -> dict[str, dict]:
        """What each replica says of itself: asked so often that both answer."""
        answers = [self.ask("/health").body for _ in range(20)]
        return {answer["replica"]: answer for answer in answers}


def save_backbone(folder: Path) -> ViTForImageClassification:
    """A tiny untrained ViT for colour images of 16 x 16 pixels, with its image processor."""
    torch.manual_seed(7)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    vit = ViTForImageClassification(config)
    vit.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return vit


def save_adapter(backbone: Path, folder: Path, labels: list[str], seed: int) -> None:
    vit = ViTForImageClassification.from_pretrained(backbone, num_labels=len(labels), ignore_mismatched_sizes=True)
    torch.manual_seed(seed)
    model = get_peft_model(vit, FacTConfig(rank=2, labels=labels, init_weights=False, scale=3.0))
    model.save_pretrained(folder)


@contextmanager
def serve(folder: Path, token: str) -> Iterator[Served]:
    """Two replicas of ``folder/backbone`` with the adapters of `LABELS`; they and Ray are gone at the end."""
    save_backbone(folder / "backbone")
    for seed, (name, labels) in enumerate(LABELS.items()):
        save_adapter(folder / "backbone", folder / "adapters" / name, labels, seed)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {"backbone": "backbone", "adapters": "adapters", "state": "state", "port": port, "replicas": 2}
    options |= {"max_body_bytes": 100_000, "max_pixels": 1_000_000, "read_timeout": READ_TIMEOUT}
    with open(folder / "log.txt", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, SERVE, *(text for key, value in options.items() for text in (f"--{key}", str(value)))],
            cwd=folder,
            env={**os.environ, "SERVING_TOKEN": token, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **RAY_SETTINGS},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(lambda: "Serving on" in (folder / "log.txt").read_text() or process.poll() is not None)
            assert process.poll() is None, (folder / "log.txt").read_text()[-5000:]
            yield Served(f"http://127.0.0.1:{port}", folder, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0, (folder / "log.txt").read_text()[-5000:]
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def wait_for(condition: Callable[[], T]) -> T:
    """What the condition gives once it holds."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {PATIENCE} s in vain"
        time.sleep(0.2)
    return found
