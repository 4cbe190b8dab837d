"""What a node shows while it runs."""
