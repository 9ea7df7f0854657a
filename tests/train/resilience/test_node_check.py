"""Checks of a node with planted faults: one wrong element, one flipped bit, a slow device, a clock that was set."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from train.resilience.node_check import Speed, clock, disk, judged, memory, product

CPU = torch.device("cpu")


def test_one_wrong_element_of_a_product_is_found() -> None:
    def faulty(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found = torch.mm(left, right)
        found[77, 3] += 1
        return found

    assert product(CPU).wrong == 0 and product(CPU).rate > 0
    assert product(CPU, multiply=faulty).wrong == 1


def test_one_flipped_bit_of_memory_is_found() -> None:
    def faulty(words: torch.Tensor) -> torch.Tensor:
        found = words.clone()
        found[-5] ^= 1 << 40
        return found

    assert memory(CPU, size=8 << 20).wrong == 0
    assert memory(CPU, size=8 << 20, copy=faulty).wrong == 1


def test_slow_and_wrong_devices_are_named() -> None:
    good, slow = Speed(0, 700e12), Speed(0, 300e12)
    assert (
        judged("products", [good] * 8, unit="FLOP/s", expected=989e12).found
        == "700 TFLOP/s, the slowest of 8 (71% of the data sheet)"
    )
    assert judged("products", [good, slow], unit="FLOP/s", expected=989e12).found.startswith("device 1: 300 TFLOP/s")
    unequal = judged("products", [good, good, Speed(0, 550e12)], unit="FLOP/s", expected=989e12)
    assert unequal.state == "wrong" and unequal.found.startswith("device 2"), "above half, but slower than the others"
    assert (
        judged("memory", [Speed(0, 5e9), Speed(3, 5e9)], unit="B/s", expected=None).found
        == "wrong numbers from device 1"
    )
    assert judged("memory", [Speed(0, 5e9), Speed(0, 1e9)], unit="B/s", expected=None).state == "ok", "no data sheet"


def test_a_set_clock_and_a_folder_that_is_a_file(tmp_path: Path) -> None:
    assert clock(tmp_path, ticked_s=10.0, passed_s=10.01).state == "ok"
    assert clock(tmp_path, ticked_s=13.0, passed_s=10.0).state == "wrong"
    (tmp_path / "file").touch()
    assert disk(tmp_path / "file").state == "wrong" and disk(tmp_path).state == "ok"


def test_nodes_that_check_one_shared_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Also with equal process ids, as in containers."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(disk, [tmp_path] * 4))
    assert [one.state for one in found] == ["ok"] * 4, found
    assert not list(tmp_path.iterdir())
