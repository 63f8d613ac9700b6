"""Every labelled image below one folder: folders by class, or webdataset shards with the class in each sample.

DIR/<class>/**/*.jpg                      folders: the folder's name is the class, the path the key
DIR/*.tar or DIR/shards/*.tar             shards: <key>.jpg with <key>.cls or <key>.json ({"class": ...}), members of a key adjacent
"""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from labels.errors import UserError
from train.evals.data.images import IMAGE_SUFFIXES, FilePlace, Sample, suffix

_LAYOUTS = "folders by class (DIR/<class>/*.jpg), or shards (DIR/*.tar or DIR/shards/*.tar)"
_CLASS_MEND = "write the class into each sample's json under the key `class`, or into <key>.cls"


def list_samples(directory: Path) -> list[Sample]:
    """Every labelled image below `directory`, in sorted order, whichever of the two layouts it has.

    Raises:
        UserError: the directory is missing or empty, a sample has no class or no image, a tar is damaged.
    """
    if not directory.is_dir():
        raise UserError(f"no directory at {directory}", allowed=_LAYOUTS, mend="mend the path of the data")
    tars = list_tars(directory)
    samples = [sample for tar in tars for sample in _shard_samples(tar)] if tars else list_folders(directory)
    if not samples:
        raise UserError(
            f"{directory} holds no labelled image",
            allowed=f"DIR/<class>/*.{{{','.join(IMAGE_SUFFIXES)}}}, or DIR/*.tar, or DIR/shards/*.tar",
            mend="mend the path of the data; images directly in DIR have no class",
        )
    return samples


def list_tars(directory: Path) -> list[Path]:
    """DIR/*.tar, or else DIR/shards/*.tar, sorted."""
    return sorted(directory.glob("*.tar")) or sorted((directory / "shards").glob("*.tar"))


def list_folders(directory: Path) -> list[Sample]:
    """Samples of DIR/<class>/**/*.jpg; hidden folders and files are passed over."""
    found = []
    for folder in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for file in list_images(folder):
            found.append(Sample(file.relative_to(directory).as_posix(), folder.name, FilePlace.of_file(file)))
    return found


def list_images(folder: Path) -> list[Path]:
    """Image files anywhere below `folder`, sorted."""
    files = sorted(folder.rglob("*"))
    return [file for file in files if suffix(file.name) in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()]


def tar_members(path: Path) -> Iterator[tuple[tarfile.TarFile, str, dict[str, tarfile.TarInfo]]]:
    """The samples of one tar, in its order: the open tar, key, members by ending. Before a basename's first dot is the key.

    Raises:
        UserError: the tar is damaged or cut, at whatever place.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
            _check_end(tar, path)
            for key, group in groupby(members, lambda member: _split_key(member.name)[0]):
                fields: dict[str, tarfile.TarInfo] = {}
                for member in group:
                    ending = _split_key(member.name)[1]
                    if fields.setdefault(ending, member) is not member:
                        raise UserError(f"{path}: the sample {key!r} has two members .{ending}", allowed="one of each ending")
                yield tar, key, fields
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read to its end: {error}", mend="fetch or write this shard again") from None


def image_member(path: Path, key: str, fields: dict[str, tarfile.TarInfo]) -> FilePlace:
    """The place of a sample's one image.

    Raises:
        UserError: it has none, or several.
    """
    images = [member for ending, member in fields.items() if ending in IMAGE_SUFFIXES]
    if len(images) != 1:
        raise UserError(
            f"{path}: the sample {key!r} has {len(images)} images (members: {', '.join(fields)})",
            allowed=f"one member with an ending of {', '.join(IMAGE_SUFFIXES)}",
        )
    return FilePlace(path, images[0].offset_data, images[0].size)


def _shard_samples(path: Path) -> Iterator[Sample]:
    for tar, key, fields in tar_members(path):
        label = _class_of(tar, path, key, fields)
        yield Sample(f"{path.name}/{key}", label, image_member(path, key, fields))


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """A tar ends with blocks of zeros. Without them it was cut between two members, which tarfile passes over."""
    with open(path, "rb") as file:
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"{path} is cut or damaged at byte {tar.offset:,}: no end-of-archive block there",
                allowed="a whole tar",
                mend="fetch or write this shard again",
            )


def _class_of(tar: tarfile.TarFile, path: Path, key: str, fields: dict[str, tarfile.TarInfo]) -> str:
    """The class name: the text of <key>.cls, or of `class` in <key>.json: a string, or a whole number taken as its digits."""
    where = f"{path}: the sample {key!r}"
    member = fields.get("cls") or fields.get("json")
    file = tar.extractfile(member) if member else None
    if file is None:
        raise UserError(f"{where} has no json", allowed='<key>.json with {"class": "name"}, or <key>.cls', mend=_CLASS_MEND)
    try:
        content = {"class": file.read().decode().strip()} if "cls" in fields else json.loads(file.read())
    except ValueError as error:  # both JSON and UTF-8 faults
        raise UserError(f"{where} has a json that cannot be read: {error}", mend=_CLASS_MEND) from None
    label = content.get("class") if isinstance(content, dict) else None
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{where} has no class in its json: `class` is {label!r}, the json holds {keys}",
            allowed="a key `class` with a name or a whole number",
            mend=_CLASS_MEND,
        )
    return str(label)


def _split_key(name: str) -> tuple[str, str]:
    """`a/b.seg.PNG` -> (`a/b`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()
