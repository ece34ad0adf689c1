"""`stepdistill doctor`: finds what would stop a run before it costs time."""
