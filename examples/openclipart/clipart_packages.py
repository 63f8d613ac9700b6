"""Gets the two clip art packages and unpacks them without installing anything.

    apt-get download  ->  CACHE/openclipart-{svg,png}_VERSION_all.deb
    dpkg-deb -x       ->  CACHE/unpacked-VERSION/usr/share/openclipart/{svg,png}/CLASS/.../NAME.{svg,png}

Both steps are skipped when the cache has their result.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("openclipart-svg", "openclipart-png")
TREE_INSIDE_PACKAGE = Path("usr/share/openclipart")


class PackageError(Exception):
    """The packages are not available; the message says what to do about it."""


@dataclass(frozen=True)
class ClipartTree:
    """An unpacked archive: `root` contains `svg/` and `png/`; `packages` are the package file names."""

    root: Path
    packages: tuple[str, ...]


def require_tools(*tools: str) -> None:
    """Fails with a hint if a Debian tool is not on the PATH."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise PackageError(
            f"{' and '.join(missing)} not found: this script needs Debian or Ubuntu. Run it in a container of one "
            "of them, or unpack the openclipart-svg and openclipart-png packages yourself and pass the folder which "
            "contains svg/ and png/ as --tree."
        )


def cached_deb(cache: Path, package: str) -> Path | None:
    """The package's newest file in the cache, by name."""
    found = sorted(cache.glob(f"{package}_*.deb"))
    return found[-1] if found else None


def apt_download(packages: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `apt-get download`, which needs no root rights and writes into the current folder."""
    return subprocess.run(["apt-get", "download", *packages], cwd=folder, capture_output=True, text=True, check=False)


def download(packages: list[str], cache: Path) -> None:
    """Fetches the packages into the cache; refreshes apt's package lists once if they do not know them."""
    require_tools("apt-get")
    print(f"downloading {' and '.join(packages)} (155 MB for both) into {cache}", file=sys.stderr)
    # A folder of its own, so that a killed download never leaves half a package where the cache is looked up.
    folder = cache / "download.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = apt_download(packages, folder)
    if result.returncode != 0:
        subprocess.run(["apt-get", "update"], capture_output=True, check=False)
        result = apt_download(packages, folder)
    if result.returncode != 0:
        raise PackageError(
            f"apt-get download {' '.join(packages)} failed:\n{result.stderr.strip()}\n"
            "Check the network, run `apt-get update` as root, and see that the distribution has these packages."
        )
    for deb in folder.glob("*.deb"):
        deb.replace(cache / deb.name)
    shutil.rmtree(folder)


def unpack(debs: list[Path], cache: Path) -> Path:
    """Unpacks the packages side by side into one folder of the cache, once per version."""
    version = debs[0].name.split("_")[1].replace("%3a", "-")
    target = cache / f"unpacked-{version}"
    if not target.is_dir():
        require_tools("dpkg-deb")
        print(f"unpacking into {target}", file=sys.stderr)
        part = cache / "unpack.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for deb in debs:
            result = subprocess.run(["dpkg-deb", "-x", deb, part], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                raise PackageError(f"{deb} cannot be unpacked:\n{result.stderr.strip()}\nDelete it and run again.")
        part.replace(target)
    return target / TREE_INSIDE_PACKAGE


def fetch_tree(cache: Path) -> ClipartTree:
    """The unpacked archive, downloaded only if it is not in the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = [package for package in PACKAGES if cached_deb(cache, package) is None]
    if missing:
        download(missing, cache)
    debs = [deb for package in PACKAGES if (deb := cached_deb(cache, package)) is not None]
    return ClipartTree(unpack(debs, cache), tuple(deb.name for deb in debs))
