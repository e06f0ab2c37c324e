"""Explanations of latents in a model's words, and how well they tell where a latent fires. Off by default."""
