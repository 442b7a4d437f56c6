"""Activations: which latents of a dictionary fire. One file per idea; `base.Activation` is what they share."""
