"""The host's network, entered and run for its gradient without keeping or changing a weight."""
