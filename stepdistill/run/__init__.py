"""What is on disk: a run's folder, its finished rungs, its log, and files that are whole or not there."""
