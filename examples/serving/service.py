"""The deployment: HTTP around a pool of adapters, with one batch for requests of all adapters."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from math import isnan
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated

from catalogue import Catalogue
from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from metrics import Metrics
from ray import serve
from served_pool import ServedPool
from settings import Settings
from sources import MAX_SOURCE_BYTES, Source, check_processor, check_source, from_folder, from_hub
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from validation import Refused, check_adapters, check_name, check_token, decode_image, read_body

from fact_peft import AdapterPool, Prediction
from fact_peft.operations.inspection import increment_map

app = FastAPI(title="Adapters on one vision transformer", docs_url=None, redoc_url=None)


@app.exception_handler(Refused)
async def refuse(_: Request, refused: Refused) -> JSONResponse:
    return JSONResponse({"detail": refused.reason}, refused.status)


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
    labels = [{"label": label, "score": score} for label, score in prediction.top(top)]
    return {"adapter": prediction.adapter, "labels": labels}


def unknown(name: str) -> Refused:
    return Refused(404, f"No adapter is called {name!r}; GET /adapters lists all.")


# Ray Serve copies the class as it stands here: what it uses of this file is above.
@serve.deployment(max_ongoing_requests=256, max_queued_requests=1000, health_check_period_s=2)
@serve.ingress(app)
class Service:
    """One replica.

    Args:
        settings: What the service was told.
        token: What changing adapters needs, if anything.
        make_pool: Puts a pool on the frozen model; benchmarks put other things there.
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
        self.metrics = Metrics(Path(settings.state, "metrics"), self.replica)
        self.classify.set_max_batch_size(settings.max_batch_size)
        self.classify.set_batch_wait_timeout_s(settings.batch_wait)
        self.idle = asyncio.Event()
        self.idle.set()
        threading.Thread(target=self.write_metrics, daemon=True).start()

    @app.get("/")
    def page(self) -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"))

    @app.post("/predict")
    async def predict(self, request: Request, top: Annotated[int, Query(ge=1)] = 10) -> dict:
        """Labels and scores of the image in the body, for each adapter in the query: ``?adapter=a&adapter=b``."""
        start = time.perf_counter()
        status = 500
        try:
            names = check_adapters(request.query_params.getlist("adapter"), self.pool.known())
            length = request.headers.get("content-length")
            data = await read_body(request.stream(), length, self.settings.max_body_bytes)
            pixels = await asyncio.to_thread(self.prepare, data)
            predictions = await asyncio.gather(*(self.classify_in_turn(pixels, name) for name in names))
            for prediction in predictions:
                if isinstance(prediction, Refused):
                    raise prediction
            status = 200
            return {"predictions": [as_json(prediction, top) for prediction in predictions]}
        except Refused as refused:
            status = refused.status
            raise
        finally:
            self.metrics.count_request(status, time.perf_counter() - start)

    @app.get("/adapters")
    def list_adapters(self) -> dict:
        return {"adapters": [{"name": name, "source": entry.source} for name, entry in self.pool.known().items()]}

    @app.get("/adapters/{name:path}")
    def show_adapter(self, name: str) -> dict:
        """Its labels, and where it acts: ||dW|| by block and matrix."""
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
            "norms": [[None if isnan(norm) else norm for norm in row] for row in norms.tolist()],
        }

    @app.put("/adapters/{name:path}")
    async def put_adapter(self, name: str, request: Request) -> dict:
        """Load an adapter, or a new version of it, into all replicas. One that does not fit changes nothing."""
        check_token(request.headers.get("authorization"), self.token)
        check_name(name)
        body = await read_body(request.stream(), request.headers.get("content-length"), MAX_SOURCE_BYTES)
        return await asyncio.to_thread(self.load, name, check_source(body))

    @app.delete("/adapters/{name:path}")
    def delete_adapter(self, name: str, request: Request) -> dict:
        check_token(request.headers.get("authorization"), self.token)
        try:
            self.catalogue.remove(check_name(name))
        except KeyError:
            raise unknown(name) from None
        return {"name": name, "deleted": True}

    @app.get("/health")
    def health(self) -> JSONResponse:
        """Of the replica that happened to answer."""
        health = self.pool.health()
        return JSONResponse({**health, "replica": self.replica}, 200 if health["status"] == "ok" else 503)

    @app.get("/metrics")
    def show_metrics(self) -> dict:
        self.metrics.write(self.pool.pool.stats())
        return self.metrics.summary()

    async def classify_in_turn(self, pixels: Tensor, name: str) -> Prediction | Refused:
        """Join the batch after the one that runs.

        `serve.batch` alone closes a batch after `batch_wait` seconds, also while another runs: many small ones.
        """
        await self.idle.wait()
        return await self.classify((pixels, name))

    @serve.batch
    async def classify(self, items: list[tuple[Tensor, str]]) -> list[Prediction | Refused]:
        """Pairs of pixels (channels, height, width) and adapter, of whatever requests are waiting."""
        self.idle.clear()
        self.metrics.count_batch(len(items))
        try:
            return await asyncio.to_thread(self.pool.classify, items)
        finally:
            self.idle.set()

    def prepare(self, data: bytes) -> Tensor:
        """Pixels (channels, height, width) of an encoded image, as the model wants them."""
        image = decode_image(data, self.settings.max_pixels)
        return self.processor(image.convert(self.mode), return_tensors="pt")["pixel_values"][0]

    def load(self, name: str, source: Source) -> dict:
        if source.folder is not None:
            files, described = from_folder(source.folder, Path(self.settings.adapters))
        else:
            files, described = from_hub(source.hub, source.revision, self.settings.hub_owners)
        replaced = name in self.pool.known()
        self.catalogue.put(name, files, described, lambda copy: self.try_loading(f"new {name}", copy))
        return {"name": name, "source": described, "replaced": replaced}

    def try_loading(self, name: str, folder: Path) -> None:
        """Refuse what the pool refuses, under a name that no request can have."""
        check_processor(folder, json.loads(self.processor.to_json_string()))
        try:
            self.pool.pool.load(name, folder)
        except ValueError as error:
            raise Refused(422, str(error)) from error
        self.pool.pool.unload(name)

    def write_metrics(self) -> None:
        while True:
            self.metrics.write(self.pool.pool.stats())
            time.sleep(1)
