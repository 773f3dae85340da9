"""What `serve.build` of examples/serving takes in and says at the first start and at later ones; no service runs."""

import json
import shlex
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason='Ray Serve is not installed: pip install ".[serving]"')

import digits
import serve as command
from catalogue import Catalogue
from served import save_adapter, save_backbone
from settings import Settings
from transformers import HfArgumentParser, ViTImageProcessor

DOCKERFILE = Path(command.__file__).with_name("Dockerfile")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two backbones called ``mine`` and ``other``, and adapters that are wrong in one way."""
    monkeypatch.chdir(tmp_path)
    for backbone in ("mine", "other"):
        save_backbone(tmp_path / backbone)
    for name in ("good", "darker", "damaged", "surrogate", "linked", "with space"):
        save_adapter(tmp_path / "mine", tmp_path / "my-adapters" / name, ["yes", "no"], 0)
    adapters = tmp_path / "my-adapters"
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(adapters / "good")
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1] * 3).save_pretrained(adapters / "darker")
    (adapters / "damaged" / "preprocessor_config.json").write_text("null")
    config = json.loads((adapters / "surrogate" / "adapter_config.json").read_text())
    (adapters / "surrogate" / "adapter_config.json").write_text(json.dumps({**config, "labels": ["\ud800", "no"]}))
    weights = adapters / "linked" / "adapter_model.safetensors"
    weights.rename(tmp_path / "outside.safetensors")
    weights.symlink_to(tmp_path / "outside.safetensors")
    return tmp_path


def served(settings: Settings) -> list[str]:
    return list(Catalogue(Path(settings.state)).read())


def test_the_first_start_takes_in_what_put_would_and_names_the_rest(folder, capsys):
    settings = Settings(backbone="mine", adapters="my-adapters")
    command.build(settings)
    assert served(settings) == ["good"]
    output = capsys.readouterr().out
    assert f"Serving good from {settings.state}" in output
    for name, reason in {
        "darker": "image_mean=[0.1, 0.1, 0.1]",
        "damaged": "preprocessor_config.json holds no JSON object",
        "surrogate": "adapter_config.json is no JSON that can be read",
        "linked": "is not inside the folder",
        "with space": "cannot name an adapter",
    }.items():
        (line,) = [line for line in output.splitlines() if f"/{name} is not served" in line]
        assert reason in line


def test_the_demo_before_does_not_leave_its_adapters_to_another_backbone(folder, capsys, monkeypatch):
    def prepare(outputs: Path) -> Path:
        """Stands for half a minute of training."""
        save_adapter(folder / "other", outputs / "adapters" / "digit", ["zero", "one"], 0)
        return folder / "other"

    monkeypatch.setattr(digits, "prepare", prepare)
    demo, mine = Settings(), Settings(backbone="mine", adapters="my-adapters")
    command.build(demo)
    command.build(mine)
    assert (served(demo), served(mine)) == (["digit"], ["good"])
    with pytest.raises(ValueError, match="holds adapters of the backbone"):
        command.build(Settings(backbone="mine", adapters="my-adapters", state=demo.state))


def test_a_later_start_says_what_it_has_and_what_it_leaves(folder, capsys):
    command.build(Settings(backbone="mine", adapters="my-adapters"))
    save_adapter(folder / "mine", folder / "my-adapters" / "later", ["yes", "no"], 1)
    capsys.readouterr()
    settings = Settings(backbone="mine", adapters="my-adapters")
    command.build(settings)
    assert served(settings) == ["good"]
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"Serving good from {settings.state}"
    assert second.startswith(
        f"Not served from {settings.adapters}: damaged, darker, later, linked, surrogate, with space."
    )


def test_the_container_has_files_and_options_that_exist(monkeypatch):
    monkeypatch.setenv("SERVING_TOKEN", "t")
    root = Path(__file__).parents[1]
    lines = [line.split(maxsplit=1) for line in DOCKERFILE.read_text().splitlines() if line[:1].isupper()]
    copied = [file for kind, rest in lines if kind == "COPY" for file in rest.split()[:-1]]
    assert [file for file in copied if not (root / file).exists()] == []
    assert {"pyproject.toml", "src", "examples"} <= {*copied}
    (entrypoint,) = [json.loads(rest) for kind, rest in lines if kind == "ENTRYPOINT"]
    assert entrypoint[:2] == ["python", "/app/examples/serving/serve.py"]
    readme = DOCKERFILE.with_name("README.md").read_text().replace("\\\n", " ")
    (run,) = [line for line in readme.splitlines() if line.startswith("docker run")]
    image, options = "adapters", shlex.split(run)
    given = options[options.index(image) + 1 :]
    (parsed,) = HfArgumentParser(Settings).parse_args_into_dataclasses(entrypoint[2:] + given)  # exits if it cannot
    assert (parsed.host, parsed.adapters) == ("0.0.0.0", "/adapters")
