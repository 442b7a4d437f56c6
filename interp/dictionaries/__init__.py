"""Dictionaries: codes and the protocol (`codes`, `base`), the top-k autoencoder and its trainer (`sae`, `losses`,
`train`), how good one is (`metrics`, `splice`, `heldout`, `examples`), what it has to beat (`baselines`), files
(`formats`)."""
