"""Serve any number of adapters on one vision transformer.

    python examples/serving/serve.py                                          # a ViT and adapters trained on digits
    python examples/serving/serve.py --backbone google/vit-base-patch16-224-in21k --adapters my-adapters --replicas 2

starts Ray on this machine. With RAY_ADDRESS set, the same command deploys to that cluster, and so does `serve run
serve:build replicas=2` in this folder. README.md beside this file shows requests and answers.
"""

import json
import os
import signal
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import digits
import ray
from catalogue import Catalogue
from ray import serve
from ray.serve import Application
from service import Service, make_pool
from settings import OUTPUTS, Settings, token
from sources import check_files, from_folder
from transformers import AutoImageProcessor, HfArgumentParser
from validation import Refused, check_name


def build(arguments: Settings | dict) -> Application:
    """The application, for `serve.run` or `serve run`."""
    settings = arguments if isinstance(arguments, Settings) else Settings(**arguments)
    if settings.backbone is None:
        settings.backbone = str(digits.prepare(OUTPUTS.resolve()))
    catalogue = Catalogue(Path(settings.state))
    catalogue.claim(settings.backbone)
    if catalogue.stamp() is None:  # the first start; afterwards only PUT and DELETE change the adapters
        put_all(catalogue, settings)
    print(f"Serving {', '.join(catalogue.read()) or 'no adapters yet'} from {settings.state}", flush=True)
    ignored = sorted({folder.name for folder in folders(settings)} - catalogue.read().keys())
    if ignored:
        print(f"Not served from {settings.adapters}: {', '.join(ignored)}. PUT adds one; --adapters is read only once.")
    return Service.options(
        num_replicas=settings.replicas, ray_actor_options={"num_gpus": settings.gpus_per_replica}
    ).bind(settings, token(), make_pool)


def folders(settings: Settings) -> list[Path]:
    return sorted(Path(settings.adapters).glob("*/")) if settings.adapters else []


def put_all(catalogue: Catalogue, settings: Settings) -> None:
    """Record every adapter in the folder under the name of its own folder. The replicas check whether it fits."""
    processor = json.loads(AutoImageProcessor.from_pretrained(settings.backbone).to_json_string())
    for adapter in folders(settings):
        try:
            files, source = from_folder(check_name(adapter.name), Path(settings.adapters))
            catalogue.put(adapter.name, files, source, lambda copy: check_files(copy, processor))
        except Refused as refused:
            print(f"{adapter} is not served: {refused.reason}")


def start_ray(settings: Settings) -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine. Replicas get this folder's code."""
    code = {"working_dir": str(Path(__file__).parent)}
    if "RAY_ADDRESS" in os.environ:
        ray.init(runtime_env=code)
    else:
        num_cpus = max(os.cpu_count() or 1, settings.replicas)
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        ray.init("local", runtime_env=code, num_cpus=num_cpus, **local)  # without "local" Ray joins a running one


def main() -> None:
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    application = build(settings)
    start_ray(settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # replaces Ray's handler: exit as with Ctrl-C
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(application, logging_config={"enable_access_log": False})
        print(f"Serving on http://{settings.host}:{settings.port}/ (Ctrl-C ends it)", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("Shutting down.")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
