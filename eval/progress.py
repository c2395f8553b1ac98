"""Progress of long work on stderr: one line on a terminal, nothing where the output is piped."""

from tqdm import tqdm


class Progress(tqdm):  # type: ignore[misc]  # tqdm ships no types
    """A progress bar that disappears at the end.

    Args:
        text: the current step.
        total: number of steps.
    """

    def __init__(self, text: str, *, total: int) -> None:
        super().__init__(desc=text, total=total, disable=None, leave=False)

    def say(self, text: str) -> None:
        """Show the current step."""
        self.set_description(text)

    def step(self) -> None:
        """Count one step as done."""
        self.update()
