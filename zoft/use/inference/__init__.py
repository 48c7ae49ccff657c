"""What a finished run is used for: labels for new rows, texts, a conversation."""
