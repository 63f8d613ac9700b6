"""Stanford Cars as it is downloaded: cars_train/, cars_test/ and the devkit's .mat files; or its folder form.

cars_train/*.jpg  cars_test/*.jpg  devkit/{cars_meta,cars_train_annos}.mat  cars_test_annos_withlabels.mat
train/<make model year>/*.jpg  test/<make model year>/*.jpg     (Kaggle: below car_data/car_data)
"""

from pathlib import Path

from labels.errors import UserError
from train.evals.data.images import FilePlace, Sample, class_order
from train.evals.data.listing import list_folders
from train.evals.data.published import Counts, Parts, check_counts, first_file, missing, read_mat

CARS = Counts(train=8144, test=8041, classes=196)
_FOLDER_ROOTS = (".", "car_data/car_data", "car_data")
_TEST_LISTS = ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")


def read_cars(directory: Path, counts: Counts = CARS) -> Parts:
    """Both parts, from whichever of the two forms is there.

    Raises:
        UserError: neither is there, an image is missing, or `counts` differ.
    """
    root = next((directory / root for root in _FOLDER_ROOTS if (directory / root / "train").is_dir()), None)
    if root is not None and (root / "test").is_dir():
        train, test = list_folders(root / "train"), list_folders(root / "test")
        classes = class_order(sample.label for sample in train)
    else:
        train, test, classes = _devkit(directory)
    return check_counts("Stanford Cars", directory, Parts(train, test, classes, classes), counts)


def _devkit(directory: Path) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    meta = first_file(directory, "devkit/cars_meta.mat", "cars_meta.mat")
    train = first_file(directory, "devkit/cars_train_annos.mat", "cars_train_annos.mat")
    test = first_file(directory, *_TEST_LISTS)
    wanted = {"devkit/cars_meta.mat": meta, "devkit/cars_train_annos.mat": train, _TEST_LISTS[0]: test}
    lacking = [name for name, file in wanted.items() if file is None]
    if meta is None or train is None or test is None:
        raise missing("Stanford Cars", directory, f"{lacking[0]} (or the folders train/ and test/)")
    classes = tuple(map(str, read_mat(meta)["class_names"]))
    return _part(directory / "cars_train", train, classes), _part(directory / "cars_test", test, classes), classes


def _part(folder: Path, annotations: Path, classes: tuple[str, ...]) -> list[Sample]:
    samples = []
    for annotation in read_mat(annotations)["annotations"]:
        file = folder / str(annotation.fname)
        if not file.is_file():
            raise UserError(f"{file} is missing, which {annotations.name} names", mend=f"unpack {folder.name}.tgz again")
        samples.append(Sample(file.name, classes[int(getattr(annotation, "class")) - 1], FilePlace.of_file(file)))
    return samples
