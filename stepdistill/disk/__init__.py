"""Files that are whole or not there, whatever stops the process that writes them."""
