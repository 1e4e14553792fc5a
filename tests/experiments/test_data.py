"""The data come out as they were put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import data


def test_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no 'sts/x\.tsv' in .*JAXCOMPRESS_DATA"
    ):
        data.find("sts/x.tsv", tmp_path)


def test_folder_is_argument_then_variable_then_sibling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, variable = tmp_path / "given", tmp_path / "variable"
    for folder in (given, variable):
        folder.mkdir()
        (folder / "file").touch()
    monkeypatch.setenv("JAXCOMPRESS_DATA", str(variable))
    assert data.find("file", given) == given / "file"
    assert data.find("file") == variable / "file"
    monkeypatch.delenv("JAXCOMPRESS_DATA")
    monkeypatch.setattr(data, "SIBLING", given)
    assert data.find("file") == given / "file"


def test_tiles_are_read_in_rows(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    mosaic = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    path = tmp_path / "mosaic.webp"
    image.fromarray(mosaic).save(path, lossless=True)
    tiles = data._tiles(path)
    assert tiles.shape == (6, 32, 32, 3)
    np.testing.assert_array_equal(tiles[0], mosaic[:32, :32])
    np.testing.assert_array_equal(tiles[2], mosaic[:32, 64:])
    np.testing.assert_array_equal(tiles[4], mosaic[32:, 32:64])


def test_cifar10_test_part(data_dir: Path) -> None:
    pytest.importorskip("PIL.Image")
    images = data.cifar10("test", data_dir)
    assert images.x.shape == (1000, 32, 32, 3)
    assert images.x.dtype == np.uint8
    assert images.y.shape == (1000,)
    # The official test set starts with a cat, two ships and an airplane.
    assert images.y[:4].tolist() == [3, 8, 8, 0]


def test_mnist_test_part(data_dir: Path) -> None:
    images = data.mnist("test", data_dir)
    assert images.x.shape == (10_000, 28, 28, 1)
    assert images.y[:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize(
    ("name", "n"), [("stsb_test", 1379), ("stsb_dev", 1500), ("sts15", 3000)]
)
def test_sts_has_all_its_pairs(data_dir: Path, name: str, n: int) -> None:
    pairs = data.sts(name, data_dir)
    assert len(pairs.scores) == len(pairs.first) == len(pairs.second) == n
    assert pairs.scores.min() >= 0
    assert pairs.scores.max() <= 5
    first = pairs.head(3)
    assert first.second == pairs.second[:3]
    assert len(first.scores) == 3


def test_stories_start_with_bos_and_are_cut(data_dir: Path) -> None:
    chosen = data.stories(1200, 1230, data_dir)
    assert len(chosen) == 30
    assert {int(ids[0]) for ids in chosen} == {1}
    assert max(map(len, chosen)) <= 513
    short = data.stories(1200, 1230, data_dir, length=20)
    for long, cut in zip(chosen, short, strict=True):
        np.testing.assert_array_equal(cut, long[:20])
