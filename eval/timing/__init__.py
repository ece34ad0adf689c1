"""The parts of eval/bench.py, each of which measures one thing."""
