"""The trip to the Hub and back, over HTTP against `hub_server`. Every step is a process of its own, as for a user."""

import re
import textwrap
from collections.abc import Callable, Iterator

import pytest
from forking import forking
from hub_server import Hub, serve
from huggingface_hub import ModelCard
from upstream import skip_where_lora_is_refused

pytest.importorskip("PIL")
pytest.importorskip("timm")
pytest.importorskip("torchvision")

from PIL import Image

Run = Callable[..., str]

# A base model by Hub id with 5 labels of its own, and an adapter with a head for 3 others.
SETUP = """
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import ViTForImageClassification, ViTImageProcessor
    from backbones import images, make_backbone
    import fact_peft
    from fact_peft import FacTConfig

    names = {0: "cat", 1: "dog", 2: "owl"}
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])

    def base(seed=0):  # the head is random, since me/base has 5 labels
        torch.manual_seed(seed)
        return ViTForImageClassification.from_pretrained(
            "me/base", id2label=names, label2id={}, ignore_mismatched_sizes=True
        )

    def adapted(**settings):
        return get_peft_model(base(seed=1), FacTConfig(rank=4, init_weights=False, **settings)).eval()

    @torch.no_grad()
    def scores(model):
        return model(pixel_values=images()).logits
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run code in a new process in an empty folder; returns what it printed."""
    home = tmp_path_factory.mktemp("home")
    with forking(home, hub.environment(home / "cache")) as fork:

        def run(code: str, setup: str = SETUP, status: int = 0) -> str:
            folder = tmp_path_factory.mktemp("user")
            Image.new("RGB", (20, 20), (200, 30, 90)).save(folder / "image.png")
            found, output = fork(textwrap.dedent(setup) + textwrap.dedent(code), folder)
            assert found == status, output
            return output

        yield run


@pytest.fixture(scope="module")
def pushed(run: Run) -> str:
    """The logits of a classifier pushed to me/pushed, whose base is pushed to me/base before."""
    run("make_backbone('vit').push_to_hub('me/base')")
    code = "model = adapted(); print(scores(model).tolist())\n"
    code += "fact_peft.push_image_classifier(model, processor, 'me/pushed', metrics={'accuracy': 0.875})"
    return re.search(r"^\[\[.*\]\]$", run(code), re.MULTILINE).group()


def test_push_is_one_commit_of_four_files(pushed: str, hub: Hub) -> None:
    first, second = hub.repositories["me/pushed"]
    assert first.keys() == {".gitattributes"}
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"}
    assert second.keys() - first.keys() == names


def test_classifier_comes_back_bit_equal_with_labels_and_preprocessing(pushed: str, run: Run) -> None:
    output = run(f"""
        from transformers import pipeline
        torch.manual_seed(99)
        model, image_processor = fact_peft.load_image_classifier("me/pushed")
        assert scores(model).tolist() == {pushed}
        assert not model.training and image_processor.to_dict() == processor.to_dict()
        classify = pipeline("image-classification", model=model, image_processor=image_processor)
        print("found", sorted(answer["label"] for answer in classify("image.png")))
    """)
    assert "found ['cat', 'dog', 'owl']" in output
    assert "is not supported" not in output


def test_plain_peft_and_transformers_read_the_same_files(pushed: str, run: Run) -> None:
    run(f"""
        from transformers import AutoImageProcessor
        assert scores(PeftModel.from_pretrained(base(), "me/pushed").eval()).tolist() == {pushed}
        assert AutoImageProcessor.from_pretrained("me/pushed").to_dict() == processor.to_dict()
    """)


def test_transformers_own_load_adapter_reads_them_too(pushed: str, run: Run) -> None:
    skip_where_lora_is_refused("load_adapter, with a head")
    run(f"""
        model = base()
        model.load_adapter("me/pushed")
        assert scores(model.eval()).tolist() == {pushed}
    """)


def test_code_in_the_card_runs_as_it_stands(pushed: str, hub: Hub, run: Run) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```$", hub.files("me/pushed")["README.md"].decode(), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 2
    answers = run(blocks[0], setup="")
    assert all(f"'label': '{name}'" in answers for name in ("cat", "dog", "owl"))
    run(
        f"{blocks[1]}\nfrom backbones import images\nassert model(pixel_values=images()).logits.tolist() == {pushed}",
        "",
    )


def test_card_has_the_metadata_the_hub_reads(pushed: str, hub: Hub) -> None:
    card = ModelCard(hub.files("me/pushed")["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": "me/base",
        "library_name": "peft",
        "pipeline_tag": "image-classification",
        "tags": ["base_model:adapter:me/base", "fact", "transformers"],
    }
    assert "| accuracy | 0.875 |" in card.text


def test_timm_classifier_comes_back_from_the_hub(hub: Hub, run: Run) -> None:
    setup = """
    import timm, torch
    from peft import get_peft_model
    import fact_peft
    from timm.models import save_for_hf
    from huggingface_hub import create_repo, upload_folder

    @torch.no_grad()
    def scores(model):
        return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    """
    code = """
    torch.manual_seed(0)
    tiny = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2)
    save_for_hf(tiny, "base", safe_serialization=True)
    create_repo("me/timm-base")
    upload_folder(repo_id="me/timm-base", folder_path="base")
    vit = timm.create_model("hf-hub:me/timm-base", pretrained=True, num_classes=3, global_pool="avg", fc_norm=False)
    config = fact_peft.FacTConfig(rank=4, init_weights=False, labels=["cat", "dog", "owl"])
    model = get_peft_model(vit, config).eval()
    fact_peft.push_image_classifier(model, None, "me/timm-adapter", metrics={"accuracy": 0.875})
    loaded, _ = fact_peft.load_image_classifier("me/timm-adapter")
    assert torch.equal(scores(loaded), scores(model))
    print(scores(model).tolist())
    """
    pushed = re.search(r"^\[\[.*\]\]$", run(code, setup), re.MULTILINE).group()
    card = hub.files("me/timm-adapter")["README.md"].decode()
    classify, plain = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert run(classify, "").split()[-1] in ("cat", "dog", "owl")
    run(f"{plain}\nassert scores(model.eval()).tolist() == {pushed}", setup)
    assert "base_model:adapter:me/timm-base" in card


def test_second_push_updates_files_and_keeps_what_a_user_wrote(pushed: str, hub: Hub, run: Run) -> None:
    files = hub.files("me/pushed")
    card = files["README.md"].decode().replace("tags:", "license: mit\ntags:")
    hub.repositories["me/pushed"].append({**files, "README.md": f"{card}\nTrained on my holiday pictures.\n".encode()})
    revision = hub.commit_id("me/pushed")
    run(f"""
        model = adapted(scale=2.0)
        fact_peft.push_image_classifier(model, processor, "me/pushed", metrics={{"accuracy": 0.9}}, private=True)
        again, _ = fact_peft.load_image_classifier("me/pushed")
        assert torch.equal(scores(again), scores(model)) and scores(model).tolist() != {pushed}
        before, _ = fact_peft.load_image_classifier("me/pushed", revision="{revision}")
        assert scores(before).tolist() == {pushed}
    """)
    text = hub.files("me/pushed")["README.md"].decode()
    assert "license: mit" in text and text.count("Trained on my holiday pictures.") == 1
    assert "0.9 |" in text and "0.875" not in text and text.count("# me/pushed") == 1


def test_base_given_by_its_id_replaces_the_local_folder(pushed: str, hub: Hub, run: Run) -> None:
    output = run(
        """
        import os
        import pytest
        folder = os.path.abspath("local-base")
        base().save_pretrained(folder)
        local = ViTForImageClassification.from_pretrained(folder)
        model = get_peft_model(local, FacTConfig(rank=4), adapter_name="birds")
        with pytest.raises(ValueError, match="local-base' is not on the Hub.*base_model="):
            fact_peft.push_image_classifier(model, processor, "me/named")
        print("repositories untouched")
        fact_peft.push_image_classifier(model, processor, "me/named", base_model="me/base", private=True)
        assert model.peft_config["birds"].base_model_name_or_path == folder
        fact_peft.load_image_classifier("me/named")
        """
    )
    assert "repositories untouched" in output
    assert "me/named" in hub.private and len(hub.repositories["me/named"]) == 2
    assert all(b"local-base" not in content for content in hub.files("me/named").values())


def test_base_is_taken_at_the_revision_the_adapter_names(pushed: str, hub: Hub, run: Run) -> None:
    revision = hub.commit_id("me/base")
    run(f"""
        model = adapted(revision="{revision}")
        fact_peft.push_image_classifier(model, processor, "me/pinned")
        other = make_backbone("vit")
        other.vit.layers[0].mlp.fc1.weight.data.mul_(2)
        other.push_to_hub("me/base")
        assert scores(fact_peft.load_image_classifier("me/pinned")[0]).tolist() == {pushed}
        assert scores(fact_peft.load_image_classifier("me/pinned", base_model="me/base")[0]).tolist() != {pushed}
    """)
    hub.repositories["me/base"].pop()
    assert f'revision="{revision}"' in hub.files("me/pinned")["README.md"].decode()


def test_token_reaches_every_request(pushed: str, hub: Hub, run: Run) -> None:
    hub.private.add("me/base")
    run(f"""
        import os
        import pytest
        model = adapted()
        token = os.environ.pop("HF_TOKEN")
        for _ in range(2):
            fact_peft.push_image_classifier(model, processor, "me/secret", private=True, token=token)
        assert scores(fact_peft.load_image_classifier("me/secret", token=token)[0]).tolist() == {pushed}
        with pytest.raises(OSError, match="me/base(?s:.*)pass a token"):  # the adapter itself is in the cache by now
            fact_peft.load_image_classifier("me/secret")
    """)
    hub.private.remove("me/base")
    assert len(hub.repositories["me/secret"]) == 3


def test_refused_push_sends_nothing(pushed: str, hub: Hub, run: Run) -> None:
    run(
        """
        model = get_peft_model(make_backbone("vit"), FacTConfig(rank=4))
        fact_peft.push_image_classifier(model, processor, "me/refused")
        """,
        status=1,
    )
    assert not any("refused" in request for request in hub.requests) and "me/refused" not in hub.repositories


def test_peft_push_to_hub_is_whole(pushed: str, run: Run) -> None:
    run(f"""
        model = adapted()
        model.push_to_hub("me/plain")
        assert torch.equal(scores(PeftModel.from_pretrained(base(), "me/plain").eval()), scores(model))
        processor.push_to_hub("me/plain")
        loaded, image_processor = fact_peft.load_image_classifier("me/plain")
        assert scores(loaded).tolist() == {pushed}
        assert loaded.config.id2label == names and image_processor.to_dict() == processor.to_dict()
    """)


def test_trainer_push_to_hub_is_whole(pushed: str, hub: Hub, run: Run) -> None:
    run("""
        from transformers import Trainer, TrainingArguments
        model = adapted()
        arguments = TrainingArguments("out", hub_model_id="me/trained", use_cpu=True, report_to=[])
        trainer = Trainer(model, arguments, processing_class=processor)
        trainer.push_to_hub()
        loaded, image_processor = fact_peft.load_image_classifier("me/trained")
        assert torch.equal(scores(loaded), scores(model))
        assert image_processor.to_dict() == processor.to_dict()
    """)


def test_missing_repository_is_said_by_the_hub(run: Run) -> None:
    output = run("fact_peft.load_image_classifier('me/nothing')", status=1)
    assert "RepositoryNotFoundError" in output and "Repository Not Found" in output


def test_no_file_that_was_pushed_names_a_local_folder(
    pushed: str, hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Trainer pushes its arguments too, with the folder it wrote to.
    for repo_id in hub.repositories.keys() - {"me/trained"}:
        for files in hub.repositories[repo_id]:
            for name, content in files.items():
                assert str(tmp_path_factory.getbasetemp()).encode() not in content, (repo_id, name)
