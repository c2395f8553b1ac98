"""Research programs behind the documents; `python -m studies NAME` runs one. Not in the wheel."""
