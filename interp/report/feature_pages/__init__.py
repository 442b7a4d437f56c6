"""A folder of feature pages that opens from disk, without a network: a list of latents, and a page for each."""

from interp.report.feature_pages.writer import write_pages

__all__ = ["write_pages"]
