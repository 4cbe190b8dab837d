"""The miniature's second world: open emoji sets, the same subjects drawn by several houses of artists."""
