"""Adversarial examples against an image classifier that is only asked: the nouns, and searches made for images."""
