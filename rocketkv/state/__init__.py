"""What one layer of one batch of sequences holds, through prompts and decoding."""
