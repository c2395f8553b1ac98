"""The state of one layer for one batch of sequences, through prompts and decoding."""
