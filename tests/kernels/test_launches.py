"""The table of launch configurations: entries replace the defaults of their own device and shapes, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rocketkv.kernels import dependent, launches
from rocketkv.kernels.launches import Launch, LaunchKey, default_launch, launch_of, read_table, table_of

SIZES: dict[str, Any] = {
    "head_dim": 128,
    "itemsize": 2,
    "pages": 2048,
    "group": 16,
    "value_dim": 128,
    "channels": 128,
    "exact": False,
}
KEY = LaunchKey("append_score", "sm_90", 128, 128, 2, 2048)
TUNED = Launch(tile=64, warps=8, stages=5)


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_installed", lambda: {KEY: TUNED})
    monkeypatch.setattr(launches, "launch_of", launch_of.__wrapped__)


@pytest.mark.usefixtures("tuned")
def test_an_entry_counts_for_its_device_and_shape_alone() -> None:
    def found(kernel: str = "append_score", architecture: str | None = "sm_90", **changed: Any) -> Launch:
        return launches.launch_of(kernel, architecture, **SIZES | changed)

    assert found() == TUNED
    others = (
        {"kernel": "select_attend"}, {"architecture": "sm_80"}, {"architecture": None}, {"head_dim": 64},
        {"value_dim": 256}, {"itemsize": 4}, {"pages": 4096}, {"group": 32}, {"exact": True},
    )  # fmt: skip
    for changed in others:
        expected = default_launch(changed.get("kernel", "append_score"), **SIZES | {
            name: value for name, value in changed.items() if name in SIZES
        })  # fmt: skip
        assert found(**changed) == expected != TUNED, changed


def test_a_table_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    entries = {KEY: TUNED, LaunchKey("select_attend", "gfx942", 64, 32, 2, 512): Launch(32, 4, 2)}
    devices = {"sm_90": {"device": {"name": "H100"}}}
    for given in (entries, {}):
        path.write_text(table_of(given, devices), encoding="utf-8")
        assert read_table(path) == given
        assert launches.read_devices(path) == devices
    for damaged in ("{", '{"entries": [{"for": {}, "launch": {}}]}', '{"entries": [{}]}', "[]"):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match="is no table of launches"):
            read_table(path)


def test_the_installed_table_is_read() -> None:
    assert all(key.kernel in launches.KERNELS for key in read_table())


def test_defaults_are_powers_of_two_for_every_shape() -> None:
    for kernel in launches.KERNELS:
        for head_dim in (16, 64, 128, 256):
            for itemsize, exact, group in ((2, False, 16), (4, True, 128)):
                sizes = {"head_dim": head_dim, "value_dim": head_dim, "channels": head_dim, "itemsize": itemsize}
                cut = default_launch(kernel, **sizes, pages=8192, group=group, exact=exact)
                assert cut.tile & (cut.tile - 1) == cut.warps & (cut.warps - 1) == 0
    with pytest.raises(ValueError, match=r"kernel must be one of append_score.*got 'other'"):
        default_launch("other", **SIZES)


def test_launches_overlap_on_new_devices_with_new_drivers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlap(architecture: str | None, device: str = "cuda", driver: int = 12080) -> bool:
        monkeypatch.setattr(dependent, "driver_version", lambda: driver)
        return dependent.launches_dependently(architecture, torch.device(device))

    monkeypatch.setattr(dependent, "AVAILABLE", True)
    assert overlap("sm_90")
    assert overlap("sm_120")
    assert overlap("sm_90", driver=12030)
    assert overlap("sm_90", "meta", driver=0)  # compiled for it, not run
    others: tuple[tuple[str | None, int], ...] = (("sm_80", 12080), ("sm_90", 12020), ("gfx942", 0), (None, 12080))
    assert not any(overlap(architecture, driver=driver) for architecture, driver in others)
    monkeypatch.setattr(dependent, "AVAILABLE", False)
    assert not overlap("sm_90")


def test_a_cpu_has_no_architecture() -> None:
    assert launches.architecture_of(torch.device("cpu")) is None
