"""Build the image and prove what is in it."""
