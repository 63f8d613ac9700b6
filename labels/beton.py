"""FFCV's .beton file, version 2, with three fields of stock types: image, label_ids, index.

    header (24 bytes) | field descriptors (3 x 1,041) | metadata [n] | zeros to a page border | pages | allocation table

A sample's JPEG bytes and its padded label row follow one another on one page, so two pointers of the metadata table
give position and length of both (one table read per sample instead of two: 1.6 -> 1.0 us). The allocation table, two
rows per sample (image, labels), is only for stock FFCV. All numbers are little-endian, all pointers absolute offsets in
bytes. Layout after ffcv/types.py, ffcv/fields/{rgb_image,ndarray,basics}.py of FFCV 1.0.2.
"""

import json

import numpy as np

VERSION = 2
MIN_PAGE_BYTES = 1 << 21
MAX_PAGE_BYTES = 1 << 31
IMAGE_FIELD, LABELS_FIELD, INDEX_FIELD = "image", "label_ids", "index"
FIELD_NAMES = (IMAGE_FIELD, LABELS_FIELD, INDEX_FIELD)
JPG_MODE = 0
_INT_TYPE, _RGB_TYPE, _NDARRAY_TYPE = 1, 2, 4
FIELD_TYPES = (_RGB_TYPE, _NDARRAY_TYPE, _INT_TYPE)

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
# FFCV builds this type with unnamed fields and align=True; the names here are ours, the offsets its own.
METADATA = np.dtype([("image", _IMAGE), ("labels_ptr", "<u8"), ("index", "<i8")], align=True)
_NDARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
METADATA_OFFSET = HEADER.itemsize + len(FIELD_NAMES) * FIELD.itemsize


def field_descriptors(label_limit: int) -> np.ndarray:
    """The three descriptors, FIELD [3], for label rows of int32 [label_limit]."""
    fields = np.zeros(len(FIELD_NAMES), FIELD)
    for field, type_id, name in zip(fields, FIELD_TYPES, FIELD_NAMES, strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode(), "u1")
    shape = np.zeros(1, _NDARRAY_ARGUMENTS)
    element = json.dumps(np.dtype("<i4").descr).encode()
    shape["shape"][0, 0], shape["type_length"][0] = label_limit, len(element)
    arguments = shape.tobytes() + element
    fields[1]["arguments"][: len(arguments)] = np.frombuffer(arguments, "u1")
    return fields


def label_limit_of(fields: np.ndarray) -> int:
    """K, the width of the label rows, as the second descriptor states it."""
    return int(fields[1]["arguments"][: _NDARRAY_ARGUMENTS.itemsize].view(_NDARRAY_ARGUMENTS)["shape"][0, 0])


def first_page_offset(samples: int, page_bytes: int) -> int:
    """Offset in bytes of the first page when the metadata array has room for `samples` rows."""
    end = METADATA_OFFSET + samples * METADATA.itemsize
    return -(-end // page_bytes) * page_bytes


def page_bytes_for(largest_sample_bytes: int) -> int:
    """The smallest legal page, in bytes, that holds the largest sample."""
    return max(MIN_PAGE_BYTES, 1 << (max(largest_sample_bytes, 1) - 1).bit_length())
