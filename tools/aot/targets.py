"""The devices that kernels are compiled for; none of them has to be there."""

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
        backend: Triton's name of its maker.
        arch: its architecture.
        lanes: threads of a warp.
        programs: its multiprocessors, by which launches are cut.
        since: the first Triton that compiles for it.
        reason: why no earlier one does.
    """

    backend: str
    arch: int | str
    lanes: int
    programs: int
    since: tuple[int, int] = (3, 2)
    reason: str = ""

    def left_out(self) -> str | None:
        """Return why the installed Triton does not compile for it, or None if it does."""
        installed = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if installed >= self.since:
            return None
        return f"Triton {triton.__version__} is older than {self.since[0]}.{self.since[1]}: {self.reason}"


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 108),  # A100
    "sm_90": Target("cuda", 90, 32, 132),  # H100
    "sm_100": Target("cuda", 100, 32, 148, (3, 3), "its ptxas does not know this device"),  # B200
    "gfx942": Target("hip", "gfx942", 64, 304, (3, 5), "it links through an installation of ROCm"),  # MI300X
}
