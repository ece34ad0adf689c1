"""The numbers of the table: features of pictures and distances between sets of them."""
