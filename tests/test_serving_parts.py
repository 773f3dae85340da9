"""The parts of examples/serving that need no running service: what is refused, and what the replicas share."""

import asyncio
import io
import json
import multiprocessing
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import make_backbone
from peft import get_peft_model
from transformers import ViTImageProcessor

from fact_peft import FacTConfig

pytest.importorskip("PIL")
pytest.importorskip("starlette")
pytest.importorskip("torchvision")

from catalogue import ADAPTER_FILES, Catalogue
from PIL import Image
from served_pool import ServedPool
from settings import Settings
from sources import MAX_FILE_BYTES, check_files, check_source, from_folder, from_hub
from starlette.requests import Request
from validation import Refused, check_adapters, check_name, check_token, decode_image, read_body


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """The header of a picture of that size, and a kilobyte of zeros for its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def refusal(function, *arguments: object) -> Refused:
    with pytest.raises(Refused) as caught:
        result = function(*arguments)
        if asyncio.iscoroutine(result):
            asyncio.run(result)
    return caught.value


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../a", "a\\b", "a\n", "a b", "é", "-a", "x" * 97, "a\0"])
def test_names_that_are_paths_or_odd_are_refused(name):
    assert (refusal(check_name, name).status, "cannot name an adapter" in refusal(check_name, name).reason) == (
        422,
        True,
    )


def test_names_of_one_request_are_known_few_and_not_repeated():
    known = {"a": 1, "b.2": 1}
    assert check_adapters(["b.2", "a", "b.2"], known) == ["b.2", "a"]
    assert refusal(check_adapters, ["a", "c"], known).reason == "No adapter is called 'c'; GET /adapters lists all."
    assert refusal(check_adapters, ["a", "c"], known).status == 404
    assert refusal(check_adapters, ["../a"], known).status == 422
    assert refusal(check_adapters, [], known).status == 422
    assert refusal(check_adapters, ["a"] * 65, known).status == 422


def test_a_token_is_wanted_only_where_one_is_set():
    check_token(None, None)
    check_token("right", "right")
    for wrong in (None, "", "wrong", "right ", "é"):
        assert refusal(check_token, wrong, "right").status == 401


def request(*parts: bytes, pause: float = 0.0, **headers: str) -> Request:
    """A request whose body arrives in parts, with a pause before each."""
    left = list(parts)

    async def receive() -> dict:
        if not left:
            raise AssertionError("was read beyond its end")
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": lines}, receive)


def test_a_body_over_the_limit_is_refused_by_its_header_or_when_it_has_grown():
    assert asyncio.run(read_body(request(b"ab", b"c", content_length="3"), 3, 60)) == b"abc"
    assert asyncio.run(read_body(request(b"ab", b"c"), 3, 60)) == b"abc"
    assert refusal(read_body, request(content_length="4"), 3, 60).status == 413  # is not read at all
    assert refusal(read_body, request(b"ab", b"cd"), 3, 60).status == 413
    assert refusal(read_body, request(b"ab", b"cd", content_length="2"), 3, 60).status == 413  # a header that lies


def test_a_body_that_arrives_too_slowly_is_refused():
    start = time.monotonic()
    assert refusal(read_body, request(*[b"a"] * 60, pause=1), 100, 0.2).status == 408
    assert time.monotonic() - start < 30


FORM = "multipart/form-data; boundary=xyz"


def form(name: str, content: bytes) -> bytes:
    header = f'--xyz\r\nContent-Disposition: form-data; name="{name}"; filename="x.png"\r\n\r\n'
    return header.encode() + content + b"\r\n--xyz--\r\n"


def test_a_form_holds_the_image_as_file():
    content = bytes(range(256)) * 5000 + b"\r\n--xy"  # above a megabyte starlette keeps a file on disk
    whole = form("file", content)
    parts = [whole[start : start + 70_000] for start in range(0, len(whole), 70_000)]
    assert asyncio.run(read_body(request(*parts, content_type=FORM), len(whole), 60)) == content
    assert refusal(read_body, request(*parts, content_type=FORM), len(whole) - 1, 60).status == 413
    for body, kind in (
        (form("image", b"abc"), FORM),
        (b"abc", FORM),
        (form("file", b"abc"), "multipart/form-data"),
        (b'--xyz\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc\r\n--xyz--\r\n', FORM),  # text, no file
    ):
        assert refusal(read_body, request(body, content_type=kind), 10_000, 60).status == 422, body


# Starlette leaves the file of a part that does not end to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_form_that_is_cut_off_is_refused():
    assert refusal(read_body, request(form("file", b"abc")[:-12], content_type=FORM), 10_000, 60).status == 422


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_decoded_in_three_formats(kind):
    image = Image.new("RGB", (30, 20), (200, 10, 10))
    decoded = decode_image(encoded(image, kind), 600)
    assert (decoded.size, decoded.convert("RGB").getpixel((5, 5))[0] > 150) == ((30, 20), True)


def test_16_bit_greys_are_scaled_and_not_clipped():
    grey = np.arange(256, dtype="uint8").reshape(16, 16)
    decoded = decode_image(encoded(Image.fromarray(grey.astype("uint16") * 257), "PNG"), 600)
    assert np.array_equal(np.asarray(decoded.convert("RGB"))[..., 0], grey)


def test_a_photograph_taken_sideways_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by a quarter
    assert decode_image(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif), 600).size == (20, 30)


def test_what_is_no_picture_is_refused():
    assert refusal(decode_image, b"", 100).status == 422
    for data in (
        b"hello",
        b"\x80\x04." * 9,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encoded(Image.new("L", (2, 2)), "GIF"),
    ):
        assert (refusal(decode_image, data, 100).status, refusal(decode_image, data, 100).reason) == (
            415,
            "The image is not a JPEG, PNG or WEBP image.",
        )


@pytest.mark.parametrize("side", [5_000, 12_000, 60_000])  # below, above and far above Pillow's own limits
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("was decoded"))
    assert refusal(decode_image, png_that_claims(side, side), 20_000_000).status == 413


@pytest.mark.parametrize("size", [(1, 20_000_000), (20_000_000, 1), (1, 101)])
def test_an_image_that_resizing_would_make_huge_is_refused_before_it_is_decoded(size, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("was decoded"))
    assert refusal(decode_image, png_that_claims(*size), 20_000_000).status == 413


def test_the_longest_image_that_is_accepted_is_resized_to_few_pixels():
    image = decode_image(encoded(Image.new("RGB", (30, 3000))), 20_000_000)
    processor = ViTImageProcessor(size={"shortest_edge": 16})
    assert processor(image, return_tensors="pt")["pixel_values"].shape[-2:] == (1600, 16)


def test_damaged_pictures_are_refused_whatever_their_decoder_raises():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = encoded(Image.fromarray(noise.numpy()), kind)
        assert refusal(decode_image, whole[: len(whole) // 2], 256).status in (415, 422)
        for _ in range(200):
            damaged = bytearray(whole)
            for place in torch.randint(0, len(whole), (3,), generator=generator):
                damaged[place] ^= 1 << int(torch.randint(0, 8, (), generator=generator))
            try:
                decode_image(bytes(damaged), 256)
            except Refused as refused:
                assert refused.status in (413, 415, 422)


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """Two adapters of the tiny ViT, ``a`` and ``b``."""
    folder = tmp_path / "adapters"
    for seed, name in enumerate("ab"):
        vit = make_backbone("vit")
        torch.manual_seed(seed)
        get_peft_model(vit, FacTConfig(rank=2, init_weights=False)).save_pretrained(folder / name)
    return folder


def test_only_folders_below_the_allowed_one_are_loaded_from(adapters, tmp_path):
    assert from_folder("a", adapters) == (adapters.resolve() / "a", "a")
    (adapters / "out").symlink_to(tmp_path)
    for name in ("", ".", "..", "../adapters", str(tmp_path), "out", "a/../.."):
        assert refusal(from_folder, name, adapters).status == 403, name
    assert refusal(from_folder, "c", adapters).status == 404
    (adapters / "circle").symlink_to("circle")
    for name in ("a\0", "x" * 300, "circle", "x/" * 5000):
        assert refusal(from_folder, name, adapters).status in (404, 422), name
    assert refusal(from_folder, "a", None).status == 403


@pytest.mark.parametrize("file", sorted(MAX_FILE_BYTES))
def test_no_file_of_an_adapter_may_be_a_link_that_leads_out(adapters, tmp_path, file):
    (tmp_path / "secret").write_text("{}")
    (adapters / "a" / file).unlink(missing_ok=True)
    (adapters / "a" / file).symlink_to(tmp_path / "secret")
    assert refusal(from_folder, "a", adapters).status == 403
    (adapters / "a" / file).unlink()
    (adapters / "real").write_bytes(b"{}")
    (adapters / "a" / file).symlink_to(adapters / "real")  # within the folder
    assert from_folder("a", adapters)[1] == "a"


@pytest.mark.parametrize("file", sorted(MAX_FILE_BYTES))
def test_files_too_large_to_read_are_refused_by_their_size(adapters, file):
    with open(adapters / "a" / file, "a") as opened:
        os.truncate(opened.fileno(), MAX_FILE_BYTES[file] + 1)  # no block of it is on the disk
    assert refusal(from_folder, "a", adapters).status == 413


def test_a_label_list_of_twenty_million_is_over_the_limit():
    assert len(json.dumps(["0"] * 1000)) * 20_000 > MAX_FILE_BYTES["adapter_config.json"]


def test_a_source_is_a_folder_or_a_repository():
    assert check_source(b'{"folder": "a"}').folder == "a"
    assert check_source(b'{"hub": "me/a", "revision": "v1"}').revision == "v1"
    for body in (b"", b"x", b"[]", b"{}", b'{"folder": 1}', b'{"folder": "a", "hub": "me/a"}'):
        assert refusal(check_source, body).status == 422


def test_only_safetensors_are_loaded(adapters):
    (adapters / "a" / "adapter_model.safetensors").rename(adapters / "a" / "adapter_model.bin")
    refused = refusal(from_folder, "a", adapters)
    assert refused.status == 422
    assert refused.reason == "'a' has no adapter_model.safetensors. Only adapters saved as safetensors are loaded."


@pytest.mark.parametrize("name", ["you/beans", "me", "me/../you/beans", "/me/beans", "me/beans/x", "http://h/me/beans"])
def test_only_named_owners_of_the_hub_are_loaded_from(name):
    assert refusal(from_hub, name, None, ["me"]).status == 403


def test_an_adapter_for_other_pixels_is_refused(adapters):
    ours = {"size": {"height": 16, "width": 16}, "image_mean": [0.5], "image_std": [0.5]}
    check_files(adapters / "a", ours)  # it does not say
    (adapters / "a" / "preprocessor_config.json").write_text(json.dumps({**ours, "image_mean": [0.4]}))
    assert "image_mean=[0.4]" in refusal(check_files, adapters / "a", ours).reason
    (adapters / "a" / "preprocessor_config.json").write_text(json.dumps(ours))
    check_files(adapters / "a", ours)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"3", b"\xff{}", b"[" * 100_000, b'{"size": "\\ud800"}', b'{"\\udfff": 1}']
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "adapter_config.json"])
def test_settings_that_are_damaged_or_no_text_are_refused(adapters, file, content):
    (adapters / "a" / file).write_bytes(content)
    refused = refusal(check_files, adapters / "a", {"size": {"height": 16, "width": 16}})
    assert (refused.status, refused.reason.startswith(file)) == (422, True)


def contents(catalogue: Catalogue) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(catalogue.state.rglob("*")) if path.is_file()}


def test_a_catalogue_keeps_versions_apart_and_forgets_what_no_name_stands_for(adapters, tmp_path):
    catalogue = Catalogue(tmp_path / "state")
    first = catalogue.put("x", adapters / "a", "a")
    assert catalogue.put("y", adapters / "a", "a") == first  # the same files once
    second = catalogue.put("x", adapters / "b", "b")
    assert second != first
    assert {path.name for path in (catalogue.state / "files").iterdir()} == {first.files, second.files}
    for file in ADAPTER_FILES:
        assert (catalogue.folder(second) / file).read_bytes() == (adapters / "b" / file).read_bytes()
    catalogue.remove("y")
    assert [path.name for path in (catalogue.state / "files").iterdir()] == [second.files]
    assert Catalogue(tmp_path / "state").read() == {"x": second}
    with pytest.raises(KeyError):
        catalogue.remove("y")


def test_a_copy_that_is_refused_leaves_the_catalogue_as_it_was(adapters, tmp_path):
    catalogue = Catalogue(tmp_path / "state")
    catalogue.put("x", adapters / "a", "a")
    before, stamp = contents(catalogue), catalogue.stamp()

    def refuse(folder: Path) -> None:
        assert (folder / "adapter_model.safetensors").is_file()
        raise Refused(422, "no")

    assert refusal(catalogue.put, "x", adapters / "b", "b", refuse).reason == "no"
    assert (contents(catalogue), catalogue.stamp()) == (before, stamp)
    with pytest.raises(FileNotFoundError):
        catalogue.put("x", tmp_path / "nowhere", "b")
    assert (contents(catalogue), catalogue.stamp()) == (before, stamp)


def put_many(state: Path, adapter: Path, first: int) -> None:
    for number in range(first, first + 20):
        Catalogue(state).put(f"n{number}", adapter, "")


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_writers_in_several_processes_lose_nothing(adapters, tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=put_many, args=(tmp_path / "state", adapters / name, first))
        for name, first in (("a", 0), ("b", 20))
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    catalogue = Catalogue(tmp_path / "state")
    assert len(catalogue.read()) == 40
    assert len(list((catalogue.state / "files").iterdir())) == 2


def test_a_state_belongs_to_one_backbone(tmp_path):
    Catalogue(tmp_path).claim("google/vit")
    Catalogue(tmp_path).claim("google/vit")
    with pytest.raises(ValueError, match=r"holds adapters of the backbone 'google/vit', not of 'mine'. Pass another"):
        Catalogue(tmp_path).claim("mine")


def test_every_backbone_has_a_state_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    states = [Settings().state, *(Settings(backbone=name).state for name in ("a/vit", "b/vit", "vit", "a--vit"))]
    assert len({*states}) == 5
    assert Settings().adapters == str(tmp_path / "outputs" / "serving" / "adapters")
    assert Settings(backbone="a/vit").adapters is None  # not those of the digits
    assert Settings(state="here").state == str(tmp_path / "here")


def test_a_service_open_to_the_network_needs_a_token(monkeypatch):
    monkeypatch.delenv("SERVING_TOKEN", raising=False)
    assert Settings(port="8001").port == 8001  # as `serve run` passes it
    with pytest.raises(ValueError, match="set the environment variable SERVING_TOKEN"):
        Settings(host="0.0.0.0")
    monkeypatch.setenv("SERVING_TOKEN", "t")
    assert Settings(host="0.0.0.0").host == "0.0.0.0"


class Recorded:
    """Stands for a pool: remembers what it loaded, and refuses what `broken` names."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.broken: set[str] = set()
        self.loads = 0

    def load(self, name: str, folder: Path) -> None:
        self.loads += 1
        if name in self.broken:
            raise ValueError("broken")
        self.held[name] = (folder / "adapter_model.safetensors").read_bytes()

    def unload(self, name: str) -> None:
        del self.held[name]

    def __call__(self, pixels: torch.Tensor, names: list[str]) -> list[tuple[float, bytes]]:
        return [(image.sum().item(), self.held[name]) for image, name in zip(pixels, names, strict=True)]


def test_a_pool_follows_the_catalogue_and_loads_only_what_changed(adapters, tmp_path):
    catalogue = Catalogue(tmp_path / "state")
    weights = {name: (adapters / name / "adapter_model.safetensors").read_bytes() for name in "ab"}
    catalogue.put("x", adapters / "a", "a")
    catalogue.put("y", adapters / "a", "a")
    served = ServedPool(pool := Recorded(), catalogue)
    assert (pool.held, pool.loads) == ({"x": weights["a"], "y": weights["a"]}, 2)

    another = Catalogue(tmp_path / "state")  # as in another replica
    another.put("y", adapters / "b", "b")
    another.put("z", adapters / "b", "b")
    another.remove("x")
    assert list(served.known()) == ["y", "z"]
    one, two = torch.ones(1, 1, 1), 2 * torch.ones(1, 1, 1)
    answers = served.classify([(one, "y"), (one, "x"), (two, "z")])
    assert (answers[0], answers[2]) == ((1.0, weights["b"]), (2.0, weights["b"]))
    assert (answers[1].status, answers[1].reason) == (404, "The adapter 'x' was deleted while the request was waiting.")
    assert (pool.held, pool.loads) == ({"y": weights["b"], "z": weights["b"]}, 4)
    assert served.classify([(one, "x")])[0].status == 404
    assert served.health() == {"status": "ok", "adapters": 2, "loaded": 2, "failed": {}}


def test_an_adapter_that_does_not_load_is_missed_alone_and_never_served_in_an_earlier_version(adapters, tmp_path):
    catalogue = Catalogue(tmp_path / "state")
    catalogue.put("x", adapters / "a", "a")
    catalogue.put("y", adapters / "a", "a")
    served = ServedPool(pool := Recorded(), catalogue)
    pool.broken.add("y")
    catalogue.put("y", adapters / "b", "b")
    pixels = torch.ones(1, 1, 1)
    good, bad = served.classify([(pixels, "x"), (pixels, "y")])
    assert good[1] == pool.held["x"]
    assert (bad.status, bad.reason) == (503, "The adapter 'y' could not be loaded: broken")
    assert served.health() == {"status": "incomplete", "adapters": 2, "loaded": 1, "failed": {"y": "broken"}}
    pool.broken.clear()
    catalogue.put("y", adapters / "a", "a")
    with served.lock:  # as during a batch
        assert served.health()["status"] == "incomplete"
    assert served.health()["status"] == "ok"


def test_a_change_in_the_middle_of_following_is_followed_too(adapters, tmp_path):
    catalogue = Catalogue(tmp_path / "state")
    pool = Recorded()

    def load(name: str, folder: Path) -> None:
        if name == "x" and not pool.loads:
            catalogue.put("x", adapters / "b", "b")  # whose files take the place of those about to be read
        Recorded.load(pool, name, folder)

    pool.load = load
    catalogue.put("x", adapters / "a", "a")
    served = ServedPool(pool, catalogue)
    assert pool.held == {"x": (adapters / "b" / "adapter_model.safetensors").read_bytes()}
    assert served.health()["status"] == "ok"
