"""The deployment: HTTP around a pool of adapters. Requests for different adapters share a batch."""

import asyncio
import json
import os
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated

from catalogue import Catalogue
from fastapi import FastAPI, Query, Request, Security
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from metrics import exposition
from PIL import Image
from ray import serve
from served_pool import ServedPool
from settings import Settings
from sources import MAX_SOURCE_BYTES, Source, check_files, check_source, from_folder, from_hub
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from validation import FORMATS, Refused, check_adapters, check_name, check_token, decode_image, read_body

from fact_peft import AdapterPool, Prediction
from fact_peft.operations.inspection import increment_map

MAX_WAITING = 512  # pairs of image and adapter in one replica; more are refused

app = FastAPI(title="Adapters on one vision transformer", redoc_url=None)
Token = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]

# Bodies are read without FastAPI, to limit their length and the time they take, so they are documented here.
BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "properties": {"file": BINARY}, "required": ["file"]}
IMAGES = {f"image/{kind.lower()}": {"schema": BINARY} for kind in FORMATS}
IMAGE_BODY = {"requestBody": {"required": True, "content": {**IMAGES, "multipart/form-data": {"schema": FORM}}}}
SOURCE_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": Source.model_json_schema()}}}
}


@app.exception_handler(Refused)
async def refuse(_: Request, refused: Refused) -> JSONResponse:
    text = refused.reason.encode(errors="backslashreplace").decode()  # it may quote what is not UTF-8
    # If a request was not read to its end, the connection cannot be used for another one.
    return JSONResponse({"detail": text}, refused.status, {"Connection": "close"} if refused.status == 408 else None)


def load_backbone(settings: Settings) -> PreTrainedModel:
    device = "cuda" if settings.gpus_per_replica else "cpu"
    return AutoModelForImageClassification.from_pretrained(settings.backbone).eval().to(device)


def make_pool(vit: PreTrainedModel, settings: Settings) -> AdapterPool:
    return AdapterPool(
        vit,
        device_capacity=settings.device_capacity,
        host_capacity=settings.host_capacity,
        spill_folder=None if settings.host_capacity is None else mkdtemp(prefix="adapters-"),
    )


def as_json(prediction: Prediction, top: int) -> dict:
    if not prediction.logits.isfinite().all():
        raise Refused(
            422, f"The adapter {prediction.adapter!r} gives scores that are not finite: its numbers are too large."
        )
    labels = [{"label": label, "score": score} for label, score in prediction.top(top)]
    return {"adapter": prediction.adapter, "labels": labels}


def unknown(name: str) -> Refused:
    return Refused(404, f"No adapter is called {name!r}; GET /adapters lists all.")


# Ray Serve pickles the class here, so everything in this file that it uses is defined above. A request that is still
# arriving costs only a coroutine. Therefore thousands are accepted, and /health never waits behind them in a queue.
@serve.deployment(max_ongoing_requests=10_000, max_queued_requests=1000, health_check_period_s=2)
@serve.ingress(app)
class Service:
    """One replica.

    Args:
        settings: Settings of the service.
        token: Bearer token that is needed to change adapters; None if none is needed.
        make_pool: Makes the pool on the frozen model. Benchmarks pass other functions.
    """

    def __init__(
        self, settings: Settings, token: str | None, make_pool: Callable[[PreTrainedModel, Settings], AdapterPool]
    ) -> None:
        self.settings, self.token = settings, token
        self.processor = AutoImageProcessor.from_pretrained(settings.backbone)
        vit = load_backbone(settings)
        self.mode = "L" if getattr(vit.config, "num_channels", 3) == 1 else "RGB"
        self.catalogue = Catalogue(Path(settings.state))
        self.pool = ServedPool(make_pool(vit, settings), self.catalogue, vit.device)
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.classify.set_max_batch_size(settings.max_batch_size)
        self.classify.set_batch_wait_timeout_s(settings.batch_wait)
        self.idle = asyncio.Event()
        self.idle.set()
        self.waiting = self.num_batches = self.num_pairs = 0

    @app.get("/")
    def page(self) -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"))

    @app.post("/predict", openapi_extra=IMAGE_BODY)
    async def predict(
        self,
        request: Request,
        adapter: Annotated[list[str], Query(default_factory=list, description="Name of an adapter; may be repeated.")],
        top: Annotated[int, Query(ge=1, description="Number of labels in the answer.")] = 10,
    ) -> dict:
        """Labels and scores of an image for each adapter. Send the file as the body, or as ``file`` of a form."""
        names = check_adapters(adapter, self.pool.known())
        data = await read_body(request, self.settings.max_body_bytes, self.settings.read_timeout)
        if self.waiting + len(names) > MAX_WAITING:
            raise Refused(503, f"{self.waiting} predictions are waiting already; send the request again later.")
        self.waiting += len(names)
        try:
            pixels = await asyncio.to_thread(self.prepare, data)
            predictions = await asyncio.gather(*(self.classify_in_turn(pixels, name) for name in names))
        finally:
            self.waiting -= len(names)
        for prediction in predictions:
            if isinstance(prediction, Refused):
                raise prediction
        return {"predictions": [as_json(prediction, top) for prediction in predictions]}

    @app.get("/adapters")
    def list_adapters(self) -> dict:
        return {"adapters": [{"name": name, "source": entry.source} for name, entry in self.pool.known().items()]}

    @app.get("/adapters/{name:path}")
    def show_adapter(self, name: str) -> dict:
        """The labels of an adapter, and ||dW|| by block and matrix."""
        entry = self.pool.known().get(check_name(name))
        if entry is None:
            raise unknown(name)
        blocks, matrices, norms = increment_map(self.pool.increment_norms(name))
        config = json.loads((self.catalogue.folder(entry) / "adapter_config.json").read_text())
        return {
            "name": name,
            "source": entry.source,
            "rank": config["rank"],
            "labels": config.get("labels"),
            "blocks": blocks,
            "matrices": matrices,
            "norms": [[norm if isfinite(norm) else None for norm in row] for row in norms.tolist()],
        }

    @app.put("/adapters/{name:path}", openapi_extra=SOURCE_BODY)
    async def put_adapter(self, name: str, request: Request, token: Token) -> dict:
        """Load an adapter, or a new version of it, into all replicas. If it does not fit, nothing changes."""
        check_token(token and token.credentials, self.token)
        check_name(name)
        body = await read_body(request, MAX_SOURCE_BYTES, self.settings.read_timeout)
        return await asyncio.to_thread(self.load, name, check_source(body))

    @app.delete("/adapters/{name:path}")
    def delete_adapter(self, name: str, token: Token) -> dict:
        check_token(token and token.credentials, self.token)
        try:
            self.catalogue.remove(check_name(name))
        except KeyError:
            raise unknown(name) from None
        return {"name": name, "deleted": True}

    @app.get("/health")
    def health(self) -> JSONResponse:
        """Whether the replica that answers has all adapters, and its counters."""
        health = self.pool.health()
        counts = {"waiting": self.waiting, "batches": self.num_batches, "pairs": self.num_pairs}
        own = {"replica": self.replica, "pid": os.getpid(), "pool": self.pool.pool.stats(), **counts}
        return JSONResponse({**health, **own}, 200 if health["status"] == "ok" else 503)

    @app.get("/metrics")
    def metrics(self) -> PlainTextResponse:
        """The metrics of Ray Serve on all machines: requests by status, latencies, batches."""
        return PlainTextResponse(exposition(), media_type="text/plain; version=0.0.4")

    async def classify_in_turn(self, pixels: Tensor, name: str) -> Prediction | Refused:
        """Wait until no batch is running, then join the next one.

        Without the wait, `serve.batch` would close a batch every `batch_wait` seconds, and make many small ones.
        """
        await self.idle.wait()
        return await self.classify((pixels, name))

    @serve.batch
    async def classify(self, items: list[tuple[Tensor, str]]) -> list[Prediction | Refused]:
        """Classify the pairs of pixels (channels, height, width) and adapter of all waiting requests."""
        self.idle.clear()
        self.num_batches += 1
        self.num_pairs += len(items)
        try:
            return await asyncio.to_thread(self.pool.classify, items)
        finally:
            self.idle.set()

    def prepare(self, data: bytes) -> Tensor:
        """Decode and preprocess an image to pixels (channels, height, width)."""
        return self.pixels_of(decode_image(data, self.settings.max_pixels))

    def pixels_of(self, image: Image.Image) -> Tensor:
        return self.processor(image.convert(self.mode), return_tensors="pt")["pixel_values"][0]

    def load(self, name: str, source: Source) -> dict:
        if source.folder is not None:
            files, described = from_folder(source.folder, self.settings.adapters and Path(self.settings.adapters))
        else:
            files, described = from_hub(source.hub, source.revision, self.settings.hub_owners)
        replaced = name in self.pool.known()
        self.catalogue.put(name, files, described, lambda copy: self.try_loading(f"new {name}", copy))
        return {"name": name, "source": described, "replaced": replaced}

    def try_loading(self, name: str, folder: Path) -> None:
        """Try an adapter on a black image, under a name that no request can use, and refuse it if that fails."""
        check_files(folder, json.loads(self.processor.to_json_string()))
        try:
            self.pool.pool.load(name, folder)
        except (ValueError, OSError) as error:
            raise Refused(422, str(error)) from error
        try:
            pixels = self.pixels_of(Image.new(self.mode, (64, 64)))
            as_json(self.pool.pool(pixels[None].to(self.pool.device), [name])[0], top=1)
        finally:
            self.pool.pool.unload(name)
