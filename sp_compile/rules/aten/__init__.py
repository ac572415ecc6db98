"""The rules of ATen, a file per family of ops."""
