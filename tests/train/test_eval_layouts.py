"""Published data sets in the layout they are downloaded in: what is read, and the errors when it is not all there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.io import savemat

from image_folders import encoded, sample, write_folders, write_tar
from labels.storage import UserError
from train.evals.data.captions import load_captions
from train.evals.data.sets import CARS, IMAGENET_1K, PETS, Counts, load_data, read_cars, read_imagenet, read_pets

WNIDS = ("n01440764", "n01443537", "n02085620")


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def write_image(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded((shade, 1, 2), "JPEG"))
    return path


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for number, wnid in enumerate(WNIDS):
        for index in range(2):
            write_image(tmp_path / "train" / wnid / f"{wnid}_{index}.JPEG", 10 * number + index)
    for index in range(1, 5):
        write_image(tmp_path / "val" / f"ILSVRC2012_val_{index:08d}.JPEG", 100 + index)
    return tmp_path


COUNTS = Counts(6, 4, 3)
VAL = [2, 0, 1, 1]  # positions in WNIDS


def val_classes(directory: Path) -> list[int]:
    parts = read_imagenet(directory, COUNTS)
    assert parts.classes == WNIDS and len(parts.train) == 6
    return [WNIDS.index(sample.label) for sample in parts.test]


def test_imagenet_with_val_in_folders(imagenet: Path) -> None:
    for index, number in enumerate(VAL, start=1):
        (imagenet / "val" / WNIDS[number]).mkdir(exist_ok=True)
        name = f"ILSVRC2012_val_{index:08d}.JPEG"
        shutil.move(imagenet / "val" / name, imagenet / "val" / WNIDS[number] / name)
    assert val_classes(imagenet) == sorted(VAL)


def test_imagenet_as_kaggle_gives_it(imagenet: Path) -> None:
    root = imagenet / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    root.mkdir(parents=True)
    for part in ("train", "val"):
        shutil.move(imagenet / part, root / part)
    lines = [f"ILSVRC2012_val_{index:08d},{WNIDS[number]} 1 2 3 4 " for index, number in enumerate(VAL, start=1)]
    (imagenet / "kaggle" / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines[::-1]]))
    (imagenet / "kaggle" / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    assert val_classes(imagenet / "kaggle") == VAL
    assert read_imagenet(imagenet / "kaggle", COUNTS).names == ("tench", "goldfish", "n02085620")


def test_imagenet_with_the_devkits_own_numbers(imagenet: Path) -> None:
    devkit = imagenet / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    text = refusal(read_imagenet, imagenet, COUNTS)
    assert (
        "no file gives the classes of its images: ILSVRC2012_validation_ground_truth.txt is missing" in text
        and "devkit" in text
    )
    numbers = [3, 1, 2]  # the devkit numbers classes otherwise than their sorted wnids do
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(str(numbers[number]) for number in VAL))
    assert "meta.mat is missing" in refusal(read_imagenet, imagenet, COUNTS)
    synsets = np.array(
        [(number, wnid) for number, wnid in zip(numbers, WNIDS, strict=True)],
        dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")],
    )
    savemat(devkit / "meta.mat", {"synsets": synsets})
    assert val_classes(imagenet) == VAL
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n")
    assert "has 2 lines for 4 images" in refusal(read_imagenet, imagenet, COUNTS)
    (devkit / "meta.mat").write_bytes(b"no mat")
    assert "is not readable as a MATLAB file" in refusal(read_imagenet, imagenet, COUNTS)


def test_counts_of_a_whole_copy(imagenet: Path) -> None:
    assert (Counts(1_281_167, 50_000, 1000), Counts(3680, 3669, 37), Counts(8144, 8041, 196)) == (
        IMAGENET_1K,
        PETS,
        CARS,
    )
    (imagenet / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n" + "\n".join(f"ILSVRC2012_val_{index:08d},{WNIDS[0]} 1" for index in range(1, 5))
    )
    text = refusal(load_data, f"imagenet:{imagenet}")
    assert (
        "holds 6 training images, 4 test images, 3 classes" in text
        and "1,281,167 training images" in text
        and "folders:DIR" in text
    )
    shutil.rmtree(imagenet / "val")
    assert "is not ImageNet-1k as it is downloaded" in refusal(load_data, f"imagenet:{imagenet}")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    (tmp_path / "annotations").mkdir()
    names = [("Abyssinian_1", 1), ("Abyssinian_2", 1), ("german_shorthaired_10", 2), ("german_shorthaired_11", 2)]
    for shade, (name, _) in enumerate(names):
        write_image(tmp_path / "images" / f"{name}.jpg", shade * 50)
    lines = [f"{name} {number} 1 1" for name, number in names]
    (tmp_path / "annotations" / "trainval.txt").write_text("\n".join(lines[::2]) + "\n")
    (tmp_path / "annotations" / "test.txt").write_text("#Image CLASS-ID\n" + "\n".join(lines[1::2]) + "\n")
    return tmp_path


def test_pets(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_pets, "__defaults__", (Counts(2, 2, 2),))
    data = load_data(f"pets:{pets}")
    assert data.classes == ("Abyssinian", "german_shorthaired") and data.names == ("abyssinian", "german shorthaired")
    assert data.train.keys == ["Abyssinian_1.jpg", "german_shorthaired_10.jpg"] and data.test.targets.tolist() == [0, 1]
    shutil.copy(pets / "images" / "Abyssinian_1.jpg", pets / "images" / "Abyssinian_2.jpg")
    assert load_data(f"pets:{pets}").overlap == 1  # published as it is: reported, not refused


def test_pets_that_are_not_whole(pets: Path) -> None:
    counts = Counts(2, 2, 2)
    assert "holds 2 training images" in refusal(read_pets, pets)
    (pets / "images" / "Abyssinian_2.jpg").unlink()
    assert "Abyssinian_2.jpg is missing, which annotations/test.txt names" in refusal(read_pets, pets, counts)
    (pets / "annotations" / "trainval.txt").write_text("Abyssinian_1 1\nBengal_1 1\n")
    assert "'Bengal_1 1' gives no class, or another than before" in refusal(read_pets, pets, counts)
    (pets / "annotations" / "test.txt").unlink()
    (pets / "annotations" / "trainval.txt").write_text("Abyssinian_1 1\n")
    assert "annotations/test.txt is missing" in refusal(read_pets, pets, counts)


def write_cars(directory: Path) -> Path:
    classes = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    (directory / "devkit").mkdir(parents=True)
    savemat(directory / "devkit" / "cars_meta.mat", {"class_names": classes})
    for part, file, base in (
        ("train", "devkit/cars_train_annos.mat", 0),
        ("test", "cars_test_annos_withlabels.mat", 100),
    ):
        rows = [(0, 0, 5, 5, number, f"{index:05d}.jpg") for index, number in enumerate((2, 1, 2), start=1)]
        kinds = [*((name, "i4") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")), ("fname", "O")]
        savemat(directory / file, {"annotations": np.array(rows, dtype=kinds)})
        for index in range(1, 4):
            write_image(directory / f"cars_{part}" / f"{index:05d}.jpg", base + 20 * index)
    return directory


def test_cars_in_both_forms(tmp_path: Path) -> None:
    parts = read_cars(write_cars(tmp_path / "mat"), Counts(3, 3, 2))
    assert parts.classes == ("AM General Hummer SUV 2000", "Acura RL Sedan 2012")
    assert [sample.label for sample in parts.test] == [parts.classes[1], parts.classes[0], parts.classes[1]]
    for part, start in (("train", 0), ("test", 40)):
        write_folders(tmp_path / "kaggle" / "car_data" / "car_data" / part, {"Audi TT": 2, "BMW M3": 1}, start)
    assert read_cars(tmp_path / "kaggle", Counts(3, 3, 2)).classes == ("Audi TT", "BMW M3")
    (tmp_path / "mat" / "cars_train" / "00002.jpg").unlink()
    assert "00002.jpg is missing, which cars_train_annos.mat names" in refusal(
        read_cars, tmp_path / "mat", Counts(3, 3, 2)
    )
    (tmp_path / "mat" / "cars_test_annos_withlabels.mat").unlink()
    assert "cars_test_annos_withlabels.mat (or the folders train/ and test/) is missing" in refusal(
        read_cars, tmp_path / "mat"
    )


def write_parquet(file: Path, shades: list[int], labels: list, *, named: bool = True, group: int = 2) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": encoded((shade, 0, 0)), "path": None} for shade in shades]
    table = pa.table({"image": images, "label": labels})
    if named:
        features = {"info": {"features": {"label": {"names": ["zebra", "ant"]}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, file, row_group_size=group)


def test_parquet_as_the_hub_keeps_it(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [1, 2, 3], [0, 1, 1])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [4], [0])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [9], [1])
    data = load_data(f"parquet:{tmp_path}")
    assert data.classes == ("zebra", "ant")  # the file's own order
    assert data.train.targets.tolist() == [0, 1, 1, 0] and len(set(data.train.keys)) == 4
    assert [place.read() for place in data.train.encoded] == [encoded((shade, 0, 0)) for shade in (1, 2, 3, 4)]
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [3], [1])
    assert "1 of 1 test images are training images too" in refusal(load_data, f"parquet:{tmp_path}")


def test_parquet_that_cannot_be_taken(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [9], ["b"], named=False)
    assert "holds no training rows" in refusal(load_data, f"parquet:{tmp_path}")
    for labels, expected in (([0, 7], "has the class 7 in row 1"), ([0, None], "has no class in row 1")):
        write_parquet(tmp_path / "train.parquet", [1, 2], labels)
        assert expected in refusal(load_data, f"parquet:{tmp_path}")
    pq.write_table(pa.table({"picture": [b"x"], "label": [1]}), tmp_path / "train.parquet")
    assert "has the columns picture, label" in refusal(load_data, f"parquet:{tmp_path}")
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no more")
    assert "is not readable as Parquet" in refusal(load_data, f"parquet:{tmp_path}")


def test_coco_captions(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}],
        "annotations": [
            {"id": 2, "image_id": 7, "caption": "second "},
            {"id": 1, "image_id": 7, "caption": "first"},
            {"id": 3, "image_id": 3, "caption": "only"},
        ],
    }
    for name, shade in (("a.jpg", 1), ("b.jpg", 90)):
        write_image(tmp_path / "val2017" / name, shade)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    parts = load_captions(f"coco:{tmp_path}")
    assert list(parts) == ["val"] and parts["val"]().captions == [["first", "second"], ["only"]]
    assert parts["val"]().describe()["captions"] == 3
    (tmp_path / "val2017" / "b.jpg").unlink()
    assert "1 of 2 images of the part val are missing, the first" in refusal(load_captions(f"coco:{tmp_path}")["val"])
    shutil.rmtree(tmp_path / "annotations")
    assert "captions_{train,val}{2014,2017}.json is missing" in refusal(load_captions, f"coco:{tmp_path}")


@pytest.mark.parametrize("kind", ["coco", "flickr30k"])
def test_karpathys_splits(tmp_path: Path, kind: str) -> None:
    images = []
    for index, split in enumerate(("train", "restval", "test")):
        place = {"filepath": "val2014"} if kind == "coco" else {}
        images.append(
            {"filename": f"{index}.jpg", "split": split, "sentences": [{"raw": f"no. {index} "}, {"raw": "x"}], **place}
        )
        write_image(tmp_path / ("val2014" if kind == "coco" else "flickr30k-images") / f"{index}.jpg", index * 80)
    (tmp_path / f"dataset_{kind}.json").write_text(json.dumps({"images": images}))
    parts = load_captions(f"karpathy:{tmp_path}" if kind == "coco" else f"flickr30k:{tmp_path}")
    assert {name: len(part()) for name, part in parts.items()} == {"train": 2, "test": 1}
    assert parts["test"]().captions == [["no. 2", "x"]] and parts["test"]().encoded[0].read() == encoded(
        (160, 1, 2), "JPEG"
    )


def test_pairs_in_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "test" / "0.tar", sample("k", "cat"))
    parts = load_captions(f"pairs:{tmp_path}")
    assert parts["test"]().captions == [["x"]] and parts["test"]().keys == ["0.tar/k"]
    write_tar(tmp_path / "test" / "0.tar", sample("k", "cat")[:2])
    assert "the sample 'k' has no txt" in refusal(load_captions(f"pairs:{tmp_path}")["test"])
    assert "coco:DIR, karpathy:DIR, flickr30k:DIR, pairs:DIR" in refusal(load_captions, "flickr8k:x")
