"""examples/serving as its users meet it: over HTTP, with two replicas, one of which is killed, and in a browser."""

import contextlib
import io
import json
import os
import select
import signal
import socket
import tempfile
import threading
import time
from base64 import b64encode
from collections import Counter
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

pytest.importorskip("ray.serve", reason='Ray Serve is not installed: pip install ".[serving]"')

import digits
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from served import LABELS, PATIENCE, Served, save_adapter, serve, wait_for
from transformers import AutoImageProcessor, ViTForImageClassification

pytestmark = pytest.mark.slow
TOKEN = "swordfish"
CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype="uint8")).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("served"), TOKEN) as served:
        yield served


def scores(answer: dict) -> dict[str, dict[str, float]]:
    return {
        prediction["adapter"]: {each["label"]: each["score"] for each in prediction["labels"]}
        for prediction in answer["predictions"]
    }


def expected_scores(served: Served, name: str, labels: list[str], image: bytes, adapter: Path) -> dict[str, float]:
    """What PEFT alone says of the picture."""
    base = ViTForImageClassification.from_pretrained(
        served.folder / "backbone", num_labels=len(labels), ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, adapter).eval()
    processor = AutoImageProcessor.from_pretrained(served.folder / "backbone")
    pixels = processor(Image.open(io.BytesIO(image)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return dict(zip(labels, model(pixel_values=pixels).logits[0].softmax(-1).tolist(), strict=True))


def test_scores_are_those_of_peft_for_several_adapters_of_one_image(served):
    for seed in range(3):
        answer = served.predict(picture(seed), *LABELS)
        assert answer.status == 200, answer.body
        assert list(scores(answer.body)) == list(LABELS)
        for name, labels in LABELS.items():
            expected = expected_scores(served, name, labels, picture(seed), served.folder / "adapters" / name)
            assert scores(answer.body)[name] == pytest.approx(expected, abs=1e-5)  # float32, other order of sums
    best = served.predict(picture(0), "fruit", top=1).body["predictions"][0]["labels"]
    assert [best[0]["label"]] == [
        max(expected := scores(served.predict(picture(0), "fruit").body)["fruit"], key=expected.get)
    ]


def test_requests_for_different_adapters_share_batches(served):
    before = totals(served)
    names = list(LABELS)
    threads = [threading.Thread(target=served.predict, args=(picture(0), names[n % 2])) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batches, pairs = (after - old for after, old in zip(totals(served), before, strict=True))
    assert pairs == 40
    assert batches < 40


def totals(served: Served) -> tuple[int, int]:
    """Batches and pairs of image and adapter of both replicas."""
    replicas = wait_for(partial(two_replicas, served)).values()
    return sum(replica["batches"] for replica in replicas), sum(replica["pairs"] for replica in replicas)


def test_a_form_is_answered_like_the_bare_file(served):
    expected = served.predict(picture(0), *LABELS)
    for name, status in (("file", 200), ("image", 422)):
        body = (
            f'--xyz\r\nContent-Disposition: form-data; name="{name}"; filename="x.png"\r\n'
            "Content-Type: image/png\r\n\r\n"
        ).encode() + picture(0)
        answer = served.ask(
            f"/predict?{'&'.join(f'adapter={name}' for name in LABELS)}",
            "POST",
            body + b"\r\n--xyz--\r\n",
            headers={"Content-Type": "multipart/form-data; boundary=xyz"},
        )
        assert answer.status == status, answer
        if status == 200:
            assert scores(answer.body) == {name: pytest.approx(each) for name, each in scores(expected.body).items()}


def test_the_openapi_page_lists_bodies_and_parameters(served):
    assert "swagger" in served.ask("/docs").body.lower()
    paths = served.ask("/openapi.json").body["paths"]
    predict = paths["/predict"]["post"]
    assert {parameter["name"] for parameter in predict["parameters"]} == {"adapter", "top"}
    assert set(predict["requestBody"]["content"]) == {"image/png", "image/jpeg", "image/webp", "multipart/form-data"}
    put = paths["/adapters/{name}"]["put"]
    assert {parameter["name"] for parameter in put["parameters"]} == {"name"}
    source = put["requestBody"]["content"]["application/json"]["schema"]
    assert set(source["properties"]) == {"folder", "hub", "revision"}


def test_metrics_are_what_prometheus_reads(served):
    served.predict(picture(0), "fruit")
    served.predict(picture(0), "nobody")

    def requests() -> dict[str, float]:
        """Requests to /predict by status, as Prometheus' own client reads them."""
        families = {family.name: family for family in text_string_to_metric_families(served.ask("/metrics").body)}
        assert all(name.startswith("ray_serve_") for name in families)
        counts = Counter()
        for sample in (
            families["ray_serve_num_http_requests"].samples if "ray_serve_num_http_requests" in families else []
        ):
            if sample.labels["route"] == "/predict":
                counts[sample.labels["status_code"]] += sample.value
        return counts

    wait_for(lambda: requests()["200"] >= 1 and requests()["404"] >= 1)


def test_slow_clients_stop_neither_predictions_nor_health_and_are_sent_away(served):
    """Ray lets 256 requests into each of the two replicas unless it is told otherwise."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(slow_client(served)) for _ in range(600)]
        time.sleep(1)  # so that all are in
        for answer in (served.ask("/health"), served.predict(picture(0), "fruit")):
            assert answer.status == 200, answer
        assert not select.select(slow, [], [], 0)[0]  # all of them were still there
        for client in slow:
            client.settimeout(PATIENCE)
            assert client.recv(12) == b"HTTP/1.1 408"


def slow_client(served: Served) -> socket.socket:
    """Announces an image of 5,000 bytes, and sends three."""
    client = socket.create_connection(("127.0.0.1", urlsplit(served.url).port))
    client.sendall(b"POST /predict?adapter=fruit HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc")
    return client


def test_what_is_wrong_with_a_request_is_said(served):
    good = picture(0)
    for answer, status, reason in (
        (served.predict(b"hello", "fruit"), 415, "The image is not a JPEG, PNG or WEBP image"),
        (served.predict(good[:400], "fruit"), 422, "cut off"),
        (served.predict(b"", "fruit"), 422, "empty"),
        (served.predict(bytes(100_001), "fruit"), 413, "longer than 100,000 bytes"),
        (served.predict(bomb(), "fruit"), 413, "2000 x 1000 pixels; at most 1,000,000"),
        (served.predict(thin(), "fruit"), 413, "one side may be 100 times the other"),
        (served.predict(good, "fruit", "nobody"), 404, "No adapter is called 'nobody'"),
        (served.predict(good, "../../etc/passwd"), 422, "cannot name an adapter"),
        (served.predict(good), 422, "names 0 adapters"),
        (served.ask("/adapters/..%2f..%2fx"), 422, "cannot name an adapter"),
        (served.ask("/adapters/nobody"), 404, "No adapter is called"),
    ):
        assert (answer.status, reason in str(answer.body)) == (status, True), answer


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (2000, 1000)).save(file, "PNG")
    return file.getvalue()


def thin() -> bytes:
    file = io.BytesIO()
    Image.new("1", (1, 1_000_000)).save(file, "PNG")
    return file.getvalue()


def put(served: Served, name: str, folder: str, token: str | None = TOKEN):
    return served.ask(f"/adapters/{name}", "PUT", {"folder": folder}, token)


def ask_often(served: Served, *names: str) -> list:
    """So often that both replicas answer."""
    return [served.predict(picture(1), *names) for _ in range(20)]


def test_an_adapter_is_put_replaced_and_deleted_in_all_replicas_at_once(served):
    for version in (1, 2):
        save_adapter(
            served.folder / "backbone", served.folder / "adapters" / f"v{version}", ["yes", "no", "well"], version
        )
    assert ask_often(served, "new")[0].status == 404
    for version in (1, 2):
        expected = expected_scores(
            served, "new", ["yes", "no", "well"], picture(1), served.folder / "adapters" / f"v{version}"
        )
        answer = put(served, "new", f"v{version}")
        assert (answer.status, answer.body["replaced"]) == (200, version == 2), answer
        for prediction in ask_often(served, "new", "fruit"):  # no request sees an earlier version
            assert prediction.status == 200, prediction
            assert scores(prediction.body)["new"] == pytest.approx(expected, abs=1e-5)
    shown = served.ask("/adapters/new").body
    assert (shown["labels"], shown["rank"]) == (["yes", "no", "well"], 2)
    assert np.array(shown["norms"]).shape == (2, 6) == (len(shown["blocks"]), len(shown["matrices"]))
    assert served.ask("/adapters/new", "DELETE", token=TOKEN).status == 200
    assert {answer.status for answer in ask_often(served, "new")} == {404}
    assert served.ask("/adapters/new", "DELETE", token=TOKEN).status == 404


def test_a_put_that_is_refused_changes_nothing(served):
    before = served.ask("/adapters").body
    other = served.folder / "other"
    torch.manual_seed(0)
    deeper = ViTForImageClassification.config_class(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    ViTForImageClassification(deeper).save_pretrained(other)
    save_adapter(other, served.folder / "adapters" / "deeper", ["yes", "no"], 0)
    save_adapter(served.folder / "backbone", served.folder / "adapters" / "short", ["yes", "no"], 0)
    file = served.folder / "adapters" / "short" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for name in ("huge", "surrogate", "null", "nested", "nested processor", "linked"):
        save_adapter(served.folder / "backbone", served.folder / "adapters" / name, ["yes", "no"], 0)
    adapters = served.folder / "adapters"
    weights = load_file(adapters / "huge" / "adapter_model.safetensors")
    factors = {key: tensor * 1e19 if "fact_" in key else tensor for key, tensor in weights.items()}
    save_file(factors, adapters / "huge" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((adapters / "surrogate" / "adapter_config.json").read_text())
    (adapters / "surrogate" / "adapter_config.json").write_text(json.dumps({**config, "labels": ["\ud800", "no"]}))
    (adapters / "null" / "preprocessor_config.json").write_text("null")
    (adapters / "nested" / "adapter_config.json").write_text("[" * 100_000)
    (adapters / "nested processor" / "preprocessor_config.json").write_text('{"size":' * 100_000)
    (adapters / "linked" / "adapter_model.safetensors").unlink()
    (adapters / "linked" / "adapter_model.safetensors").symlink_to(other / "model.safetensors")
    for answer, status, reason in (
        (put(served, "fruit", "sky", token=None), 401, "Authorization"),
        (put(served, "fruit", "sky", token="wrong"), 401, "Authorization"),
        (served.ask("/adapters/fruit", "DELETE"), 401, "Authorization"),
        (put(served, "a%2Fb", "sky"), 422, "cannot name an adapter"),
        (put(served, "fruit", "../state"), 403, "not inside the folder"),
        (put(served, "fruit", "nowhere"), 404, "not there"),
        (put(served, "fruit", "a\0b"), 422, "cannot be the name of a folder"),
        (put(served, "fruit", "x" * 300), 422, "cannot be the name of a folder"),
        (put(served, "fruit", "\ud800"), 422, ""),
        (put(served, "fruit", "huge"), 422, "scores that are not finite"),
        (put(served, "fruit", "surrogate"), 422, "adapter_config.json is no JSON that can be read"),
        (put(served, "fruit", "null"), 422, "preprocessor_config.json holds no JSON object"),
        (put(served, "fruit", "nested"), 422, "adapter_config.json is no JSON that can be read"),
        (put(served, "fruit", "nested processor"), 422, "preprocessor_config.json is no JSON that can be read"),
        (put(served, "fruit", "linked"), 403, "not inside the folder"),
        (put(served, "fruit", "deeper"), 422, ""),
        (put(served, "fruit", "short"), 422, "not a whole safetensors file"),
        (served.ask("/adapters/fruit", "PUT", {"hub": "me/beans"}, TOKEN), 403, "loads from nobody there"),
        (served.ask("/adapters/fruit", "PUT", {}, TOKEN), 422, "Say where"),
    ):
        assert (answer.status, reason in str(answer.body)) == (status, True), answer
    assert served.ask("/adapters").body == before
    expected = expected_scores(served, "fruit", LABELS["fruit"], picture(1), served.folder / "adapters" / "fruit")
    for answer in ask_often(served, "fruit"):
        assert scores(answer.body)["fruit"] == pytest.approx(expected, abs=1e-5)


def two_replicas(served: Served, without: str | None = None) -> dict[str, dict] | None:
    """Both replicas, once both have answered."""
    replicas = served.replicas()
    return replicas if len(replicas) == 2 and without not in replicas else None


def test_killing_a_replica_under_load_loses_nothing_of_a_client_that_retries_once(served):
    save_adapter(served.folder / "backbone", served.folder / "adapters" / "late", ["yes", "no"], 5)
    assert put(served, "late", "late").status == 200  # not there when the replicas started
    names = [*LABELS, "late"]
    expected = [scores(served.predict(picture(seed), *names).body) for seed in range(4)]
    before = wait_for(partial(two_replicas, served))
    stop, counts = threading.Event(), Counter()

    def client(number: int) -> None:
        while not stop.is_set():
            for attempt in ("at once", "by the retry", "lost"):
                answer = served.predict(picture(number), *names) if attempt != "lost" else None
                if answer is None or answer.status == 200:
                    break
            counts[attempt] += 1
            if answer is not None and any(
                scores(answer.body)[name] != pytest.approx(expected[number][name], abs=1e-5) for name in names
            ):
                counts["wrong"] += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in clients:
        thread.start()
    killed = sorted(before)[0]
    try:
        wait_for(lambda: counts["at once"] >= 50)
        os.kill(before[killed]["pid"], signal.SIGKILL)
        after = wait_for(partial(two_replicas, served, without=killed))
        until_then = counts["at once"]
        wait_for(lambda: counts["at once"] >= until_then + 50)
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    print(f"killed 1 of 2 replicas under load: {dict(counts)}")
    assert counts["lost"] == counts["wrong"] == 0
    (new,) = set(after) - set(before)
    assert after[new]["status"] == "ok"
    assert after[new]["adapters"] == after[new]["loaded"] == len(names)


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    if not (CHROMIUM.exists() and CHROMEDRIVER.exists()):
        pytest.skip(f"{CHROMIUM} or {CHROMEDRIVER} is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (
            "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
            f"disable-component-update disable-sync user-data-dir={profile}"
        ).split():
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options, webdriver.ChromeService(str(CHROMEDRIVER)))
        driver.set_page_load_timeout(60)
        try:
            yield driver
        finally:
            driver.quit()


DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), (letter) => letter.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], "picture.png", { type: "image/png" }));
document.getElementById("drop").dispatchEvent(
  new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
"""


@pytest.mark.parametrize("width", [1280, 375])
def test_in_a_browser_a_dropped_image_gets_a_bar_for_every_label_of_two_adapters(served, browser, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(served.url)
    find = lambda selector: browser.find_elements("css selector", selector)  # noqa: E731
    wait_for(lambda: find("#names input"))
    chosen = find("#names input:checked")
    assert [box.get_attribute("value") for box in chosen] == ["fruit"]  # the first, so that an image alone is answered
    browser.execute_script(DROP, b64encode(picture(2)).decode())
    wait_for(lambda: len(find(".prediction")) == 1)
    find("#names input[value=sky]")[0].click()
    wait_for(lambda: len(find(".prediction")) == 2)

    expected = scores(served.predict(picture(2), *LABELS).body)
    for card, name in zip(find(".prediction"), LABELS, strict=True):
        assert card.get_attribute("data-adapter") == name
        bars = card.find_elements("css selector", ".bar")
        track = bars[0].find_element("css selector", ".track").rect["width"]
        for bar, (label, score) in zip(bars, expected[name].items(), strict=True):
            assert bar.find_element("css selector", ".label").text == label
            assert bar.find_element("css selector", "output").text == f"{100 * score:.1f} %"
            # Half a pixel, and a bar that may still be growing is waited for.
            wait_for(lambda bar=bar, width=score * track: abs(width_of_fill(bar) - width) < 1)

    find(".prediction summary")[0].click()
    wait_for(lambda: len(find(".prediction td")) == 2 * 6)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []


def width_of_fill(bar) -> float:
    return bar.find_element("css selector", ".fill").rect["width"]


def test_without_arguments_it_serves_adapters_trained_on_the_digits(tmp_path):
    assert digits.prepare(tmp_path, epochs=1) == tmp_path / "backbone"
    assert {folder.name for folder in (tmp_path / "adapters").iterdir()} == set(digits.TASKS)
    assert len(list((tmp_path / "images").glob("*.png"))) == 10
