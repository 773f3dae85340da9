"""Where the public copies of VTAB-1K and of the few-shot sets keep their lists and images."""

import zipfile
from pathlib import Path
from typing import NamedTuple

VTAB_LISTS = {  # and the folders of images that each is made of where there is none
    "train800": ("train800",),
    "val200": ("val200",),
    "train800val200": ("train800", "val200"),
    "test": ("test",),
}


def vtab_folder(task: str) -> str:
    """The folder of a VTAB-1K task; its lists lie in it and name images relative to it."""
    return "cifar" if task == "cifar100" else task


def prepare_vtab_task(data: Path, task: str) -> None:
    """Make the lists of a task where they are not yet there.

    TASK.zip is extracted if there is no folder TASK. If that has folders of images by class, such as TASK/test/CLASS,
    instead of lists, these are written; classes count in the order of their names, numbers by value.

    Raises:
        ValueError: If the splits of a task do not have the same classes.
    """
    folder, archive = data / vtab_folder(task), data / f"{vtab_folder(task)}.zip"
    if not folder.exists() and archive.exists():
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(data)
    splits = {split: folder / split for split in ("train800", "val200", "test")}
    if (folder / "test.txt").exists() or not all(split.is_dir() for split in splits.values()):
        return
    classes = sorted((path.name for path in splits["train800"].iterdir()), key=lambda name: (name.zfill(20), name))
    lines = {}
    for name, split in splits.items():
        unknown = sorted({path.name for path in split.iterdir()} - set(classes))
        if unknown:
            raise ValueError(f"{split} has the classes {', '.join(unknown)}, which {splits['train800']} lacks.")
        images = [(path, classes.index(path.parent.name)) for path in sorted(split.glob("*/*"))]
        lines[name] = [f"{path.relative_to(folder)} {label}\n" for path, label in images]
    for name, parts in VTAB_LISTS.items():
        (folder / f"{name}.txt").write_text("".join(line for part in parts for line in lines[part]))


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
