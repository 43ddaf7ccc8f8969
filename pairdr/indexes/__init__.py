"""Vectors to the top k: one contract, one file each."""
