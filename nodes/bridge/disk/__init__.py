"""Files below the host's folders: their names, and what they say of how they were made."""
