"""Files of dictionaries: which layout a path has, reading, writing, converting with a proof (`table`, `convert`)."""
