"""A run's folder: its config, its finished rungs, its log, its pictures."""
