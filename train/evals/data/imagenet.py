"""ImageNet-1k as image-net.org and Kaggle give it: train/<wnid>/*.JPEG, and val/ in class folders or flat.

Where val/ is flat, its classes come from the first of these that is there:
    LOC_val_solution.csv                             Kaggle's: image, wnid and boxes
    ILSVRC2012_validation_ground_truth.txt, meta.mat the devkit's: numbers, and the wnids that they stand for
"""

import csv
from pathlib import Path

from labels.errors import UserError
from train.evals.data.images import FilePlace, Sample
from train.evals.data.listing import list_folders, list_images
from train.evals.data.published import Counts, Parts, check_counts, first_file, missing, read_mat

IMAGENET_1K = Counts(train=1_281_167, test=50_000, classes=1000)
_ROOTS = (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_DEVKITS = (".", "data", "devkit", "devkit/data", "ILSVRC2012_devkit_t12/data")
_SYNSETS = ("LOC_synset_mapping.txt", "synset_words.txt", "synsets.txt")


def read_imagenet(directory: Path, counts: Counts = IMAGENET_1K) -> Parts:
    """Both parts; the validation part is the test part, as everywhere. Classes are wnids in sorted order.

    Raises:
        UserError: a part, or the classes of a flat val/, cannot be found; or `counts` differ.
    """
    root = next((directory / root for root in _ROOTS if (directory / root / "train").is_dir()), None)
    if root is None or not (root / "val").is_dir():
        raise missing("ImageNet-1k", directory, "train/<wnid>/*.JPEG with val/ beside it")
    train = list_folders(root / "train")
    classes = tuple(sorted({sample.label for sample in train}))
    test = list_folders(root / "val") or _flat(directory, root / "val")
    return check_counts("ImageNet-1k", directory, Parts(train, test, classes, _names(directory, classes)), counts)


def _flat(directory: Path, val: Path) -> list[Sample]:
    files = list_images(val)
    wnids = _kaggle(directory) or _devkit(directory, len(files))
    without = [file.name for file in files if file.stem not in wnids]
    if without:
        raise UserError(
            f"{len(without)} of {len(files)} images in {val} have no class, the first: {without[0]}",
            allowed="images named as in the list of classes: ILSVRC2012_val_00000001.JPEG and so on",
        )
    return [Sample(file.name, wnids[file.stem], FilePlace.of_file(file)) for file in files]


def _kaggle(directory: Path) -> dict[str, str]:
    """Image name without ending -> wnid."""
    file = first_file(directory, "LOC_val_solution.csv", "../LOC_val_solution.csv")
    if file is None:
        return {}
    with open(file, newline="", encoding="utf8") as stream:
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(stream)}


def _devkit(directory: Path, images: int) -> dict[str, str]:
    """Line i of the ground truth is the number of validation image i; meta.mat says which wnid bears the number."""
    truth = first_file(directory, *(f"{folder}/ILSVRC2012_validation_ground_truth.txt" for folder in _DEVKITS))
    meta = first_file(directory, *(f"{folder}/meta.mat" for folder in _DEVKITS))
    if truth is None or meta is None:
        lacking = "ILSVRC2012_validation_ground_truth.txt" if truth is None else "meta.mat"
        raise UserError(
            f"{directory}/val is flat, and nothing says which image is of which class: {lacking} is missing",
            allowed="LOC_val_solution.csv in DIR, or the devkit (ILSVRC2012_devkit_t12/) in DIR, or val/<wnid>/*.JPEG",
            mend="unpack ILSVRC2012_devkit_t12.tar.gz into DIR",
        )
    wnid_of = {int(synset.ILSVRC2012_ID): str(synset.WNID) for synset in read_mat(meta)["synsets"]}
    numbers = [int(line) for line in truth.read_text(encoding="ascii").split()]
    if len(numbers) != images:
        raise UserError(f"{truth} has {len(numbers)} lines for {images} images", allowed="a line for every image", mend="fetch both whole")
    return {f"ILSVRC2012_val_{index:08d}": wnid_of[number] for index, number in enumerate(numbers, start=1)}


def _names(directory: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The first word of each synset, where a list of synsets is there; else the wnid itself."""
    file = first_file(directory, *_SYNSETS)
    lines = file.read_text(encoding="utf8").splitlines() if file else []
    words = {line.partition(" ")[0]: line.partition(" ")[2].partition(",")[0].strip() for line in lines}
    return tuple(words.get(wnid) or wnid for wnid in classes)
