"""Data of other tools, both ways: MS MARCO, DPR, Tevatron, FlagEmbedding, RocketQA.

`files` knows what their files are made of, `training` and `corpora` what is in them, `imports` and `exports` how they
become a BEIR folder with examples, and how such a folder becomes theirs.
"""
