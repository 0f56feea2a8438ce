"""Miniatures of published data sets, in the exact layout of their archives, and of custom data.

Each identity has its colours and pattern, each camera its brightness, each view its noise: a network can learn them.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, identity: int, camera: int = 0, view: int = 0, size: tuple[int, int] = (40, 40)) -> None:
    """Write one random picture of an identity; `size` is (height, width)."""
    identity_rng = np.random.default_rng([1, identity])
    small = identity_rng.integers(0, 256, (5, 5, 3)).astype(np.float64)
    noise = np.random.default_rng([2, identity, camera, view])
    large = np.asarray(Image.fromarray(small.astype(np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC), np.float64)
    shifted = np.roll(large, noise.integers(-4, 5, 2), (0, 1)) * (0.8 + 0.08 * camera)
    pixels = np.clip(shifted + noise.normal(0, 12, large.shape), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg") else {}))


def views(first: int, identities: int, cameras: int, views_each: int) -> Iterator[tuple[int, int, int]]:
    """Yield (identity, camera, view); identities begin at `first`, cameras at 1, views at 0."""
    for identity in range(first, first + identities):
        for camera in range(1, cameras + 1):
            for view in range(views_each):
                yield identity, camera, view


def veri776(root: Path, train: int, test: int) -> None:
    """Write VeRi-776."""
    for part, keys in {
        "train": list(views(1, train, 3, 2)),
        "query": list(views(train + 1, test, 3, 1)),
        "test": list(views(train + 1, test, 3, 2)),  # queries are in it too
    }.items():
        names = [f"{identity:04}_c{camera:03}_{view:08}_0.jpg" for identity, camera, view in keys]
        for name, key in zip(names, keys, strict=True):
            picture(root / f"image_{part}" / name, *key)
        (root / f"name_{part}.txt").write_text("\n".join(names) + "\n")


def market1501(root: Path, train: int, test: int) -> None:
    """Write Market-1501, with junk, distractors and Thumbs.db."""
    for folder, keys in {
        "bounding_box_train": list(views(2, train, 3, 2)),
        "query": list(views(train + 2, test, 3, 1)),
        "bounding_box_test": [key for key in views(train + 2, test, 3, 3) if key[2]],
    }.items():
        for identity, camera, view in keys:
            name = f"{identity:04}_c{camera}s1_{view:06}_00.jpg"
            picture(root / folder / name, identity, camera, view)
        (root / folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    picture(root / "bounding_box_test" / "-1_c1s1_000401_03.jpg", 9001)
    picture(root / "bounding_box_test" / "0000_c2s1_000401_03.jpg", 9002)


def msmt17(root: Path, train: int, test: int, version: int = 1) -> None:
    """Write MSMT17; identities of train and test both begin at 0."""
    names = ("train", "test") if version == 1 else ("mask_train_v2", "mask_test_v2")
    train_views, test_views = list(views(0, train, 3, 2)), list(views(0, test, 3, 2))
    for name, folder, keys, first in (
        ("list_train.txt", names[0], [key for key in train_views if key[1] < 3], 0),
        ("list_val.txt", names[0], [key for key in train_views if key[1] == 3], 0),
        ("list_query.txt", names[1], [key for key in test_views if not key[2]], train),
        ("list_gallery.txt", names[1], [key for key in test_views if key[2]], train),
    ):
        lines = []
        for identity, camera, view in keys:
            path = f"{identity:04}/{identity:04}_{view:03}_{camera:02}_0303morning_0008_0.jpg"
            picture(root / folder / path, first + identity, camera, view)
            lines.append(f"{path} {identity}")
        (root / name).write_text("\n".join(lines) + "\n")


def vehicleid(root: Path, train: int, test: int) -> None:
    """Write VehicleID; its three test lists are the same here."""
    number = 0
    lists: dict[str, list[str]] = {"train_list.txt": [], "test_list_800.txt": []}
    for name, first, count in (("train_list.txt", 1, train), ("test_list_800.txt", train + 1, test)):
        for identity, camera, view in views(first, count, 2, 2):
            number += 1
            picture(root / "image" / f"{number:07}.jpg", identity, camera, view)
            lists[name].append(f"{number:07} {identity}")
    lists["test_list_1600.txt"] = lists["test_list_2400.txt"] = lists["test_list_800.txt"]
    (root / "train_test_split").mkdir()
    for name, lines in lists.items():
        (root / "train_test_split" / name).write_text("\n".join(lines) + "\n")


def cub200(root: Path, train: int, test: int) -> None:
    """Write CUB-200-2011; classes 1 to 100 are for training, the others for test."""
    images, labels, number = [], [], 0
    for label in (*range(1, train + 1), *range(101, 101 + test)):
        for view in range(4):
            number += 1
            path = f"{label:03}.Some_Bird/Some_Bird_{view:04}_{number}.jpg"
            picture(root / "images" / path, label, view % 2, view)
            images.append(f"{number} {path}")
            labels.append(f"{number} {label}")
    (root / "images.txt").write_text("\n".join(images) + "\n")
    (root / "image_class_labels.txt").write_text("\n".join(labels) + "\n")


def inshop(root: Path, train: int, test: int) -> None:
    """Write In-Shop Clothes Retrieval."""
    lines = []
    for identity, camera, view in views(1, train + test, 2, 2):
        path = f"img/WOMEN/Dresses/id_{identity:08}/{camera:02}_{view + 1}_front.jpg"
        picture(root / path, identity, camera, view)
        split = "train" if identity <= train else "query" if camera == 1 else "gallery"
        lines.append(f"{path:<70} id_{identity:08} {split}")
    (root / "Eval").mkdir()
    head = f"{len(lines)}\nimage_name item_id evaluation_status\n"
    (root / "Eval" / "list_eval_partition.txt").write_text(head + "\n".join(lines) + "\n")


def sop(root: Path, train: int, test: int) -> None:
    """Write Stanford Online Products."""
    number = 0
    for name, first, count in (("Ebay_train.txt", 1, train), ("Ebay_test.txt", train + 1, test)):
        lines = ["image_id class_id super_class_id path"]
        for identity, camera, view in views(first, count, 2, 2):
            number += 1
            path = f"bicycle_final/{111085122000 + identity}_{2 * camera + view}.JPG"
            picture(root / path, identity, camera, view)
            lines.append(f"{number} {identity} 1 {path}")
        (root / name).write_text("\n".join(lines) + "\n")


def folder(root: Path, train: int, test: int) -> None:
    """Write custom data: one folder for each identity, and in it one for each camera."""
    for identity, camera, view in views(1, train + test, 3, 2):
        picture(root / f"thing {identity}" / f"cam{camera}" / f"{view}.png", identity, camera, view)


def table(root: Path, train: int, test: int) -> None:
    """Write custom data: a CSV file with cameras and without splits."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "identity", "camera"])
        for identity, camera, view in views(1, train + test, 3, 2):
            path = f"{identity}-{camera}-{view}.webp"
            picture(root / path, identity, camera, view)
            writer.writerow([path, f"{identity:03}", f"c{camera}"])


LAYOUTS: dict[str, Callable[[Path, int, int], None]] = {
    "veri776": veri776,
    "market1501": market1501,
    "msmt17": msmt17,
    "vehicleid": vehicleid,
    "cub200": cub200,
    "inshop": inshop,
    "sop": sop,
    "folder": folder,
    "csv": table,
}
"""Writers by `data.source`; arguments are the root, and the numbers of training and test identities."""

PROTOCOLS = {"vehicleid": "vehicleid", "cub200": "loo", "inshop": "query-gallery", "sop": "loo"}
"""Protocols by `data.source`; the others use `market`."""
