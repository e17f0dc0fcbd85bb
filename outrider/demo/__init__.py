"""The demo: a tiny model that calculates carelessly, and the arithmetic that it is to learn."""
