"""Figures of what a cache keeps, what its decode steps read and what they miss.

A figure is a dict in plotly's JSON form. `plotly.graph_objects.Figure(figure)` draws it in a notebook, where plotly is
installed (`pip install 'rocketkv[show]'`); `write_page` writes several into one HTML file, without that package.
"""

from .lines import missed
from .maps import kept, reads, step
from .page import write_page
from .words import token_texts

__all__ = ["kept", "missed", "reads", "step", "token_texts", "write_page"]
