"""Ranks that part are told so: what they agree on before and after every call of a compiled graph."""
