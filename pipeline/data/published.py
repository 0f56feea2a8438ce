"""Layouts of published data sets, as their archives unpack: folders, lists and file names.

A new layout is one function in this file under the decorator `layout`. It yields items with splits `train`, `query` and
`gallery`; under protocols that take no gallery (`ALL_QUERY`) all test images have split `query`.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.config import Data
from pipeline.data.folders import is_left_behind
from pipeline.data.layout import UNKNOWN, layout
from pipeline.data.manifest import DataError, Item, first_few
from pipeline.protocols import PROTOCOLS

log = logging.getLogger(__name__)

CAMERA_PROTOCOLS = ("market", "market-trapezoid")
ALL_QUERY = tuple(name for name, protocol in PROTOCOLS.items() if protocol.all_query)

_VERI776 = {"train": "train", "query": "query", "test": "gallery"}
_VERI776_NAME = re.compile(r"(?P<identity>-?\d+)_(?P<camera>c\d+)_[^/\\]+\.jpe?g", re.IGNORECASE)
_MARKET_NAME = re.compile(r"(?P<identity>-?\d+)_(?P<camera>c\d+)s\d+_[^/\\]+\.jpe?g", re.IGNORECASE)
_MSMT17_NAME = re.compile(r"\d+/\d+_\d+_(?P<camera>\d+)_[^/\\]+\.jpe?g", re.IGNORECASE)


@layout("vehicles", CAMERA_PROTOCOLS)  # the default set is rendered in this layout
@layout("veri776", CAMERA_PROTOCOLS, lambda data: {"train": 37_778, "query": 1_678, "gallery": 11_579})
def veri776(root: Path, data: Data) -> Iterator[Item]:
    """Read VeRi-776: image_train/0001_c001_00016450_0.jpg, with the names of a folder's images in name_train.txt.

    Query images are in image_test too; protocol `market` leaves them out, since identity and camera are the same.

    Source: Liu et al., A Deep Learning-Based Approach to Progressive Vehicle Re-identification, ECCV 2016.
    """
    for part, split in _VERI776.items():
        names, folder = root / f"name_{part}.txt", root / f"image_{part}"
        listed = [words[0] for words in lines(names, 1)]
        present = files_in(folder)
        missing = [name for name in listed if name not in present]
        if missing:
            raise FileNotFoundError(f"{names} lists images that are missing in {folder}: {first_few(missing)}")
        if len(present) > len(listed):
            log.warning("%s: %d files are not in %s and are skipped", folder, len(present) - len(listed), names.name)
        for name in listed:
            parts = match_name(_VERI776_NAME, name, names, "0001_c001_00016450_0.jpg")
            yield Item(f"{folder.name}/{name}", parts["identity"], parts["camera"], split)


@layout("market1501", CAMERA_PROTOCOLS, lambda data: {"train": 12_936, "query": 3_368, "gallery": 19_732})
def market1501(root: Path, data: Data) -> Iterator[Item]:
    """Read Market-1501: bounding_box_train/0002_c1s1_000451_03.jpg; identity -1 is junk, 0000 are distractors.

    Source: Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015.
    """
    for name, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        folder = root / name
        for image in jpeg_files(folder):
            parts = match_name(_MARKET_NAME, image, folder, "0002_c1s1_000451_03.jpg")
            yield Item(f"{name}/{image}", parts["identity"], parts["camera"], split)


@layout("msmt17", CAMERA_PROTOCOLS, lambda data: {"train": 32_621, "query": 11_659, "gallery": 82_161})
def msmt17(root: Path, data: Data) -> Iterator[Item]:
    """Read MSMT17, V1 or V2: train/0000/0000_000_01_0303morning_0008_0.jpg, paths and identities in list_train.txt.

    Test identities are numbered from 0 again, so identities get the prefix `train-` or `test-`. As usual, the
    validation list is part of the training set; `split_validation` holds identities out as for other data sets.

    Source: Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018.
    """
    versions = [pair for pair in (("train", "test"), ("mask_train_v2", "mask_test_v2")) if (root / pair[0]).is_dir()]
    if not versions:
        raise FileNotFoundError(f"{root} has neither train nor mask_train_v2: `data.root` must be an unpacked MSMT17")
    train, test = versions[0]
    for name, folder, split in (
        *(("list_train.txt", train, "train"), ("list_val.txt", train, "train")),
        *(("list_query.txt", test, "query"), ("list_gallery.txt", test, "gallery")),
    ):
        prefix = "train" if split == "train" else "test"
        for path, identity in lines(root / name, 2):
            parts = match_name(_MSMT17_NAME, path, root / name, "0000/0000_000_01_0303morning_0008_0.jpg")
            yield Item(f"{folder}/{path}", f"{prefix}-{identity}", parts["camera"], split)


_VEHICLEID_QUERIES = {800: 6_493, 1600: 13_377, 2400: 19_777}


@layout("vehicleid", ALL_QUERY, lambda data: {
    "train": 113_346, "query": _VEHICLEID_QUERIES[data.vehicleid.test_identities]
})  # fmt: skip
def vehicleid(root: Path, data: Data) -> Iterator[Item]:
    """Read VehicleID: image/0000001.jpg, with names and identities in train_test_split/, without cameras.

    There are three test lists, of 800, 1600 and 2400 identities.

    Source: Liu et al., Deep Relative Distance Learning: Tell the Difference Between Similar Vehicles, CVPR 2016.
    """
    for name, split in (("train_list.txt", "train"), (f"test_list_{data.vehicleid.test_identities}.txt", "query")):
        for image, identity in lines(root / "train_test_split" / name, 2):
            yield Item(f"image/{image}.jpg", identity, UNKNOWN, split)


@layout("cub200", ALL_QUERY, lambda data: {"train": 5_864, "query": 5_924})
def cub200(root: Path, data: Data) -> Iterator[Item]:
    """Read CUB-200-2011: images/001.Black_footed_Albatross/...jpg; classes 1 to 100 are the training set.

    Source: Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011; the split of Oh Song et al., CVPR 2016.
    """
    classes = dict(lines(root / "image_class_labels.txt", 2))
    for number, path in lines(root / "images.txt", 2):
        if number not in classes:
            raise DataError(f"{root / 'image_class_labels.txt'} lacks image {number} of images.txt")
        label = classes[number]
        if not label.isdecimal():
            raise DataError(f"{root / 'image_class_labels.txt'}: class {label!r} is not a number")
        yield Item(f"images/{path}", label, UNKNOWN, "train" if int(label) <= 100 else "query")


@layout("inshop", ("query-gallery",), lambda data: {"train": 25_882, "query": 14_218, "gallery": 12_612})
def inshop(root: Path, data: Data) -> Iterator[Item]:
    """Read In-Shop Clothes Retrieval: img/...jpg (or Img/img/...), with splits in Eval/list_eval_partition.txt.

    Source: Liu et al., DeepFashion: Powering Robust Clothes Recognition and Retrieval, CVPR 2016.
    """
    name = "list_eval_partition.txt"
    partition = root / "Eval" / name if (root / "Eval" / name).is_file() else root / name
    prefix = "Img/" if (root / "Img" / "img").is_dir() else ""
    for path, identity, split in lines(partition, 3, skipped=2):
        if split not in ("train", "query", "gallery"):
            raise DataError(f"{partition}: split must be train, query or gallery, got {split!r}")
        yield Item(prefix + path, identity, UNKNOWN, split)


@layout("sop", ALL_QUERY, lambda data: {"train": 59_551, "query": 60_502})
def sop(root: Path, data: Data) -> Iterator[Item]:
    """Read Stanford Online Products: bicycle_final/111085122871_0.JPG, classes in Ebay_train.txt and Ebay_test.txt.

    Source: Oh Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016.
    """
    for name, split in (("Ebay_train.txt", "train"), ("Ebay_test.txt", "query")):
        for _, identity, _, path in lines(root / name, 4, skipped=1):
            yield Item(path, identity, UNKNOWN, split)


def lines(path: Path, words: int, skipped: int = 0) -> Iterator[list[str]]:
    """Yield the words of each line that is not empty.

    Args:
        words: Words in a line; 1 yields the whole line as one word.
        skipped: Lines of the header.

    Raises:
        FileNotFoundError: If the file does not exist.
        DataError: If a line has another number of words, or the file is not text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing; `data.root` must be the unpacked folder of the data set"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text") from error
    for number, line in enumerate(text.splitlines()[skipped:], start=skipped + 1):
        if not line.strip():
            continue
        parts = [line.strip()] if words == 1 else line.split()
        if len(parts) != words:
            raise DataError(f"{path}, line {number}: expected {words} words, got {line!r}")
        yield parts


def files_in(folder: Path) -> set[str]:
    """Return the names of the files in a folder, except those that operating systems leave behind.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; `data.root` must be the unpacked folder of the data set")
    return {path.name for path in folder.iterdir() if path.is_file() and not is_left_behind(path.name)}


def jpeg_files(folder: Path) -> Iterable[str]:
    """Return the names of the JPEG files in a folder, sorted, and warn about other files."""
    names = sorted(files_in(folder))
    images = [name for name in names if name.lower().endswith((".jpg", ".jpeg"))]
    if len(images) < len(names):
        others = first_few(name for name in names if name not in set(images))
        log.warning("%s: %d files are not .jpg and are skipped: %s", folder, len(names) - len(images), others)
    return images


def match_name(pattern: re.Pattern[str], name: str, where: Path, example: str) -> re.Match[str]:
    """Match a file name; `where` and `example` are for the error.

    Raises:
        DataError: If it does not match.
    """
    match = pattern.fullmatch(name)
    if match is None:
        raise DataError(f"{where}: {name!r} does not have the form {example}")
    return match
