"""Measuring on an attached device: steps against each other, with controls and doubts.

`stepper` runs chains in a worker, `protocol` decides who runs when, `session` brings both together
and makes values for records; `paired` and `doubts` say what the raw times tell. Nothing else
touches a device but `trace`.
"""
