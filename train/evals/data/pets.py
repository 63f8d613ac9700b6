"""Oxford-IIIT Pets as it is downloaded: images/*.jpg, and annotations/{trainval,test}.txt, which name image and class number."""

from pathlib import Path

from labels.errors import UserError
from train.evals.data.images import FilePlace, Sample
from train.evals.data.published import Counts, Parts, check_counts, missing

PETS = Counts(train=3680, test=3669, classes=37)


def read_pets(directory: Path, counts: Counts = PETS) -> Parts:
    """Both parts. A class is named as its images are (`Abyssinian_100` -> `Abyssinian`), its number is the list's.

    Raises:
        UserError: a folder, list or image is missing, a line cannot be read, or `counts` differ.
    """
    order: dict[int, str] = {}
    train, test = (_part(directory, f"annotations/{part}.txt", order) for part in ("trainval", "test"))
    classes = tuple(order[number] for number in sorted(order))
    names = tuple(name.replace("_", " ").lower() for name in classes)
    return check_counts("Oxford-IIIT Pets", directory, Parts(train, test, classes, names), counts)


def _part(directory: Path, name: str, order: dict[int, str]) -> list[Sample]:
    file = directory / name
    if not file.is_file() or not (directory / "images").is_dir():
        raise missing("Oxford-IIIT Pets", directory, name if not file.is_file() else "images/")
    samples = []
    for line in file.read_text(encoding="utf8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        stem, number, *_ = *line.split(), ""
        label, image = stem.rpartition("_")[0], directory / "images" / f"{stem}.jpg"
        if not number.isdecimal() or order.setdefault(int(number), label) != label:
            raise UserError(f"{file}: the line {line!r} gives no class, or another than before", allowed="NAME_NUMBER CLASS ...")
        if not image.is_file():
            raise UserError(f"{image} is missing, which {name} names", mend="unpack images.tar.gz again")
        samples.append(Sample(image.name, label, FilePlace.of_file(image)))
    return samples
