"""Finished and running runs beside each other: one table, one picture."""
