"""Judging dictionaries: what a sparse dictionary is worth, beside what PCA, chance and untrained models reach.

`suite.judge` runs all of it by tier; each other file is one family of metrics, usable alone, with its definitions.
"""
