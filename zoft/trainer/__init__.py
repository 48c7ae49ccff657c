"""The Hugging Face Trainer that takes zeroth-order steps."""
