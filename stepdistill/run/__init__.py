"""The folder of a run: its config, finished rungs, log and images."""
