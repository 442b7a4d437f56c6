"""Data of feature pages: what each latent of a dictionary fires on, promotes, resembles, and is worth to the model."""

from interp.dictionaries.pages.collect import Pages
from interp.dictionaries.pages.config import PagesConfig
from interp.dictionaries.pages.values import FeaturePage, Overview

__all__ = ["FeaturePage", "Overview", "Pages", "PagesConfig"]
