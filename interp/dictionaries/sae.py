"""TopKSAE, the old name of a top-k `SparseDictionary`; goes away with its last caller."""

from interp.dictionaries.dictionary import SparseDictionary as TopKSAE

__all__ = ["TopKSAE"]
