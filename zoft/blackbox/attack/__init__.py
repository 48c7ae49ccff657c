"""Adversarial examples against an image classifier by queries alone: the nouns, and searches made for images."""
