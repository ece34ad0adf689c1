"""The pictures of the table: which rows there are, and who draws them."""
