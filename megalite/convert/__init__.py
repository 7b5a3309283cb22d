"""Weights and configurations of other formats: mapping tables, reading and writing."""
