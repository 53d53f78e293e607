"""A Python file that is no candidate file."""

VALUE = 1
