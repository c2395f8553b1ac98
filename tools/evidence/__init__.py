"""Figures, tables and pictures of the README and of docs/evidence.md."""
