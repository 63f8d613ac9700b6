#!/usr/bin/env bash
# pack.sh [PYTHON_VERSION] [FOLDER]: everything that check.py needs on a machine with torch, timm, numba, pyarrow and
# PyYAML alone, in one folder of at most 60 MiB (default: 3.12, gpu-kit).
#
#   FOLDER/site   pure and compiled packages for that Python on x86-64 Linux, ready to import
#   FOLDER/lib    libturbojpeg
#   FOLDER/data   small JPEGs as tars and label datasets
#
# Needs the repository's .venv (make setup), pip, Debian's or Ubuntu's apt-get, and on the first call about 200 MB of
# downloads (kept in gpu-kit-cache). CLIPART=DIR: an output of examples/openclipart/make_shards.py that is there.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=${1:-3.12}
folder=$(realpath -m "${2:-gpu-kit}")
cache=$PWD/gpu-kit-cache
python=${PYTHON:-.venv/bin/python}
most_mib=60

# Without their requirements: what torch and timm bring is on the machine, and must not be hidden by other versions.
packages=(pydantic pydantic_core annotated-types typing-inspection click rich open_clip_torch ftfy wcwidth regex)
# pydantic asks for one exact version of pydantic_core: both as in the lock file.
locked=()
for package in "${packages[@]}"; do
    line=$(grep -iE "^${package//_/[-_]}==" requirements.lock) || line=$package
    locked+=("$line")
done

rm -rf "$folder" && mkdir -p "$folder/lib" "$cache"
echo "packages for Python $version: ${locked[*]}"
platforms=()
for glibc in 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
"${PIP:-pip}" install --quiet --no-deps --no-compile --target "$folder/site" --only-binary=:all: \
    --implementation cp --python-version "$version" "${platforms[@]}" --platform manylinux2014_x86_64 "${locked[@]}"
rm -rf "$folder"/site/bin "$folder"/site/open_clip_train

library=$(ldconfig -p | awk '/libturbojpeg\.so\.0/ && !seen++ {print $NF}')
if [ -z "$library" ]; then
    (cd "$cache" && apt-get download libturbojpeg0 && dpkg-deb -x libturbojpeg0_*.deb turbojpeg)
    library=$(find "$cache/turbojpeg" -name 'libturbojpeg.so.0' | head -n 1)
fi
cp -L "$library" "$folder/lib/libturbojpeg.so.0"

clipart=${CLIPART:-$cache/clipart}
"$python" examples/openclipart/make_shards.py --out "$clipart" --cache "$cache/packages"
PYTHONPATH=$PWD "$python" benchmarks/gpu/pack_data.py --out "$folder/data" --clipart "$clipart" --photos "$cache/photos"

size=$(du -sm --apparent-size "$folder" | cut -f1)
du -sm --apparent-size "$folder"/*
[ "$size" -le "$most_mib" ] || { echo "error: $folder has $size MiB; allowed: at most $most_mib" >&2; exit 1; }
echo "packed: $folder, $size MiB"
