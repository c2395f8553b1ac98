"""The command line `rocketkv`."""
