"""The table of supported models, docs/models.md."""
