"""Where the public copies of VTAB-1K and of the few-shot sets keep their lists and images."""

from pathlib import Path
from typing import NamedTuple


def vtab_folder(task: str) -> str:
    """The folder of a VTAB-1K task; its lists lie in it and name images relative to it."""
    return "cifar" if task == "cifar100" else task


class FewShotSet(NamedTuple):
    folder: str
    num_classes: int


# The folders of the public splits, one of which is misspelt there.
FEW_SHOT_SETS = {
    "food101": FewShotSet("food101", 101),
    "stanford_cars": FewShotSet("standford-cars", 196),
    "flowers102": FewShotSet("oxford-flowers102", 102),
    "fgvc_aircraft": FewShotSet("fgvc-aircraft", 100),
    "oxford_pets": FewShotSet("oxford-pets", 37),
}


def few_shot_annotations(data: Path, name: str) -> str:
    """The folder of a set's lists, relative to `data`: SET/annotations, or few-shot_split/SET/annotations."""
    split = Path("few-shot_split", FEW_SHOT_SETS[name].folder, "annotations")
    return str(split if (data / split).is_dir() else Path(FEW_SHOT_SETS[name].folder, "annotations"))


def few_shot_images(data: Path, name: str) -> str:
    """The folder that a set's lists count from, relative to `data`: SET/images, or SET where there is none such."""
    images = Path(FEW_SHOT_SETS[name].folder, "images")
    return str(images if (data / images).is_dir() else images.parent)


def few_shot_train_list(shots: int, seed: int) -> str:
    return f"train_meta.list.num_shot_{shots}.seed_{seed}"
