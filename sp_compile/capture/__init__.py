"""Dynamo graph → one functional, canonical ATen graph."""
