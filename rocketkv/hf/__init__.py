"""The way into Hugging Face transformers."""
