"""Writing files so that each is complete or absent, whatever stops the process that writes it."""
