"""Files below the host's folders: their names, and their metadata."""
