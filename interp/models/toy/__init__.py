"""Small models whose inside is known."""
