"""Layouts of published data sets, as their archives unpack: where images lie, what lists and file names contain.

A new layout is one function in this file under the decorator `layout`. It yields items with splits `train`, `query` and
`gallery`; under protocols without a gallery of their own (`ALL_QUERY`) all test images have split `query`.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.config import Data
from pipeline.data.layout import UNKNOWN, layout
from pipeline.data.manifest import DataError, Item, some
from pipeline.protocols import PROTOCOLS

log = logging.getLogger(__name__)

CAMERAS = ("market", "market-trapezoid")
ALL_QUERY = tuple(name for name, protocol in PROTOCOLS.items() if protocol.all_query)

_VERI776 = {"train": "train", "query": "query", "test": "gallery"}
_VERI776_NAME = re.compile(r"(?P<identity>-?\d+)_(?P<camera>c\d+)_[^/\\]+\.jpe?g", re.IGNORECASE)
_MARKET_NAME = re.compile(r"(?P<identity>-?\d+)_(?P<camera>c\d+)s\d+_[^/\\]+\.jpe?g", re.IGNORECASE)
_MSMT17_NAME = re.compile(r"\d+/\d+_\d+_(?P<camera>\d+)_[^/\\]+\.jpe?g", re.IGNORECASE)


@layout("vehicles", CAMERAS)  # rendered in this layout
@layout("veri776", CAMERAS, lambda data: {"train": 37_778, "query": 1_678, "gallery": 11_579})
def veri776(root: Path, data: Data) -> Iterator[Item]:
    """VeRi-776: image_train/0001_c001_00016450_0.jpg, with the names of a folder in name_train.txt.

    Query images are among those of image_test too; protocol `market` removes them there, since identity and camera are
    the same.

    Source: Liu et al., A Deep Learning-Based Approach to Progressive Vehicle Re-identification, ECCV 2016.
    """
    for part, split in _VERI776.items():
        names, folder = root / f"name_{part}.txt", root / f"image_{part}"
        listed = [words[0] for words in lines(names, 1)]
        present = files_in(folder)
        absent = [name for name in listed if name not in present]
        if absent:
            raise FileNotFoundError(f"{names} lists images that {folder} does not have: {some(absent)}")
        if len(present) > len(listed):
            log.warning("%s: %d files are not in %s and are left out", folder, len(present) - len(listed), names.name)
        for name in listed:
            parts = matched(_VERI776_NAME, name, names, "0001_c001_00016450_0.jpg")
            yield Item(f"{folder.name}/{name}", parts["identity"], parts["camera"], split)


@layout("market1501", CAMERAS, lambda data: {"train": 12_936, "query": 3_368, "gallery": 19_732})
def market1501(root: Path, data: Data) -> Iterator[Item]:
    """Market-1501: bounding_box_train/0002_c1s1_000451_03.jpg; identity -1 is junk, 0000 are distractors.

    Source: Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015.
    """
    for name, split in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        folder = root / name
        for image in pictures(folder):
            parts = matched(_MARKET_NAME, image, folder, "0002_c1s1_000451_03.jpg")
            yield Item(f"{name}/{image}", parts["identity"], parts["camera"], split)


@layout("msmt17", CAMERAS, lambda data: {"train": 32_621, "query": 11_659, "gallery": 82_161})
def msmt17(root: Path, data: Data) -> Iterator[Item]:
    """MSMT17, V1 or V2: train/0000/0000_000_01_0303morning_0008_0.jpg, with paths and identities in list_train.txt.

    Numbers of test identities begin at zero again, so they get a word before them. Its validation list is trained on,
    as is usual; some of it is held out as of any other source.

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
        side = "train" if split == "train" else "test"
        for path, identity in lines(root / name, 2):
            parts = matched(_MSMT17_NAME, path, root / name, "0000/0000_000_01_0303morning_0008_0.jpg")
            yield Item(f"{folder}/{path}", f"{side}-{identity}", parts["camera"], split)


_VEHICLEID_QUERIES = {800: 6_493, 1600: 13_377, 2400: 19_777}


@layout("vehicleid", ALL_QUERY, lambda data: {
    "train": 113_346, "query": _VEHICLEID_QUERIES[data.vehicleid.test_identities]
})  # fmt: skip
def vehicleid(root: Path, data: Data) -> Iterator[Item]:
    """VehicleID: image/0000001.jpg, with names and identities in train_test_split/; cameras are not told.

    The test set has 800, 1600 or 2400 identities, and a list for each.

    Source: Liu et al., Deep Relative Distance Learning: Tell the Difference Between Similar Vehicles, CVPR 2016.
    """
    for name, split in (("train_list.txt", "train"), (f"test_list_{data.vehicleid.test_identities}.txt", "query")):
        for image, identity in lines(root / "train_test_split" / name, 2):
            yield Item(f"image/{image}.jpg", identity, UNKNOWN, split)


@layout("cub200", ALL_QUERY, lambda data: {"train": 5_864, "query": 5_924})
def cub200(root: Path, data: Data) -> Iterator[Item]:
    """CUB-200-2011: images/001.Black_footed_Albatross/...jpg; the first 100 classes train, the others test.

    Source: Wah et al., The Caltech-UCSD Birds-200-2011 Dataset, 2011; the split of Oh Song et al., CVPR 2016.
    """
    classes = dict(lines(root / "image_class_labels.txt", 2))
    for number, path in lines(root / "images.txt", 2):
        if number not in classes:
            raise DataError(f"{root / 'image_class_labels.txt'} lacks image {number} of images.txt")
        label = classes[number]
        if not label.isdecimal():
            raise DataError(f"{root / 'image_class_labels.txt'}: class {label!r} is no number")
        yield Item(f"images/{path}", label, UNKNOWN, "train" if int(label) <= 100 else "query")


@layout("inshop", ("query-gallery",), lambda data: {"train": 25_882, "query": 14_218, "gallery": 12_612})
def inshop(root: Path, data: Data) -> Iterator[Item]:
    """In-Shop Clothes Retrieval: img/...jpg (or Img/img/...), with splits in Eval/list_eval_partition.txt.

    Source: Liu et al., DeepFashion: Powering Robust Clothes Recognition and Retrieval, CVPR 2016.
    """
    partition = next((path for path in (root / "Eval", root) if (path / "list_eval_partition.txt").is_file()), root)
    before = "Img/" if (root / "Img" / "img").is_dir() else ""
    for path, identity, split in lines(partition / "list_eval_partition.txt", 3, skipped=2):
        if split not in ("train", "query", "gallery"):
            raise DataError(f"{partition / 'list_eval_partition.txt'}: {split!r} is none of train, query and gallery")
        yield Item(before + path, identity, UNKNOWN, split)


@layout("sop", ALL_QUERY, lambda data: {"train": 59_551, "query": 60_502})
def sop(root: Path, data: Data) -> Iterator[Item]:
    """Stanford Online Products: bicycle_final/111085122871_0.JPG, with classes in Ebay_train.txt and Ebay_test.txt.

    Source: Oh Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016.
    """
    for name, split in (("Ebay_train.txt", "train"), ("Ebay_test.txt", "query")):
        for _, identity, _, path in lines(root / name, 4, skipped=1):
            yield Item(path, identity, UNKNOWN, split)


def lines(path: Path, words: int, skipped: int = 0) -> Iterator[list[str]]:
    """Read the lines of a list after its head of `skipped` lines, as words (if one: the whole line); no empty ones.

    Raises:
        FileNotFoundError: If there is no such file.
        DataError: If a line has another number of words, or is no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing; `data.root` must be the unpacked folder of the data set"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text") from error
    for number, line in enumerate(text.splitlines()[skipped:], start=skipped + 1):
        found = [line.strip()] if words == 1 else line.split()
        if not line.strip():
            continue
        if len(found) != words:
            raise DataError(f"{path}, line {number}: expected {words} words, got {line!r}")
        yield found


def files_in(folder: Path) -> set[str]:
    """Names of the files of a folder.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; `data.root` must be the unpacked folder of the data set")
    return {path.name for path in folder.iterdir() if path.is_file()}


def pictures(folder: Path) -> Iterable[str]:
    """Names of the JPEG files of a folder, sorted; others are left out and counted."""
    names = sorted(files_in(folder))
    found = [name for name in names if name.lower().endswith((".jpg", ".jpeg"))]
    if len(found) < len(names):
        others = some(name for name in names if name not in set(found))
        log.warning("%s: %d files are no .jpg and are left out: %s", folder, len(names) - len(found), others)
    return found


def matched(form: re.Pattern[str], name: str, where: Path, example: str) -> re.Match[str]:
    """What a name says.

    Raises:
        DataError: If it has another form.
    """
    parts = form.fullmatch(name)
    if parts is None:
        raise DataError(f"{where}: {name!r} is not in the form {example}")
    return parts
